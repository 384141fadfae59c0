"""Where text comes from: files, folders, globs and standard input, in any of the usual formats.

Use:    corpus = Corpus(find(["books/", "dump.jsonl.gz"]), text_field="text")
        for piece in corpus.pieces(Report()): piece.text; piece.ends
Text, JSON Lines, JSON, CSV, TSV, Parquet; alone, compressed (gzip, bzip2, xz, zstd), or inside zip and tar
archives, which are read in place and never unpacked. One pass holds one piece of one document,
whatever the size of the corpus; passing again gives the same pieces. Knows nothing of tokens.
"""

import bz2
import csv
import glob
import gzip
import io
import lzma
import os
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PureWindowsPath
from tarfile import HeaderError, ReadError
from typing import IO, Any, BinaryIO, cast

from nanogpt.config import UserError, require
from nanogpt.documents import Piece, Report
from nanogpt.records import RECORD_READERS, Source, missing, read_text, reason, spooled

BOMB_RATIO, BOMB_BYTES = 200, 1 << 26
"""What expands more often than this, to more than this, is no text."""

DEPTH = 4
"""Archives inside archives."""


@dataclass(frozen=True)
class Corpus:
    """Documents in files, in order.

    text_field: which field of a record is its text; dots lead into nested ones.
    """

    files: tuple[Path, ...]
    text_field: str = "text"

    @property
    def size(self) -> int:
        """Bytes of the files on the disk."""
        return sum(path.stat().st_size for path in self.files)

    def pieces(self, report: Report, advance: Callable[[int], object] = int) -> Iterator[Piece]:
        """Every document, piece by piece.

        advance: called with the number of bytes read from the disk since the last call.
        Errors: UserError if the only file there is cannot be read; of several, such a one is reported.
        """
        for path in self.files:
            source = partial(self.pieces_of, path, report, advance)
            yield from source() if len(self.files) == 1 else reporting(source(), str(path), report)

    def pieces_of(self, path: Path, report: Report, advance: Callable[[int], object]) -> Iterator[Piece]:
        """The documents in a file. Errors: UserError if it cannot be read."""
        try:
            with open(path, "rb", buffering=0) as raw:
                file = cast(BinaryIO, io.BufferedReader(Counted(raw, advance), 1 << 18))
                yield from read(Source(file, str(path), str(path), self.text_field, report))
        except OSError as error:
            raise UserError(f"--input_file {path} cannot be read: {error.strerror or error}") from error


def find(names: Sequence[str]) -> tuple[Path, ...]:
    """The files that are meant by files, folders and globs, in that order; inside each by name, each once.

    Errors: UserError if one is missing or holds no files.
    """
    found: dict[str, Path] = {}
    for name in names:
        path = Path(name)
        try:
            there = path.exists()
        except OSError as error:
            raise UserError(f"--input_file {name} cannot be read: {error.strerror}") from error
        matches = [path] if there else [Path(match) for match in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207 - absolute ones too

        require(bool(matches), f"--input_file {name} does not exist: check the path")
        require(
            all(match.is_file() or match.is_dir() for match in matches),
            f"--input_file {name} is no file: pipe what comes out of it into --input_file -",
        )
        files = [file for match in matches for file in (walk(match) if match.is_dir() else [match])]
        require(bool(files), f"--input_file {name} is a folder without files: give another one")
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return tuple(found.values())


def walk(folder: Path) -> Iterator[Path]:
    """The files in a folder and its folders, by name, hidden ones left out; a loop of links ends."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(place, name)
            if not name.startswith(".") and path.is_file():  # neither a broken link nor a pipe
                yield path


def reporting(pieces: Iterator[Piece], name: str, report: Report) -> Iterator[Piece]:
    """The pieces of one of several files: if it fails, that is reported, and its last document ends there."""
    open_document = False
    try:
        for piece in pieces:
            open_document = not piece.ends
            yield piece
    except UserError as error:
        if report.strict:
            raise
        report.reject(name, str(error).removeprefix(f"--input_file {name} "))
    if open_document:
        yield Piece(b"", True)


def read(source: Source) -> Iterator[Piece]:
    """The documents in a file, whatever it is.

    Errors: UserError if it is damaged, or not what its name says.
    """
    with refusals(source.name):
        yield from READERS.get(Path(source.kind).suffix.lower(), read_text)(source)


@contextmanager
def refusals(name: str) -> Generator[None]:
    """Put the name of a file before what is wrong with it. Errors: UserError, also if it is damaged."""
    try:
        yield
    except UserError as error:
        message = str(error)
        if message.startswith((name, "--input_file")) or "--strict" in message:
            raise
        raise UserError(f"--input_file {name} {message}") from error
    except Exception as error:
        if not is_damage(error):
            raise
        raise UserError(f"--input_file {name} is damaged: {reason(error)}") from error


# Archives


def unpacked(source: Source, file: io.RawIOBase, kind: str) -> Source:
    """What a compressed file holds. Errors: UserError if it is compressed over and over."""
    require(source.depth < DEPTH, f"has archives inside archives, more than {DEPTH} deep: unpack it first")
    buffered = cast(BinaryIO, io.BufferedReader(file, 1 << 18))
    return replace(source, file=buffered, kind=kind, depth=source.depth + 1)


def read_member(
    source: Source, name: str, packed: int, opener: Callable[[], IO[bytes] | None]
) -> Iterator[Piece]:
    """The documents in a file of an archive, of `packed` bytes there; if it is damaged, that is reported."""
    whole_name = f"{source.name}/{name}"

    def pieces() -> Iterator[Piece]:
        """Open it only when its turn has come."""
        with refusals(whole_name), cast(IO[bytes], opener()) as stream:
            bounded = Bounded(cast(BinaryIO, stream), partial(int, packed))
            yield from read(replace(unpacked(source, bounded, name), name=whole_name))

    return reporting(pieces(), whole_name, source.report)


def read_compressed(opener: Callable[[BinaryIO], BinaryIO], source: Source) -> Iterator[Piece]:
    """What is inside a compressed file."""
    counted = Counted(source.file, int)
    stream = Bounded(opener(cast(BinaryIO, io.BufferedReader(counted))), lambda: counted.taken)
    path = Path(source.kind)
    kind = path.with_suffix(".tar" if path.suffix.lower() in TAR_SHORTS else "")
    yield from read(unpacked(source, stream, str(kind)))


def read_zip(source: Source) -> Iterator[Piece]:
    """The files in a zip archive, in its order."""
    with spooled(source.file) as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if not member.is_dir() and is_inside(source, member.filename):
                opener = partial(archive.open, member)
                yield from read_member(source, member.filename, member.compress_size, opener)


def read_tar(source: Source) -> Iterator[Piece]:
    """The files in a tar archive, in its order."""
    with tarfile.open(fileobj=source.file, mode="r|", tarinfo=Header) as archive:
        for member in archive:
            if member.isfile() and is_inside(source, member.name):  # no links, no devices
                opener = partial(archive.extractfile, member)
                yield from read_member(source, member.name, member.size, opener)


class Header(tarfile.TarInfo):
    """The header of a member of a tar archive. The library takes a damaged one for the end, silently."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> "Header":
        """The header at the archive's position. Errors: ReadError if it is damaged."""
        try:
            return super().fromtarfile(tarfile)
        except HeaderError as error:
            if type(error).__name__ in ("InvalidHeaderError", "TruncatedHeaderError"):
                raise ReadError(f"a header at byte {tarfile.offset:,}: {error}") from error
            raise


def is_inside(source: Source, name: str) -> bool:
    """Whether a member is to be read: not hidden, and not named as if it lay outside the archive."""
    path = PureWindowsPath(name)  # which knows drives and both kinds of slashes
    if ".." in path.parts or path.anchor:
        source.report.reject(f"{source.name}/{name}", "a path that leads out of the archive: refused")
        return False
    return not any(part.startswith(".") for part in path.parts)


def unzstd(file: BinaryIO) -> BinaryIO:
    """A stream out of zstd frames. Errors: UserError if the library is not installed."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ModuleNotFoundError as error:
        raise missing("backports.zstd") from error
    return cast(BinaryIO, zstd.ZstdFile(file))


def is_damage(error: Exception) -> bool:
    """Whether the reader of an archive gave up on its bytes (and not the disk on the file)."""
    known = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, csv.Error)
    of_library = type(error).__module__.partition(".")[0] in ("backports", "compression", "pyarrow")
    of_file = isinstance(error, OSError) and error.errno is None
    return of_file or of_library or isinstance(error, (*known, RuntimeError, UnicodeDecodeError))


class Counted(io.RawIOBase):
    """A file that tells how much of it has been read."""

    def __init__(self, file: io.RawIOBase | BinaryIO, advance: Callable[[int], object]) -> None:
        self.file, self.advance, self.taken = file, advance, 0

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
        """Read into `buffer`, and count."""
        size = cast(io.RawIOBase, self.file).readinto(buffer) or 0
        self.taken += size
        self.advance(size)
        return size


class Bounded(io.RawIOBase):
    """A decompressed stream that refuses to expand without end.

    packed: how many compressed bytes went into it so far.
    """

    def __init__(self, file: BinaryIO, packed: Callable[[], int]) -> None:
        self.file, self.packed, self.given = file, packed, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Read into `buffer`. Errors: UserError if it is a decompression bomb."""
        data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        self.given += len(data)
        require(
            self.given <= BOMB_BYTES or self.given <= BOMB_RATIO * self.packed(),
            f"expands to more than {BOMB_RATIO} times its size: refused, as a decompression bomb",
        )
        return len(data)


TAR_SHORTS = (".tgz", ".tbz2", ".txz", ".tzst")


def ungzip(file: BinaryIO) -> BinaryIO:
    """A stream out of a gzip file."""
    return cast(BinaryIO, gzip.GzipFile(fileobj=file))


def unbzip(file: BinaryIO) -> BinaryIO:
    """A stream out of a bzip2 file."""
    return cast(BinaryIO, bz2.BZ2File(file))


def unxz(file: BinaryIO) -> BinaryIO:
    """A stream out of an xz file."""
    return cast(BinaryIO, lzma.LZMAFile(file))


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

READERS: dict[str, Callable[[Source], Iterator[Piece]]] = {
    **RECORD_READERS,
    **{suffix: partial(read_compressed, opener) for suffix, opener in DECOMPRESSORS.items()},
    ".zip": read_zip,
    ".tar": read_tar,
}
