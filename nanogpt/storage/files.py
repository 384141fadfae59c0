"""Atomic and durable writes of files, their SHA-256, downloads, and the user's own folders.

Example: with atomic_write(path) as file: file.write(data)
         with atomic_output(path) as temporary: library.save(temporary)      # a file, or a folder of files
The bytes go to a temporary file beside `path`, which is synced to the disk and then renamed to `path`: until
that instant the old file is untouched. Some file systems (Google Drive, sshfs, SMB, some NFS and FUSE) cannot
sync a file or a folder: a warning says so once, and writing goes on without.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Collection, Generator
from pathlib import Path
from typing import BinaryIO, Literal

from nanogpt.errors import UserError, require
from nanogpt.terminal.console import progress_bar, warn

TEMPORARY_SUFFIX = ".part"

REPLACED_SUFFIX = ".replaced"
"""Suffix of a folder that is being replaced: two renames are needed, and a kill between them leaves it."""

UNSUPPORTED_ERRORS = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EBADF,
    errno.ENOTTY,
    errno.EROFS,
}
"""Error numbers of a file system that does not support a call."""

FILE_IN_USE_ERRORS = {errno.EACCES, errno.EPERM, errno.EBUSY, errno.ETXTBSY}
"""Error numbers of Windows and SMB for a rename over a file that a reader or a virus scanner has open."""

RETRY_DELAYS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Seconds between attempts to rename."""

CONNECT_SECONDS, READ_SECONDS = 5, 15
"""How long a download waits for a connection, and for the next bytes."""

warned: set[tuple[str, str]] = set()
"""Folders and the warnings that were printed for them."""


@contextlib.contextmanager
def atomic_write(path: Path) -> Generator[BinaryIO]:
    """Write a file atomically: the open binary file becomes `path` when the block ends without an error.

    Raises: UserError if the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        make_folder(path.parent)
        temporary.unlink(missing_ok=True)  # never write into a pipe or through a link
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            fsync(file.fileno(), path.parent)
        rename(temporary, path)
        fsync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # torch.save turns a full disk into a RuntimeError, raised while the OSError was handled.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror or cause}") from error


@contextlib.contextmanager
def atomic_output(path: Path, folders: Collection[str] = ()) -> Generator[Path]:
    """Yield a temporary path: the file or folder made there becomes `path` when the block ends.

    For libraries that open files themselves. A folder has files, and folders of files with the names in
    `folders`. What was at `path` is replaced.
    Raises: UserError if it cannot be written or the disk is full.
    """
    temporary = hidden(path, TEMPORARY_SUFFIX)
    try:
        make_folder(path.parent)
        remove(temporary, folders)
        yield temporary
        inner = [*temporary.rglob("*")]
        for file in (file for file in (*inner, temporary) if not file.is_dir()):
            with open(file, "rb+") as opened:
                fsync(opened.fileno(), path.parent)
        for folder in (folder for folder in (*inner, temporary) if folder.is_dir()):
            fsync_folder(folder)
        if temporary.is_dir():
            replace_folder(temporary, path, folders)
        else:
            rename(temporary, path)
        fsync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError, UserError):
            remove(temporary, folders)
        if not isinstance(error, OSError):
            raise
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def hidden(path: Path, suffix: str) -> Path:
    """A name beside `path` that nobody else gives to a file or folder: what a kill has left there may go."""
    return path.with_name(f".{path.name}{suffix}")


def replace_folder(new: Path, path: Path, folders: Collection[str] = ()) -> None:
    """Rename a folder to `path`; a folder that is there goes first. Raises: OSError."""
    replaced = hidden(path, REPLACED_SUFFIX)
    if os.path.lexists(path):
        remove(replaced, folders)
        rename(path, replaced)
    try:
        rename(new, path)
    except BaseException:
        if os.path.lexists(replaced):
            rename(replaced, path)
        raise
    remove(replaced, folders)


def remove(path: Path, folders: Collection[str] = ()) -> None:
    """Remove a file, a link, or a folder, if it exists: with its files, and its folders of these names.

    Raises: OSError; UserError if it is a folder with other folders, which is no output of ours.
    """
    if path.is_dir() and not path.is_symlink():
        entries = sorted(path.iterdir(), key=Path.is_file)  # folders first, which may be refused
        known = all(entry.name in folders for entry in entries if entry.is_dir())
        require(known, f"the folder {path} is in the way: move it away")
        for entry in entries:
            remove(entry)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, atomically. Raises: UserError as atomic_write does."""
    with atomic_write(target) as file, open(source, "rb") as original:
        shutil.copyfileobj(original, file, 1 << 20)


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder, replacing a file called `target`.

    Retries for some seconds while another program has that file open, which Windows and SMB forbid.
    Raises: OSError.
    """
    for pause in RETRY_DELAYS:
        try:
            os.replace(source, target)
            return
        except OSError as error:
            if error.errno not in FILE_IN_USE_ERRORS or target.is_dir():
                raise
        time.sleep(pause)
    os.replace(source, target)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, durably: each survives a power cut. Raises: OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync_folder(path.parent)


def fsync(descriptor: int, folder: Path) -> None:
    """Sync an open file in `folder` to the disk, if the file system can. Raises: OSError."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED_ERRORS:
            raise
        warn_unsupported(folder, "cannot sync a file", "a power cut may damage what was just saved")


def fsync_folder(folder: Path) -> None:
    """Sync a folder, so that a rename in it survives a power cut, if the file system can.

    Windows needs no such call. Raises: OSError if the disk is broken or full.
    """
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED_ERRORS | {errno.EACCES, errno.EPERM, errno.EISDIR}:
            raise
        warn_unsupported(folder, "cannot sync a folder", "a power cut may undo the last save")


def warn_unsupported(folder: Path, problem: str, consequence: str) -> None:
    """Warn, once for each folder, of a protection that its file system does not give."""
    if (key := (str(folder), problem)) not in warned:
        warned.add(key)
        warn(f"The file system of {folder} {problem}: {consequence}")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def download(url: str) -> bytes:
    """Download the body at `url`, with a progress bar. Raises: OSError if it cannot be reached."""
    import requests

    with requests.get(url, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)) as response:
        response.raise_for_status()
        size = int(response.headers.get("content-length", 0)) or None
        body = bytearray()
        with progress_bar("Downloading", size_in_bytes=True) as bar:
            task = bar.add_task("", total=size, detail="")
            for block in response.iter_content(1 << 16):
                body += block
                bar.advance(task, len(block))
    return bytes(body)


def user_folder(kind: Literal["state", "cache"]) -> Path:
    """The user's folder for what this program remembers (XDG Base Directory Specification).

    Raises: OSError if the user has no home.
    """
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else f"XDG_{kind.upper()}_HOME", "")
    if Path(base).is_absolute():
        return Path(base) / "nanogpt"
    try:
        home = Path.home()
    except RuntimeError as error:  # a user without a home
        raise OSError(str(error)) from error
    return home / {"state": ".local/state", "cache": ".cache"}[kind] / "nanogpt"
