"""Standard streams that never fail: output to a closed terminal, a broken pipe or a full disk is dropped.

Example: protect_standard_streams()      at the start of a command
         raise_stdout_errors(on=True)    in a command whose product is its output
         write_signal_safe("...")        in a signal handler
None of these failures may end a training. A stream that was closed before the program started is opened on
/dev/null; otherwise the next file to be opened would get its descriptor, and the output with it.
Knows no signals, colors or commands.
"""

import contextlib
import io
import os
import select
import sys
from typing import Any, cast

from nanogpt.errors import UserError

STREAM_NAMES = ("stdin", "stdout", "stderr")
"""Names in sys of the descriptors 0, 1 and 2."""

PIPE_BUF = getattr(select, "PIPE_BUF", 512)
"""Bytes that a pipe which select calls writable takes without blocking."""

WAIT_SECONDS = 0.5
"""Longest wait for a reader before never_waits is looked at again."""

SHOW_CURSOR = b"\x1b[?25h"


class ProtectedStream(io.RawIOBase):
    """A raw stream around another that ignores write errors.

    raises_errors: raise the first write error as a UserError, for a command whose product is its output. A
    broken pipe, as with `| head`, ends the program quietly instead.
    never_waits: drop output instead of waiting for the reader.
    """

    def __init__(self, inner: Any, name: str) -> None:
        self.inner, self.title = inner, name
        self.raises_errors = self.never_waits = False
        self.uncertain_bytes = 0
        """Bytes of a write that a signal handler interrupted: they may have been written or not."""

    def writable(self) -> bool:
        """Whether the stream can be written to: always."""
        return True

    def fileno(self) -> int:
        """The file descriptor."""
        return int(self.inner.fileno())

    def isatty(self) -> bool:
        """Whether the stream is a terminal that is still open."""
        try:
            return bool(self.inner.isatty())
        except (OSError, ValueError):
            return False

    def write(self, data: Any, /) -> int:
        """Write some of the bytes, or drop them if that fails. Returns their number."""
        piece = memoryview(data).cast("B")[:PIPE_BUF]
        if self.uncertain_bytes:  # the same bytes again: rather lost than written twice
            piece, self.uncertain_bytes = piece[: self.uncertain_bytes], 0
            return len(piece)
        self.uncertain_bytes = len(piece)
        written = self.write_or_drop(piece)
        self.uncertain_bytes = 0
        return written

    def write_or_drop(self, piece: memoryview) -> int:
        """Write the bytes once the reader takes them; drop them on an error, or if never_waits."""
        try:
            while not self.never_waits or is_ready(self.fileno(), 0):
                if is_ready(self.fileno(), WAIT_SECONDS):
                    written = self.inner.write(piece)
                    if written is not None:  # None: a non-blocking stream that is full again
                        return int(written)
        except (OSError, ValueError) as error:
            self.handle_error(error)
        return len(piece)

    def handle_error(self, error: OSError | ValueError) -> None:
        """Raise the first error if raises_errors: UserError, or SystemExit for a broken pipe."""
        if not self.raises_errors:
            return
        self.raises_errors, self.uncertain_bytes = False, 0
        if isinstance(error, BrokenPipeError):
            raise SystemExit(0) from None
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write to {self.title}: {reason}") from error


def protect_standard_streams() -> None:
    """Make standard input, output and error safe to use for the rest of this process."""
    for descriptor, name in enumerate(STREAM_NAMES):
        if not is_open(descriptor):
            lowest_free = os.open(os.devnull, os.O_RDWR)  # which is this descriptor
            os.set_inheritable(lowest_free, True)
        if getattr(sys, name) is None:
            stream = open(os.devnull, "w" if descriptor else "r", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    for name, title in (("stdout", "standard output"), ("stderr", "standard error")):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            protected = protect_stream(cast("io.TextIOWrapper[Any]", stream), title)
            setattr(sys, name, protected)
            setattr(sys, f"__{name}__", protected)


def is_open(descriptor: int) -> bool:
    """Whether a file descriptor is open."""
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def protect_stream(stream: "io.TextIOWrapper[Any]", title: str) -> io.TextIOWrapper:
    """Wrap a text stream in a ProtectedStream. Characters that it cannot encode are replaced."""
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
    """The ProtectedStreams among standard output and standard error, in this order."""
    raws = [getattr(getattr(stream, "buffer", None), "raw", None) for stream in (sys.stdout, sys.stderr)]
    return [raw for raw in raws if isinstance(raw, ProtectedStream)]


def raise_stdout_errors(*, on: bool) -> None:
    """Choose whether a write error on standard output is raised (see ProtectedStream)."""
    for stream in protected_streams()[:1]:
        stream.raises_errors = on


def stop_waiting() -> None:
    """Never wait for readers again: the process has something to save."""
    for stream in protected_streams():
        stream.never_waits = True


def flush() -> None:
    """Flush standard output and error. Raises: UserError, SystemExit (see ProtectedStream)."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def is_main_process() -> bool:
    """Whether this is the process of rank 0, the only one of a distributed training that prints."""
    alone = os.environ.get("WORLD_SIZE", "1") in ("", "0", "1")
    return alone or os.environ.get("RANK", "0") == "0"


def write_signal_safe(line: str) -> None:
    """Print a line from a signal handler, which may neither use buffered streams nor wait."""
    was_closed = sys.__stderr__ is None  # from the start, so that descriptor 2 may be any file
    if is_main_process() and not was_closed:
        write_if_ready(2, f"\n{line}\n".encode())


def show_cursor() -> None:
    """Show the terminal's cursor again, which a progress bar hides, before the process exits."""
    with contextlib.suppress(OSError):
        if sys.__stdout__ is not None and os.isatty(1):
            write_if_ready(1, SHOW_CURSOR)


def write_if_ready(descriptor: int, raw: bytes) -> None:
    """Write a few bytes to a descriptor, or drop them if that would block or fails."""
    with contextlib.suppress(OSError):
        if is_ready(descriptor, 0):
            os.write(descriptor, raw)


def is_ready(descriptor: int, seconds: float) -> bool:
    """Whether a descriptor becomes writable within some seconds."""
    try:
        return bool(select.select([], [descriptor], [], seconds)[1])
    except (OSError, ValueError):  # on Windows select works for sockets only
        return True
