"""Writing files so that they cannot be half-written or lost.

Use:    with atomic_write(path) as file: file.write(data)
The bytes go to a temporary name beside `path`, are synced to the disk, and only then take the
name `path`: whatever happens before that instant, the file that was there is untouched.
What a file system cannot do (Google Drive, sshfs, SMB, some NFS and FUSE know no sync of a folder or of a
file) is done without, and said once.
"""

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

from nanogpt.console import warn
from nanogpt.errors import UserError

TEMPORARY_SUFFIX = ".part"

UNSUPPORTED_ERRORS = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EBADF,
    errno.ENOTTY,
    errno.EROFS,
}
"""How a file system says that it has no such call."""

FILE_IN_USE_ERRORS = {errno.EACCES, errno.EPERM, errno.EBUSY, errno.ETXTBSY}
"""How Windows and SMB refuse to rename over a file that a reader or a virus scanner has open."""

RETRY_DELAYS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Seconds between tries to rename."""

warned: set[tuple[str, str]] = set()
"""What has been said of which folder."""


@contextlib.contextmanager
def atomic_write(path: Path) -> Generator[BinaryIO]:
    """Open a binary file that becomes `path` when the block ends, and never if it raises.

    Errors: UserError if the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        make_folder(path.parent)
        temporary.unlink(missing_ok=True)  # a pipe, or a link to elsewhere, must not be written to
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


def rename(source: Path, target: Path) -> None:
    """Give a file or folder the name `target`, over a file that has it.

    Where others may have that file open and this forbids it, try again for some seconds. Errors: OSError.
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
    """Make a folder and those above it, each of which survives a power cut. Errors: OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync_folder(path.parent)


def fsync(descriptor: int, folder: Path) -> None:
    """Bring what was written to an open file in `folder` to the disk, if that can be. Errors: OSError."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED_ERRORS:
            raise
        warn_unsupported(folder, "cannot sync a file", "a power cut may damage what was just saved")


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, if the file system can (Windows does it by itself).

    Errors: OSError if the disk is broken or full.
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


def warn_unsupported(folder: Path, what: str, consequence: str) -> None:
    """Say, once for each folder, which protection its file system does not give."""
    if (key := (str(folder), what)) not in warned:
        warned.add(key)
        warn(f"The file system of {folder} {what}: {consequence}")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
