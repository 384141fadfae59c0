"""A resumable download: the bytes of an origin become a file, which is there only when it is whole.

Example: path = download(HttpOrigin(url, shown), folder)
The folder holds `part`, the bytes so far, and record.json, which says what they are. A lost connection or a
stall is followed by another attempt: it goes on behind the last byte if the origin still has the same
content, and starts over if not. After a kill, the next download goes on too. Knows no protocol.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from nanogpt.errors import UserError, require
from nanogpt.settings import Settings
from nanogpt.storage.files import atomic_write, fsync, fsync_folder, make_folder, rename
from nanogpt.terminal.console import warn
from nanogpt.units import GIB, duration

SAVE_SECONDS = 5.0
"""Seconds between syncs of the bytes so far: a kill loses no more."""

PART, RECORD = "part", "record.json"
"""Names of the bytes so far and of their record."""

MAX_NAME_CHARS = 60
"""Longest name of a downloaded file."""

UNSAFE = re.compile(r"^\.|[^\w.+-]")
"""What a name may not have: a dot that hides the file, and characters that lead elsewhere."""

Show = Callable[[int, int | None], object]
"""A function that shows the progress: bytes so far, and bytes of the whole file, if that is known."""


@dataclass(frozen=True)
class Patience:
    """How long a download waits.

    connect, stall: seconds for a connection, and for the next bytes. attempts: how many may fail in a row
    without a new byte. pause: seconds after the first of them; each further one doubles it, up to
    longest_pause. longest_wait: seconds that a server may ask to wait.
    """

    connect: float = 10.0
    stall: float = 30.0
    attempts: int = 6
    pause: float = 1.0
    longest_pause: float = 60.0
    longest_wait: float = 300.0
    sleep: Callable[[float], object] = time.sleep


PATIENCE = Patience()


class LostConnectionError(Exception):
    """An attempt failed, and the next one may not. wait: seconds that the origin asks to wait."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


class ChangedError(LostConnectionError):
    """The origin has other content now: the bytes so far are useless."""

    def __init__(self, why: str = "changed during the download") -> None:
        super().__init__(why)


class Answer(NamedTuple):
    """The bytes of a file from `start` on, in blocks.

    size: bytes of the whole file, None if unknown. version: identifies its content; "" if nothing does.
    suffix: a suffix that the file's name gets, such as .gz if its bytes come compressed.
    """

    start: int
    size: int | None
    version: str
    suffix: str
    blocks: Iterator[bytes]


class Origin(Protocol):
    """The place where a file comes from.

    shown: its address for messages, without secrets. path: ends in the name of the file. key: what no other
    file has.
    """

    shown: str
    path: str
    key: str

    def open(self, start: int, version: str) -> AbstractContextManager[Answer]:
        """Ask for the bytes from `start` on if the content is still `version`, else for all of them.

        Raises: LostConnectionError, also from the blocks; UserError if another attempt is useless.
        """
        ...


@dataclass(frozen=True)
class Record(Settings):
    """What the bytes so far are. file: the name that they get. saved: how many are safely on the disk."""

    address: str
    file: str
    version: str = ""
    size: int | None = None
    saved: int = 0
    whole: bool = False


class Part:
    """The bytes of a file so far, in a folder, with their record. size: how many they are."""

    def __init__(self, folder: Path, origin: Origin) -> None:
        self.folder, self.origin = folder, origin
        self.path, self.record_path = folder / PART, folder / RECORD
        self.record = read_record(self.record_path) or self.new_record()
        self.size = self.record.saved

    def new_record(self) -> Record:
        """The record of no bytes."""
        return Record(self.origin.shown, safe_name(self.origin.path))

    def save_record(self, **changes: Any) -> None:
        """Change fields of the record, and save it. Raises: UserError if the disk is full."""
        self.record = replace(self.record, **changes)
        with atomic_write(self.record_path) as file:
            file.write(json.dumps(asdict(self.record)).encode())

    def finished(self) -> Path | None:
        """The path of the whole file, None if it is not there."""
        path = self.folder / self.record.file
        if self.record.whole and not path.exists() and is_file_of(self.path, self.size):
            rename(self.path, path)  # a kill came before it
        return path if self.record.whole and path.is_file() else None

    def reopen(self) -> None:
        """Drop the bytes that a kill has left behind the last sync, or all if those before are not there."""
        if self.record.whole or not is_file_of(self.path, self.size):
            self.clear()
        else:
            os.truncate(self.path, self.size)

    def clear(self) -> None:
        """Drop all bytes."""
        self.path.unlink(missing_ok=True)
        self.record, self.size = self.new_record(), 0

    def begin(self, answer: Answer) -> None:
        """Take over what an answer says. Raises: ChangedError; UserError if the disk has no room."""
        if not answer.start:
            self.clear()
            file = self.record.file + answer.suffix
            self.save_record(file=file, version=answer.version, size=answer.size)  # before the first byte
        else:
            sizes = {size for size in (answer.size, self.record.size) if size is not None}
            if answer.version != self.record.version or len(sizes) > 1:
                raise ChangedError
            self.record = replace(self.record, size=max(sizes, default=None))
        free, needed = shutil.disk_usage(self.folder).free, (self.record.size or 0) - self.size
        require(
            needed <= free,
            f"--input_file {self.origin.shown} needs {needed / GIB:,.2f} GiB in {self.folder}, where "
            f"{free / GIB:,.2f} GiB are free: make room, or use another disk",
        )

    @contextmanager
    def appending(self) -> Generator[BinaryIO]:
        """Open the file to append to it. It is saved at the end, however that comes."""
        with open(self.path, "ab") as file:
            try:
                yield file
            finally:
                self.save(file)

    def save(self, file: BinaryIO) -> None:
        """Sync the bytes to the disk, then the record that counts them."""
        file.flush()
        fsync(file.fileno(), self.folder)
        self.save_record(saved=self.size)

    def is_whole(self) -> bool:
        """Whether all bytes are there, as far as their number is known."""
        return self.size == self.record.size

    def finish(self) -> Path:
        """Give the file its name, and return its path."""
        self.save_record(whole=True)
        path = self.folder / self.record.file
        rename(self.path, path)
        fsync_folder(self.folder)
        return path

    def describe(self) -> str:
        """How many bytes are there, for messages."""
        return (
            f"{self.size:,} bytes"
            if self.record.size is None
            else f"{self.size:,} of {self.record.size:,} bytes"
        )


def is_file_of(path: Path, size: int) -> bool:
    """Whether a path is a file, no link, of at least `size` bytes."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size >= size


def read_record(path: Path) -> Record | None:
    """The saved record; None if there is none, or no valid one."""
    if not path.is_file():
        return None
    try:
        record = Record(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError, UserError):
        return None
    safe = record.file not in ("", PART, RECORD) and not UNSAFE.search(record.file)
    return record if safe and record.saved >= 0 else None


def safe_name(path: str) -> str:
    """The end of a path as the name of a file that is not hidden and leads nowhere else."""
    name = UNSAFE.sub("_", path.rstrip("/").rpartition("/")[2][-MAX_NAME_CHARS:])
    return f"text_{name}" if name in ("", PART, RECORD) else name


def downloaded(origin: Origin, folder: Path) -> Path | None:
    """The path of a file that has been downloaded into a folder of its own; None if it has not been."""
    return Part(folder, origin).finished()


def download(
    origin: Origin, folder: Path, show: Show = lambda done, size: None, patience: Patience = PATIENCE
) -> Path:
    """Download a file into a folder of its own, unless it is there already. Returns its path.

    Raises: UserError if it cannot be had or does not fit on the disk. What has arrived stays.
    """
    part = None
    try:
        make_folder(folder)
        part = Part(folder, origin)
        if (path := part.finished()) is not None:
            return path
        part.reopen()
        failures, furthest = 0, part.size
        while not part.is_whole():
            try:
                attempt(part, show)
                break
            except LostConnectionError as error:
                failures = 1 if part.size > furthest else failures + 1
                furthest = max(furthest, part.size)
                pause(error, part, failures, patience)
        return part.finish()
    except OSError as error:
        if part is not None and part.record.size is None:  # perhaps it never ends
            part.path.unlink(missing_ok=True)
        raise UserError(f"cannot write {error.filename or folder}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        if part is not None:
            warn(f"{origin.shown}: {part.describe()} are here: the same command goes on behind them")
        raise


def attempt(part: Part, show: Show) -> None:
    """Ask the origin for the bytes that are missing, and append them.

    Raises: LostConnectionError if they do not all come; UserError if more come than there should be.
    """
    try:
        with part.origin.open(part.size, part.record.version) as answer:
            part.begin(answer)
            size = part.record.size
            with part.appending() as file:
                saved = time.monotonic()
                for block in answer.blocks:
                    file.write(block)
                    part.size += len(block)
                    show(part.size, size)
                    if size is not None and part.size > size:
                        break
                    if time.monotonic() - saved > SAVE_SECONDS:
                        part.save(file)
                        saved = time.monotonic()
    except ChangedError:
        part.clear()
        raise
    if size is not None and part.size < size:
        raise LostConnectionError("ended early")
    if size is not None and part.size > size:
        part.clear()
        raise UserError(f"--input_file {part.origin.shown} sends more than the {size:,} bytes it announces")


def pause(error: LostConnectionError, part: Part, failures: int, patience: Patience) -> None:
    """Wait before the next attempt. Raises: UserError if there have been enough."""
    name, what = part.origin.shown, f"{error} after {part.describe()}" if part.size else str(error)
    again = "later the same command goes on there" if part.size else "try again later"
    require(failures < patience.attempts, f"--input_file {name} {what}, {failures} times in a row: {again}")
    asked = f"--input_file {name} {what}, and asks to wait {duration(error.wait)}: {again}"
    require(error.wait <= patience.longest_wait, asked)
    wait = max(error.wait, min(patience.pause * 2 ** (failures - 1), patience.longest_pause))
    warn(f"{name} {what}: next attempt in {duration(wait)}")
    patience.sleep(wait)
