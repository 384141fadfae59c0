"""A corpus: the documents in files, folders and globs, in any of the usual formats.

Example: corpus = find_corpus(["books/", "dump.jsonl.gz"], ReadOptions(text_field="body"))
         for chunk in corpus.chunks(SkipReport()): chunk.raw; chunk.ends
A pass holds one chunk of one document in memory, whatever the size of the corpus. Another pass gives the
same chunks. Files that cannot be read are reported. Knows nothing of tokens.
"""

import glob
import io
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from nanogpt.errors import UserError, require
from nanogpt.text.addresses import is_address, local_name
from nanogpt.text.archives import HiddenFiles, read_file, skip_on_error
from nanogpt.text.compressed import CountingReader
from nanogpt.text.documents import Chunk, SkipReport, one_line
from nanogpt.text.mail import MAIL_FOLDERS
from nanogpt.text.options import DEFAULT_OPTIONS, ReadOptions
from nanogpt.text.records import ReadProgress, Source

SPECIAL_FILES = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
"""Kinds of files that are not read, because reading them may never end."""

MAILDIR_FOLDERS = {"cur", "new", "tmp"}
"""The folders that make a Maildir. Its mail is in MAIL_FOLDERS; what else is there is a program's own."""

MAX_NAME_CHARS = 200
"""Longest name in a message: somebody may give a whole text instead of its file."""

PROC_FOLDER = "/proc"
"""A folder whose files have no size, and a different text at each reading."""


@dataclass(frozen=True)
class Corpus:
    """Documents in files, in order.

    unreadable: files and folders that cannot be read, each with the reason. notes: lines on what is left out
    on purpose. addresses: for messages, where files come from that were downloaded.
    """

    files: tuple[Path, ...]
    options: ReadOptions = DEFAULT_OPTIONS
    unreadable: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    addresses: Mapping[Path, str] = field(default_factory=dict[Path, str], hash=False)

    @property
    def size(self) -> int:
        """Bytes of the files on the disk."""
        return sum(size_of(path) for path in self.files)

    def chunks(self, report: SkipReport, advance: Callable[[int], object] = int) -> Iterator[Chunk]:
        """All chunks of all documents.

        advance: called with the number of bytes of the files that are done since the last call.
        Raises: UserError if the only file cannot be read. Of several files, it is reported.
        """
        report.notes += self.notes
        for where, why in self.unreadable:
            report.reject(where, why)
        for path in self.files:
            source, name = partial(self.read_chunks, path, report, advance), self.name_of(path)
            yield from source() if len(self.files) == 1 else skip_on_error(source(), name, report)

    def read_chunks(
        self, path: Path, report: SkipReport, advance: Callable[[int], object]
    ) -> Iterator[Chunk]:
        """The documents in a file. Raises: UserError if it cannot be read."""
        name, progress = self.name_of(path), ReadProgress(advance)
        try:
            with open(path, "rb", buffering=0, opener=open_file) as raw:
                file = cast(BinaryIO, io.BufferedReader(CountingReader(raw, progress.add), 1 << 18))
                yield from read_file(Source(file, name, str(path), report, self.options, progress))
        except OSError as error:
            raise UserError(f"--input_file {name} cannot be read: {error.strerror or error}") from error

    def name_of(self, path: Path) -> str:
        """The name of a file in messages: its path, or the address that it was downloaded from."""
        return self.addresses.get(path, str(path))


def size_of(path: Path) -> int:
    """Bytes of a file on the disk, 0 if it does not exist."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def open_file(path: str, flags: int) -> int:
    """Open a file, but no pipe or device that could block. Raises: OSError."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if (kind := special_file_kind(os.fstat(descriptor))) is not None:
        os.close(descriptor)
        raise OSError(f"it is {kind}")
    return descriptor


def special_file_kind(status: os.stat_result) -> str | None:
    """The kind of a special file (a pipe, a device); None for a file or a folder."""
    if stat.S_ISREG(status.st_mode) and status.st_size == 0 and status.st_dev == system_device():
        return f"a file of the system in {PROC_FOLDER}"
    return SPECIAL_FILES.get(stat.S_IFMT(status.st_mode))


def system_device() -> int | None:
    """The device number of PROC_FOLDER, None if there is no such folder."""
    try:
        return Path(PROC_FOLDER).stat().st_dev
    except OSError:
        return None


def find_corpus(
    names: Sequence[str], options: ReadOptions = DEFAULT_OPTIONS, downloads: Path | None = None
) -> Corpus:
    """The corpus of files, folders, globs and addresses, in order. Folders are sorted; a file comes once.

    downloads: the folder for what addresses give; None: in the user's cache.
    Raises: UserError if one is missing or has no files, or cannot be downloaded.
    """
    search = FileSearch()
    for name in names:
        if is_address(name):
            search.add_address(name, downloads)
        else:
            search.add(local_name(name))
    return Corpus(
        tuple(search.files.values()),
        options,
        tuple(search.unreadable.items()),
        search.hidden.notes(),
        search.addresses,
    )


@dataclass
class FileSearch:
    """A search for files.

    files: the files found, by real path. unreadable: reasons, by path. hidden: hidden files left out.
    addresses: of downloaded files, by path.
    """

    files: dict[str, Path] = field(default_factory=dict[str, Path])
    unreadable: dict[str, str] = field(default_factory=dict[str, str])
    hidden: HiddenFiles = field(default_factory=HiddenFiles)
    addresses: dict[Path, str] = field(default_factory=dict[Path, str])

    def add_address(self, address: str, downloads: Path | None) -> None:
        """Download the files at an address. Raises: UserError if there are none, or one cannot be had."""
        from nanogpt.text.remote import fetch  # it loads what speaks HTTP

        for shown, path in fetch(address, downloads):
            self.files.setdefault(os.path.realpath(path), path)
            self.addresses[path] = shown

    def add(self, name: str) -> None:
        """Find the files of a file name, a folder or a glob. Raises: UserError if there are none."""
        found: list[Path] = []
        lost_before = len(self.unreadable)
        for match in self.matches(name):
            if match.is_dir():
                found += self.walk(match)
            elif self.is_readable(match):
                found.append(match)
        for file in found:
            self.files.setdefault(os.path.realpath(file), file)
        for where, why in list(self.unreadable.items())[lost_before:]:
            require(bool(found), f"--input_file {name} holds nothing that can be read: {where} is {why}")
        require(bool(found), f"--input_file {name} is a folder without files: give another one")

    def matches(self, name: str) -> list[Path]:
        """The files and folders that a name or glob matches. Raises: UserError if there are none."""
        require(bool(name), "--input_file is empty: give a file")
        shown = one_line(name)[:MAX_NAME_CHARS]
        try:
            kind = special_file_kind(Path(name).stat())
            advice = f"is {kind}, no file: pipe its output into --input_file -"
            require(kind is None, f"--input_file {shown} {advice}")
            return [Path(name)]
        except (FileNotFoundError, NotADirectoryError, ValueError):
            pass
        except OSError as error:
            if not glob.has_magic(name):
                raise UserError(f"--input_file {shown} cannot be read: {error.strerror}") from error
        require(not Path(name).is_symlink(), f"--input_file {shown} is a link to a file that is not there")
        matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207 - absolute ones too
        self.check_glob_folders(name)
        for where, why in self.unreadable.items() if not matches else ():
            raise UserError(f"--input_file {shown} finds nothing: {where} is {why}")
        require(bool(matches), f"--input_file {shown} does not exist: check the path")
        return matches

    def check_glob_folders(self, pattern: str) -> None:
        """Report the folders that a glob cannot read: glob itself skips them silently."""
        while glob.has_magic(pattern):
            head, tail = os.path.split(pattern)
            folders = glob.glob(head, recursive=True) if head else [os.curdir]  # noqa: PTH207
            for folder in filter(os.path.isdir, folders):
                self.check_folder(folder, "*" if head.endswith("**") else tail)
            pattern = head

    def check_folder(self, folder: str, name: str) -> None:
        """Report a folder that hides whether it has a name, or names that match a glob."""
        try:
            if glob.has_magic(name):
                os.scandir(folder).close()
            else:
                Path(folder, name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            self.add_unreadable_folder(error, folder)

    def add_unreadable_folder(self, error: OSError, folder: str = "") -> None:
        """Report a folder that cannot be read."""
        self.unreadable[str(error.filename or folder)] = (
            f"a folder that cannot be read: {error.strerror or error}"
        )

    def is_readable(self, path: Path) -> bool:
        """Whether a path is a file that can be opened. Anything else is reported."""
        try:
            why = special_file_kind(path.stat())
        except FileNotFoundError:
            why = "a link to a file that is not there"
        except OSError as error:
            why = f"a file that cannot be read: {error.strerror or error}"
        if why is not None:
            self.unreadable[str(path)] = why
        return why is None

    def walk(self, folder: Path) -> Iterator[Path]:
        """The files in a folder and its subfolders, by name, without hidden ones. Link loops end."""
        seen: set[str] = set()
        for parent, folders, files in os.walk(folder, onerror=self.add_unreadable_folder, followlinks=True):
            real = os.path.realpath(parent)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            if set(folders) >= MAILDIR_FOLDERS:  # a dot begins a mail folder there, such as .Sent
                folders[:] = sorted(name for name in folders if name in MAIL_FOLDERS or name.startswith("."))
                continue
            for name in (*folders, *files):
                if name.startswith("."):
                    self.hidden.add(str(Path(parent, name)))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                path = Path(parent, name)
                if not name.startswith(".") and self.is_readable(path):
                    yield path
