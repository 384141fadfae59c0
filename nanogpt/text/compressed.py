"""Compressed files (gzip, bzip2, xz, zstd) as decompressed streams. A cut or damaged file raises an error.

Example: stream = BombGuard(DECOMPRESSORS[".xz"](file), lambda: bytes_read)
Decompression bombs are refused. Knows neither file names nor archives.
"""

import bz2
import gzip
import io
import lzma
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol, cast

from nanogpt.errors import require
from nanogpt.text.records import missing_library

BOMB_RATIO, BOMB_BYTES = 200, 1 << 26
"""A file that expands to more than this many times its size, and to more than this many bytes, is refused."""

READ_BYTES = 1 << 16
"""Compressed bytes to read at a time."""


class CountingReader(io.RawIOBase):
    """A file that counts the bytes read from it."""

    def __init__(self, file: io.RawIOBase | BinaryIO, advance: Callable[[int], object]) -> None:
        self.file, self.advance, self.bytes_read = file, advance, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """As the file is."""
        return self.file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """As the file does."""
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        """As the file does."""
        return self.file.tell()

    def readinto(self, buffer: Any, /) -> int:
        """Read into `buffer`, and count the bytes."""
        size = cast(io.RawIOBase, self.file).readinto(buffer) or 0
        self.bytes_read += size
        self.advance(size)
        return size


class Decompressor(Protocol):
    """The interface that the decompressors of bz2, lzma and zstd share: one compressed frame."""

    @property
    def eof(self) -> bool:
        """Whether the frame has ended."""
        ...

    @property
    def needs_input(self) -> bool:
        """Whether more input is needed for more output."""
        ...

    @property
    def unused_data(self) -> bytes:
        """The bytes after the frame."""
        ...

    def decompress(self, data: bytes, max_length: int = ...) -> bytes:
        """The next bytes of output, at most max_length."""
        ...


class FrameReader(io.RawIOBase):
    """The decompressed stream of one frame after the other.

    The libraries' own file classes end silently where the bytes after a frame are no frame.
    """

    def __init__(self, file: BinaryIO, new: Callable[[], Decompressor]) -> None:
        self.file, self.new = file, new
        self.frame: Decompressor | None = None

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Read into `buffer`. Raises: EOFError if a frame is cut off; the library's error if damaged."""
        data = b""
        while not data:
            given = b""
            if self.frame is None or self.frame.eof:
                given = self.frame.unused_data if self.frame else b""
                given = given or self.file.read(READ_BYTES)
                given = given.lstrip(b"\0") or self.skip_padding()
                if not given:
                    return 0
                self.frame = self.new()
            elif self.frame.needs_input:
                given = self.file.read(READ_BYTES)
                if not given:
                    raise EOFError("it is cut off")
            data = self.frame.decompress(given, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def skip_padding(self) -> bytes:
        """The bytes after zeros, which may fill a file up to the size of a block."""
        while (given := self.file.read(READ_BYTES)) and not given.strip(b"\0"):
            pass
        return given.lstrip(b"\0")


class BombGuard(io.RawIOBase):
    """A decompressed stream that refuses decompression bombs.

    bytes_in: returns the number of compressed bytes read so far.
    """

    def __init__(self, file: BinaryIO, bytes_in: Callable[[], int]) -> None:
        self.file, self.bytes_in, self.bytes_out = file, bytes_in, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Read into `buffer`. Raises: UserError if it is a decompression bomb."""
        data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        self.bytes_out += len(data)
        refuse_bomb(self.bytes_out, self.bytes_in())
        return len(data)


def refuse_bomb(bytes_out: int, bytes_in: int) -> None:
    """Raise UserError if so many bytes out of so many are a decompression bomb."""
    require(
        bytes_out <= BOMB_BYTES or bytes_out <= BOMB_RATIO * bytes_in,
        f"expands to more than {BOMB_RATIO} times its size: refused, as a decompression bomb",
    )


def ungzip(file: BinaryIO) -> BinaryIO:
    """A stream out of a gzip file."""
    return cast(BinaryIO, gzip.GzipFile(fileobj=file))


def unbzip(file: BinaryIO) -> BinaryIO:
    """A stream out of a bzip2 file."""
    return cast(BinaryIO, FrameReader(file, bz2.BZ2Decompressor))


def unxz(file: BinaryIO) -> BinaryIO:
    """A stream out of an xz file."""
    return cast(BinaryIO, FrameReader(file, lzma.LZMADecompressor))


def unzstd(file: BinaryIO) -> BinaryIO:
    """A stream out of zstd frames. Raises: UserError if the library is not installed."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ModuleNotFoundError as error:
        raise missing_library("backports.zstd") from error
    return cast(BinaryIO, FrameReader(file, zstd.ZstdDecompressor))


DECOMPRESSORS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": ungzip,
    ".tgz": ungzip,
    ".bz2": unbzip,
    ".tbz2": unbzip,
    ".xz": unxz,
    ".txz": unxz,
    ".zst": unzstd,
    ".tzst": unzstd,
}
