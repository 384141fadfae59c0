"""Signals: what ends a process, what makes it save, and how nothing is lost by it.

Use:    with StopRequest() as stop: ... if stop.signal: save and leave; if stop.save_asked: save and go on
        end_quietly() at the start of a command: Ctrl-C, SIGTERM, ... unwind it without a traceback
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

from nanogpt.streams import hurry, notice, show_cursor

if TYPE_CHECKING:
    from typing_extensions import Self


def known(*names: str) -> tuple[signal.Signals, ...]:
    """Those of the signals that this system has. Windows has few."""
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


ENDS = known(
    "SIGINT",  # Ctrl-C
    "SIGTERM",  # kill, schedulers, container runtimes
    "SIGHUP",  # the terminal was closed, the connection lost
    "SIGQUIT",  # Ctrl-\
    "SIGXCPU",  # the limit of CPU time is reached (ulimit -S -t), and again every second from there on
    "SIGBREAK",  # Windows: Ctrl-Break, the console was closed
)
SAVES = known("SIGUSR1", "SIGUSR2")
"""What says that there is little time left, as Slurm does (--signal=USR1@120): save, and go on."""

EXIT_CODES = {number: 128 + number for number in ENDS}
"""128 + the number of the signal, as shells report it."""

STOP_REASONS = tuple(number.name for number in ENDS)
"""Their names, which a training gives as its reason to stop."""

COMES_AGAIN = known("SIGTERM", "SIGHUP", "SIGXCPU")
"""Signals that programs repeat, and not to say more: Slurm before and at the end of the time, `timeout` to a
process and to its group, a shell as it closes, the kernel every second. They never break a save off: who
wants that has Ctrl-C and SIGKILL."""

SAME_WISH_SECONDS = 1.0
"""Signals that follow one another as closely are one wish: a launcher passes on what has come already."""


class StopRequest:
    """While entered, signals are noted in `signal` and `save_asked` instead of ending the process."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.save_asked = False
        """Set by a signal in SAVES; whoever saves takes it back before."""
        self.noted_at = 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Self":
        """Take over the signals (in the main thread, the only one that may) that are not ignored."""
        if threading.current_thread() is threading.main_thread():
            self.before = take_over(self.note)
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: remember the signal; Ctrl-C, coming later, ends the process as if not caught."""
        name = signal.Signals(number).name
        if number in SAVES:
            self.save_asked = True
            notice(f"{name}: saving after this step, and going on")
        elif self.signal is None:
            self.signal, self.noted_at = signal.Signals(number), time.monotonic()
            hurry()
            once_more = "" if number in COMES_AGAIN else " (once more to stop at once)"
            notice(f"{name}: finishing this step and saving{once_more}")
        elif number not in COMES_AGAIN and time.monotonic() - self.noted_at >= SAME_WISH_SECONDS:
            self.give_up(number, frame)

    def give_up(self, number: int, frame: FrameType | None) -> None:
        """Let the signal do what it does without this."""
        self.__exit__()
        before = self.before[number]
        if before is interrupt:
            end_at_once(number, frame)
        elif callable(before):
            before(number, frame)
        else:
            signal.raise_signal(number)


def take_over(handler: Any) -> dict[int, Any]:
    """Install a handler for every signal here, unless it is ignored. Returns what was there before."""
    usual = {number: signal.getsignal(number) for number in ENDS + SAVES}
    return {
        number: signal.signal(number, handler)
        for number, before in usual.items()
        if before not in (signal.SIG_IGN, None)  # None: some library's own, which could not be put back
    }


def end_quietly() -> None:
    """From here on signals unwind this process without a traceback; the second one ends it at once.

    Those that ask for a save do nothing where there is nothing to save.
    """
    take_over(interrupt)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Signal handler of a command. Errors: KeyboardInterrupt, or SystemExit with the signal's exit code."""
    if number in SAVES:
        return
    for other, before in {other: signal.getsignal(other) for other in ENDS}.items():
        if before is interrupt:
            signal.signal(other, end_at_once)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(EXIT_CODES[signal.Signals(number)])


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Signal handler: leave without waiting for threads, or for what would be tidied up."""
    show_cursor()
    os._exit(EXIT_CODES[signal.Signals(number)])
