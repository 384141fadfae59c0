"""Signal handlers: stop and save, save and go on, or exit without a traceback.

Example: with StopRequest() as stop: ... if stop.signal: save and leave; if stop.save_asked: save and go on
         exit_quietly_on_signals() at the start of a command: signals unwind it without a traceback
A signal that was ignored when the process started stays ignored: nohup ignores SIGHUP, and a shell ignores
SIGINT and SIGQUIT in background jobs. Signals outside STOP_SIGNALS and SAVE_SIGNALS keep their usual
meaning (SIGTSTP and SIGCONT: Ctrl-Z and fg).
"""

import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from nanogpt.terminal.console import warn_in_signal_handler
from nanogpt.terminal.streams import show_cursor, stop_waiting

if TYPE_CHECKING:
    from typing_extensions import Self


def available_signals(*names: str) -> tuple[signal.Signals, ...]:
    """The signals of these names that this operating system has; Windows lacks most."""
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


STOP_SIGNALS = available_signals(
    "SIGINT",  # Ctrl-C
    "SIGTERM",  # kill, schedulers, container runtimes
    "SIGHUP",  # the terminal was closed, the connection lost
    "SIGQUIT",  # Ctrl-\
    "SIGXCPU",  # CPU time limit reached (ulimit -S -t), sent again every second
    "SIGBREAK",  # Windows: Ctrl-Break, or the console was closed
)
SAVE_SIGNALS = available_signals("SIGUSR1", "SIGUSR2")
"""Requests to save and go on, as Slurm sends before the time limit (--signal=USR1@120)."""

EXIT_CODES = {number: 128 + number for number in STOP_SIGNALS}
"""128 + the number of the signal, as shells report it."""

REPEATED_SIGNALS = available_signals("SIGTERM", "SIGHUP", "SIGXCPU")
"""Signals that programs send repeatedly: Slurm before and at the time limit, `timeout` to a process and to
its group, a closing shell, the kernel every second. A second one does not interrupt a save; Ctrl-C does."""

REPEAT_WINDOW_SECONDS = 1.0
"""A second signal within this time counts as the first: a launcher forwards what the process already got."""


class StopRequest:
    """Context in which signals set `signal` or `save_asked` instead of ending the process."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.save_asked = False
        """Set by a signal in SAVE_SIGNALS; the trainer resets it before it saves."""
        self.received_at = 0.0
        self.previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "Self":
        """Install the handler, in the main thread only, since no other may."""
        if threading.current_thread() is threading.main_thread():
            self.previous_handlers = install_handlers(self.handle)
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the previous handlers."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: record the request; a second Ctrl-C ends the process as usual."""
        name = signal.Signals(number).name
        if number in SAVE_SIGNALS:
            self.save_asked = True
            warn_in_signal_handler(f"{name}: saving after this step, and going on")
        elif self.signal is None:
            self.signal, self.received_at = signal.Signals(number), time.monotonic()
            stop_waiting()
            once_more = "" if number in REPEATED_SIGNALS else " (once more to stop at once)"
            warn_in_signal_handler(f"{name}: finishing this step and saving{once_more}")
        elif number not in REPEATED_SIGNALS and time.monotonic() - self.received_at >= REPEAT_WINDOW_SECONDS:
            self.restore_and_reraise(number, frame)

    def restore_and_reraise(self, number: int, frame: FrameType | None) -> None:
        """Restore the previous handlers and let this signal take its usual effect."""
        self.__exit__()
        previous = self.previous_handlers[number]
        if previous is unwind:
            exit_immediately(number, frame)
        elif callable(previous):
            previous(number, frame)
        else:
            signal.raise_signal(number)


def install_handlers(handler: Any) -> dict[int, Any]:
    """Install a handler for every signal that is not ignored. Returns the previous handlers."""
    usual = {number: signal.getsignal(number) for number in STOP_SIGNALS + SAVE_SIGNALS}
    return {
        number: signal.signal(number, handler)
        for number, before in usual.items()
        if before not in (signal.SIG_IGN, None)  # None: not installed from Python, and could not be restored
    }


def exit_quietly_on_signals() -> None:
    """Make stop signals unwind this process without a traceback, and a second one end it at once.

    SAVE_SIGNALS do nothing, since there is nothing to save.
    """
    install_handlers(unwind)


def unwind(number: int, frame: FrameType | None) -> None:
    """Signal handler: raise KeyboardInterrupt for Ctrl-C, else SystemExit with the signal's exit code."""
    if number in SAVE_SIGNALS:
        return
    replace_handlers(unwind, exit_immediately)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(EXIT_CODES[signal.Signals(number)])


@contextmanager
def no_unwinding() -> Generator[None]:
    """Let signals end the process at once, not unwind it: libraries swallow exceptions while they load."""
    replace_handlers(unwind, exit_immediately)
    try:
        yield
    finally:
        replace_handlers(exit_immediately, unwind)


def replace_handlers(old: Any, new: Any) -> None:
    """Replace a handler by another, for all stop signals that have it."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is old:
            signal.signal(number, new)


def exit_immediately(number: int, frame: FrameType | None) -> None:
    """Signal handler: exit without waiting for threads or cleaning up."""
    show_cursor()
    os._exit(EXIT_CODES[signal.Signals(number)])
