"""Ctrl-C and SIGTERM without losing anything: note the signal, let the step end, then stop.

Use:    with StopRequest() as stop: ... if stop.signal: save and leave
A second signal stops at once.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

from typing_extensions import Self

from nanogpt.console import speaks

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""128 + the number of the signal, as shells report it."""


class StopRequest:
    """While entered, signals are noted in `signal` instead of ending the process."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Take over the signals (in the main thread, the only one that may)."""
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.note) for number in EXIT_CODES}
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: remember the signal; the next one acts as if nobody had caught it."""
        self.signal = signal.Signals(number)
        notice = f"\n{self.signal.name}: finishing this step and saving (once more to stop at once)\n"
        if speaks():
            os.write(2, notice.encode())  # a handler may not touch buffered streams
        for other in EXIT_CODES:
            signal.signal(other, signal.default_int_handler if other == signal.SIGINT else signal.SIG_DFL)
