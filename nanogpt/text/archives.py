"""The documents in one file, plain, compressed or an archive: its suffix says what it is.

Example: for chunk in read_file(source): ...
Compressed files (gzip, bzip2, xz, zstd) and archives (zip, tar) are read in place and never unpacked to the
disk. A damaged or hostile file is refused in one line.
"""

import csv
import io
import lzma
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PureWindowsPath
from tarfile import HeaderError, ReadError
from typing import IO, BinaryIO, cast

from nanogpt.errors import UserError, first_line, require
from nanogpt.text.compressed import DECOMPRESSORS, BombGuard, CountingReader, refuse_bomb
from nanogpt.text.documents import Chunk, SkipReport, one_line
from nanogpt.text.formats import Reader, read_document
from nanogpt.text.records import Source, seekable_copy

TAR_SUFFIXES = (".tgz", ".tbz2", ".txz", ".tzst")

MAX_DEPTH = 4
"""How deep archives may be nested."""

MAX_LINK_BYTES = 1 << 12
"""Bytes of a link's target that are read."""

DAMAGE_LIBRARIES = ("backports", "compression", "lxml", "pyarrow", "xml")
"""Libraries whose errors mean damaged content."""

SYSTEM_FILE_PREFIXES = (".DS_Store", ".localized", "._")
"""Beginnings of the names of hidden files that a system writes by itself."""


def skip_on_error(chunks: Iterator[Chunk], name: str, report: SkipReport) -> Iterator[Chunk]:
    """The chunks of one of several files. An error is reported, and the open document ends there."""
    open_document = False
    try:
        for chunk in chunks:
            open_document = not chunk.ends
            yield chunk
    except UserError as error:
        if report.strict:
            raise
        report.reject(name, str(error).removeprefix(f"--input_file {name} "))
    if open_document:
        yield Chunk(b"", True)


def read_file(source: Source) -> Iterator[Chunk]:
    """The documents in a file of any format.

    Raises: UserError if it is damaged, or not what its suffix says.
    """
    with errors_with_name(source.name):
        yield from CONTAINERS.get(Path(source.file_name).suffix.lower(), read_document)(source)


@contextmanager
def errors_with_name(name: str) -> Generator[None]:
    """Put the name of the file in front of an error's message. Raises: UserError, also for damage."""
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
        raise UserError(f"--input_file {name} is damaged: {first_line(error)}") from error


def nested_source(source: Source, file: io.RawIOBase, file_name: str) -> Source:
    """The source inside a compressed file. Raises: UserError if archives are nested too deep."""
    require(
        source.depth < MAX_DEPTH, f"has archives inside archives, more than {MAX_DEPTH} deep: unpack it first"
    )
    buffered = cast(BinaryIO, io.BufferedReader(file, 1 << 18))
    return replace(source, file=buffered, file_name=file_name, depth=source.depth + 1)


def read_member(
    source: Source, name: str, packed: int, unpacked: int, opener: Callable[[], IO[bytes] | None]
) -> Iterator[Chunk]:
    """The documents in a member of an archive. Damage is reported.

    packed: its bytes there. unpacked: how many it says it has. What says that it is a bomb is not opened;
    what says less than the truth is stopped where that shows.
    """
    whole_name = f"{source.name}/{name}"

    def chunks() -> Iterator[Chunk]:
        """Open the member and read it: only when the first chunk is asked for."""
        with errors_with_name(whole_name):
            refuse_bomb(unpacked, packed)
        with errors_with_name(whole_name), cast(IO[bytes], opener()) as stream:
            bounded = BombGuard(cast(BinaryIO, stream), partial(int, packed))
            yield from read_file(replace(nested_source(source, bounded, name), name=whole_name))

    return skip_on_error(chunks(), whole_name, source.report)


def read_compressed(opener: Callable[[BinaryIO], BinaryIO], source: Source) -> Iterator[Chunk]:
    """The documents in a compressed file."""
    counted = CountingReader(source.file, int)
    stream = BombGuard(opener(cast(BinaryIO, io.BufferedReader(counted))), lambda: counted.bytes_read)
    path = Path(source.file_name)
    inside = path.with_suffix(".tar" if path.suffix.lower() in TAR_SUFFIXES else "")
    yield from read_file(nested_source(source, stream, str(inside)))


def read_zip(source: Source) -> Iterator[Chunk]:
    """The documents in a zip archive, in its order."""
    hidden = HiddenFiles()
    with seekable_copy(source.file) as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.is_dir() or not is_wanted_member(source, member.filename, hidden):
                continue
            opener = partial(archive.open, member)
            if stat.S_ISLNK(member.external_attr >> 16):
                with errors_with_name(f"{source.name}/{member.filename}"), opener() as link:
                    report_link(source, member.filename, link.read(MAX_LINK_BYTES).decode("utf-8", "replace"))
            else:
                yield from read_member(
                    source, member.filename, member.compress_size, member.file_size, opener
                )
    source.report.notes += hidden.notes(source.name)


def read_tar(source: Source) -> Iterator[Chunk]:
    """The documents in a tar archive, or in several that were joined, in their order."""
    hidden = HiddenFiles()
    with tarfile.open(fileobj=source.file, mode="r|", tarinfo=CheckedTarInfo, ignore_zeros=True) as archive:
        for member in archive:
            if member.isdir() or not is_wanted_member(source, member.name, hidden):
                continue
            if member.isfile():
                opener = partial(archive.extractfile, member)
                yield from read_member(source, member.name, member.size, member.size, opener)
            elif member.issym():
                report_link(source, member.name, member.linkname)
            elif not member.islnk():  # a hard link: its text has been read under the other name
                source.report.reject(f"{source.name}/{member.name}", "a device or a pipe, not a file")
    source.report.notes += hidden.notes(source.name)


def report_link(source: Source, name: str, target: str) -> None:
    """Report a link that leads out of its archive. Other links lead to members, which are read anyway."""
    resolved = PureWindowsPath(posixpath.normpath(posixpath.join(posixpath.dirname(name), target)))
    if ".." in resolved.parts or resolved.anchor:
        source.report.reject(f"{source.name}/{name}", f"a link that leads out of the archive, to {target}")


@dataclass
class HiddenFiles:
    """Hidden files and folders that are left out. number: how many; first: the name of the first."""

    number: int = 0
    first: str = ""

    def add(self, name: str) -> None:
        """Count a hidden file, unless a system writes such files by itself."""
        if not PureWindowsPath(name).name.startswith(SYSTEM_FILE_PREFIXES):
            self.number += 1
            self.first = self.first or name

    def notes(self, archive: str = "") -> tuple[str, ...]:
        """A line on how many were left out, if any."""
        where = f"{archive}: " if archive else ""
        line = f"{where}hidden files and folders left out: {self.number:,}, the first: {self.first}"
        return (one_line(line),) if self.number else ()


class CheckedTarInfo(tarfile.TarInfo):
    """The header of a tar member. tarfile itself takes a damaged header for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> "CheckedTarInfo":
        """The header at the archive's position. Raises: ReadError if it is damaged."""
        try:
            return super().fromtarfile(tarfile)
        except HeaderError as error:
            if type(error).__name__ in ("InvalidHeaderError", "TruncatedHeaderError"):
                raise ReadError(f"a header at byte {tarfile.offset:,}: {error}") from error
            raise


def is_wanted_member(source: Source, name: str, hidden: HiddenFiles) -> bool:
    """Whether to read a member: it is not hidden, and its path stays inside the archive."""
    path = PureWindowsPath(name)  # understands drives and both kinds of slashes
    if ".." in path.parts or path.anchor:
        source.report.reject(f"{source.name}/{name}", "a path that leads out of the archive: refused")
        return False
    if any(part.startswith(".") for part in path.parts):
        hidden.add(name)
        return False
    return True


def is_damage(error: Exception) -> bool:
    """Whether an error means damaged content, not a disk or a file that cannot be read."""
    known = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, csv.Error)
    of_library = type(error).__module__.partition(".")[0] in DAMAGE_LIBRARIES
    of_file = isinstance(error, OSError) and error.errno is None
    return of_file or of_library or isinstance(error, (*known, RuntimeError, UnicodeDecodeError))


CONTAINERS: dict[str, Reader] = {
    **{suffix: partial(read_compressed, opener) for suffix, opener in DECOMPRESSORS.items()},
    ".zip": read_zip,
    ".tar": read_tar,
}
"""Readers of compressed files and of archives by suffix. Any other file is read by formats.py."""
