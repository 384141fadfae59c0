"""Signals: what ends a process, what makes it save, and how nothing is lost by it.

Use:    with StopRequest() as stop: ... if stop.signal: save and leave; if stop.save_asked: save and go on
        exit_quietly_on_signals() at the start of a command: signals unwind it without a traceback
The table is EXIT_CODES. What was ignored when the process started stays ignored: nohup does that with
SIGHUP, a shell with SIGINT and SIGQUIT for what it starts in the background. Signals that are not in the
table keep their usual meaning (SIGTSTP and SIGCONT: Ctrl-Z and fg).
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from nanogpt.streams import show_cursor, stop_waiting, write_signal_safe

if TYPE_CHECKING:
    from typing_extensions import Self


def available_signals(*names: str) -> tuple[signal.Signals, ...]:
    """Those of the signals that this system has. Windows has few."""
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


STOP_SIGNALS = available_signals(
    "SIGINT",  # Ctrl-C
    "SIGTERM",  # kill, schedulers, container runtimes
    "SIGHUP",  # the terminal was closed, the connection lost
    "SIGQUIT",  # Ctrl-\
    "SIGXCPU",  # the limit of CPU time is reached (ulimit -S -t), and again every second from there on
    "SIGBREAK",  # Windows: Ctrl-Break, the console was closed
)
SAVE_SIGNALS = available_signals("SIGUSR1", "SIGUSR2")
"""What says that there is little time left, as Slurm does (--signal=USR1@120): save, and go on."""

EXIT_CODES = {number: 128 + number for number in STOP_SIGNALS}
"""128 + the number of the signal, as shells report it."""

STOP_REASONS = tuple(number.name for number in STOP_SIGNALS)
"""Their names, which a training gives as its reason to stop."""

REPEATED_SIGNALS = available_signals("SIGTERM", "SIGHUP", "SIGXCPU")
"""Signals that programs repeat, and not to say more: Slurm before and at the end of the time, `timeout` to a
process and to its group, a shell as it closes, the kernel every second. They never break a save off: who
wants that has Ctrl-C and SIGKILL."""

REPEAT_WINDOW_SECONDS = 1.0
"""Signals that follow one another as closely are one wish: a launcher passes on what has come already."""


class StopRequest:
    """While entered, signals are noted in `signal` and `save_asked` instead of ending the process."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.save_asked = False
        """Set by a signal in SAVES; whoever saves takes it back before."""
        self.received_at = 0.0
        self.previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "Self":
        """Take over the signals (in the main thread, the only one that may) that are not ignored."""
        if threading.current_thread() is threading.main_thread():
            self.previous_handlers = install_handlers(self.handle)
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: remember the signal; Ctrl-C, coming later, ends the process as if not caught."""
        name = signal.Signals(number).name
        if number in SAVE_SIGNALS:
            self.save_asked = True
            write_signal_safe(f"{name}: saving after this step, and going on")
        elif self.signal is None:
            self.signal, self.received_at = signal.Signals(number), time.monotonic()
            stop_waiting()
            once_more = "" if number in REPEATED_SIGNALS else " (once more to stop at once)"
            write_signal_safe(f"{name}: finishing this step and saving{once_more}")
        elif number not in REPEATED_SIGNALS and time.monotonic() - self.received_at >= REPEAT_WINDOW_SECONDS:
            self.restore_and_reraise(number, frame)

    def restore_and_reraise(self, number: int, frame: FrameType | None) -> None:
        """Let the signal do what it does without this."""
        self.__exit__()
        before = self.previous_handlers[number]
        if before is unwind:
            exit_immediately(number, frame)
        elif callable(before):
            before(number, frame)
        else:
            signal.raise_signal(number)


def install_handlers(handler: Any) -> dict[int, Any]:
    """Install a handler for every signal here, unless it is ignored. Returns what was there before."""
    usual = {number: signal.getsignal(number) for number in STOP_SIGNALS + SAVE_SIGNALS}
    return {
        number: signal.signal(number, handler)
        for number, before in usual.items()
        if before not in (signal.SIG_IGN, None)  # None: some library's own, which could not be put back
    }


def exit_quietly_on_signals() -> None:
    """From here on signals unwind this process without a traceback; the second one ends it at once.

    Those that ask for a save do nothing where there is nothing to save.
    """
    install_handlers(unwind)


def unwind(number: int, frame: FrameType | None) -> None:
    """Signal handler of a command. Errors: KeyboardInterrupt, or SystemExit with the signal's exit code."""
    if number in SAVE_SIGNALS:
        return
    for other, before in {other: signal.getsignal(other) for other in STOP_SIGNALS}.items():
        if before is unwind:
            signal.signal(other, exit_immediately)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(EXIT_CODES[signal.Signals(number)])


def exit_immediately(number: int, frame: FrameType | None) -> None:
    """Signal handler: leave without waiting for threads, or for what would be tidied up."""
    show_cursor()
    os._exit(EXIT_CODES[signal.Signals(number)])
