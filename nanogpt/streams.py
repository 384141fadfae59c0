"""Standard streams that take whatever is written to them, whatever became of what is behind them.

Use:    secure() first of all in a command; insist(on=False) where printing is not what the command is for;
        notice("...") in a signal handler
A terminal can be closed, the reader of a pipe can leave or sleep, a disk can be full: none of that may end a
training, and /dev/null stands where a stream was closed from the start, so that no file that is opened later
gets its number and takes what is printed. Knows no signals, colours or commands.
"""

import contextlib
import io
import os
import select
import sys
from typing import Any, cast

from nanogpt.errors import UserError

STREAM_NAMES = ("stdin", "stdout", "stderr")
"""Of the descriptors 0, 1 and 2."""

PIPE_BUF = getattr(select, "PIPE_BUF", 512)
"""So many bytes go into a pipe that is ready without waiting."""

WAIT_SECONDS = 0.5
"""How often a stream that waits for its reader looks whether it still has to."""

SHOW_CURSOR = b"\x1b[?25h"


class ProtectedStream(io.RawIOBase):
    """A stream over another one that is written to without an error.

    raises_errors: the first error is raised after all, as a UserError (or, if a pipe has lost its reader, as
    with `| head`, as a quiet end of the program). For commands whose product is what they print.
    never_waits: what would have to wait for its reader is left out.
    """

    def __init__(self, inner: Any, name: str) -> None:
        self.inner, self.title = inner, name
        self.raises_errors = self.never_waits = False
        self.uncertain_bytes = 0
        """Bytes of which it is not known whether they were written, because a signal broke the write off."""

    def writable(self) -> bool:
        """Yes."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return int(self.inner.fileno())

    def isatty(self) -> bool:
        """Whether it is a terminal that is still there."""
        try:
            return bool(self.inner.isatty())
        except (OSError, ValueError):
            return False

    def write(self, data: Any, /) -> int:
        """Write some of the bytes, and return how many; if that cannot be, let them go and return that."""
        piece = memoryview(data).cast("B")[:PIPE_BUF]
        if self.uncertain_bytes:  # these are the same again: rather not at all than twice
            piece, self.uncertain_bytes = piece[: self.uncertain_bytes], 0
            return len(piece)
        self.uncertain_bytes = len(piece)
        written = self.write_or_drop(piece)
        self.uncertain_bytes = 0
        return written

    def write_or_drop(self, piece: memoryview) -> int:
        """Wait until the bytes can be written, and do that, unless nothing is waited for."""
        try:
            while not self.never_waits or is_ready(self.fileno(), 0):
                if is_ready(self.fileno(), WAIT_SECONDS):
                    written = self.inner.write(piece)
                    if written is not None:  # None: it does not block, and is full again
                        return int(written)
        except (OSError, ValueError) as error:
            self.handle_error(error)
        return len(piece)

    def handle_error(self, error: OSError | ValueError) -> None:
        """Errors: UserError, or SystemExit if the reader has left; the first time, and if raises_errors."""
        if not self.raises_errors:
            return
        self.raises_errors, self.uncertain_bytes = False, 0
        if isinstance(error, BrokenPipeError):
            raise SystemExit(0) from None
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write to {self.title}: {reason}") from error


def protect_standard_streams() -> None:
    """Make standard input, output and error usable in this process, for good."""
    for descriptor, name in enumerate(STREAM_NAMES):
        if not is_open(descriptor):
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number: this one
        if getattr(sys, name) is None:
            stream = open(os.devnull, "w" if descriptor else "r", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    for name, title in (("stdout", "standard output"), ("stderr", "standard error")):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            secured = protect_stream(cast("io.TextIOWrapper[Any]", stream), title)
            setattr(sys, name, secured)
            setattr(sys, f"__{name}__", secured)


def is_open(descriptor: int) -> bool:
    """Whether the number belongs to an open file."""
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def protect_stream(stream: "io.TextIOWrapper[Any]", title: str) -> io.TextIOWrapper:
    """The text stream, secured. A character that it cannot show is no error either."""
    settings: dict[str, Any] = {
        "encoding": stream.encoding,
        "errors": "replace",
        "line_buffering": stream.line_buffering,
        "write_through": stream.write_through,
    }
    buffer = stream.detach()
    raw = buffer.detach() if isinstance(buffer, io.BufferedWriter) else buffer  # none with python -u
    return io.TextIOWrapper(io.BufferedWriter(ProtectedStream(raw, title)), **settings)


def protected_streams() -> list[ProtectedStream]:
    """Standard output and error as far as they are secured, in this order."""
    raws = [getattr(getattr(stream, "buffer", None), "raw", None) for stream in (sys.stdout, sys.stderr)]
    return [raw for raw in raws if isinstance(raw, ProtectedStream)]


def raise_stdout_errors(*, on: bool) -> None:
    """Whether what cannot be written to standard output is an error (see Secured)."""
    for stream in protected_streams()[:1]:
        stream.raises_errors = on


def stop_waiting() -> None:
    """From here on wait for nobody who reads: the process has something to save."""
    for stream in protected_streams():
        stream.never_waits = True


def flush() -> None:
    """Write what was printed. Errors: as standard output's."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def is_main_process() -> bool:
    """Whether this process is the one that talks, of those that a launcher started together."""
    alone = os.environ.get("WORLD_SIZE", "1") in ("", "0", "1")
    return alone or os.environ.get("RANK", "0") == "0"


def write_signal_safe(line: str) -> None:
    """Say something in a signal handler: buffered streams must not be touched there, nor waited for."""
    if is_main_process() and sys.__stderr__ is not None:  # closed from the start: number 2 may be any file
        write_if_ready(2, f"\n{line}\n".encode())


def show_cursor() -> None:
    """Undo what a progress bar does to the terminal, in a process that ends at once."""
    with contextlib.suppress(OSError):
        if sys.__stdout__ is not None and os.isatty(1):
            write_if_ready(1, SHOW_CURSOR)


def write_if_ready(descriptor: int, raw: bytes) -> None:
    """Write a few bytes to a descriptor if that is possible at once."""
    with contextlib.suppress(OSError):
        if is_ready(descriptor, 0):
            os.write(descriptor, raw)


def is_ready(descriptor: int, seconds: float) -> bool:
    """Whether a write would not wait for a reader, now or within some time."""
    try:
        return bool(select.select([], [descriptor], [], seconds)[1])
    except (OSError, ValueError):  # Windows can ask sockets alone
        return True
