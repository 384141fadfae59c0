"""A lock on a folder: one program at a time writes to it.

Example: with lock(folder, "another training is writing to out: use another --out_dir") as folder_lock: ...
         folder_lock.confirm()    before writing what could damage the files of another process
         if is_locked(folder): print("a training is running")
The operating system holds the lock (flock) and releases it when the process ends, however it ends. The file
.lock is locked and, where possible, the folder too, so that deleting .lock lets nobody in. On a file system
without locks (Google Drive, sshfs, some NFS and FUSE), a file .owner names the process, with a warning.
"""

import contextlib
import errno
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from nanogpt.errors import UserError, require
from nanogpt.storage.files import make_folder, warn_unsupported
from nanogpt.terminal.console import warn

LOCK_HELD_ERRORS = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK}
"""Error numbers for a lock that another process holds."""

NO_LOCKS_ERRORS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF}
"""Error numbers of a file system without locks."""

POLL_SECONDS = 0.05
"""Seconds between attempts to take a lock that another process holds."""

LOOK_SECONDS = 0.25
"""How long a lock that is held is tried for: `is_locked` may hold it for an instant."""

START_TIME_TOLERANCE = 2.0
"""Seconds by which two readings of the start time of one process may differ."""


class BusyError(Exception):
    """Another process holds the lock."""


class NoLocksError(Exception):
    """The file system has no locks."""


class FolderLock:
    """The lock on a folder that this process takes with `acquire` and gives back with `release`."""

    def __init__(self, folder: Path, busy: str) -> None:
        self.folder, self.busy_message = folder, busy
        self.path = folder / ".lock"
        self.file_descriptor = self.folder_descriptor = -1
        self.windows_lock: FileLock | None = None
        self.owner_file: Path | None = None
        self.lost = False

    def acquire(self) -> None:
        """Take the lock. Raises: BusyError if another process holds it; OSError if it cannot be written."""
        if sys.platform == "win32":
            self.windows_lock = FileLock(self.path)
            try:
                self.windows_lock.acquire(timeout=LOOK_SECONDS)
            except Timeout as error:
                raise BusyError from error
            return
        with contextlib.suppress(NoLocksError, OSError):  # NFS locks only files that are open for writing
            self.folder_descriptor = open_locked(self.folder, os.O_RDONLY)
        try:
            self.file_descriptor = open_locked(self.path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
        except NoLocksError:
            self.owner_file = write_owner_file(self.folder)
            warn_unsupported(
                self.folder, "has no locks", "only programs on this machine are kept out; start no other"
            )

    def release(self) -> None:
        """Release the lock."""
        if self.windows_lock:
            self.windows_lock.release()
        if self.owner_file:
            with contextlib.suppress(OSError):
                self.owner_file.unlink(missing_ok=True)
        for descriptor in (self.file_descriptor, self.folder_descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self.file_descriptor = self.folder_descriptor = -1
        self.windows_lock = self.owner_file = None

    def confirm(self) -> None:
        """Check that the lock is still held; take it again if .lock or the whole folder was deleted.

        Raises: UserError if another program has taken it in the meantime.
        """
        if self.file_descriptor < 0 and not self.lost:
            return
        whole = self.folder_descriptor < 0 or is_open_path(self.folder_descriptor, self.folder)
        if not self.lost and whole and is_open_path(self.file_descriptor, self.path):
            return
        self.release()
        try:
            require(not self.lost, "")
            make_folder(self.folder)
            self.acquire()
        except (BusyError, UserError) as error:
            self.release()
            self.lost = True
            raise UserError(
                f"{self.path} was deleted, and another program has taken {self.folder}: nothing of this one "
                "is saved there any more"
            ) from error
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        warn(f"{self.path} was deleted while it was in use: made again")


@contextlib.contextmanager
def lock(folder: Path, busy: str, *, wait: float = 0.0) -> Generator[FolderLock]:
    """Hold the lock on a folder, which is created if it is missing, while the block runs.

    wait: seconds to wait for another process to release it.
    Raises: UserError(busy) if another process holds it; OSError if the folder cannot be written.
    """
    make_folder(folder)
    folder_lock, end = FolderLock(folder, busy), time.monotonic() + wait
    while True:
        try:
            folder_lock.acquire()
            break
        except BusyError as error:
            folder_lock.release()
            if time.monotonic() >= end:
                raise UserError(busy) from error
            time.sleep(POLL_SECONDS)
            folder_lock = FolderLock(folder, busy)
        except BaseException:
            folder_lock.release()
            raise
    try:
        yield folder_lock
    finally:
        folder_lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a program holds the lock on a folder. Creates nothing; False if that cannot be told."""
    path, owner = folder / ".lock", folder / ".owner"
    if sys.platform == "win32":
        try:
            if path.is_file():
                FileLock(path).acquire(timeout=0).lock.release()
        except (Timeout, OSError) as error:
            return isinstance(error, Timeout)
        return False
    if owner.is_file() and is_owner_alive(owner):
        return True
    try:
        os.close(open_locked(path, os.O_RDONLY | os.O_NONBLOCK, shared=True))
    except BusyError:
        return True
    except (NoLocksError, OSError, UserError):
        return False
    return False


def open_locked(path: Path, flags: int, *, shared: bool = False) -> int:
    """Open and lock a file or folder. shared: as flock.

    Raises: BusyError, NoLocksError, OSError; UserError for a device.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        kind = os.fstat(descriptor).st_mode
        require(stat.S_ISREG(kind) or stat.S_ISDIR(kind), f"{path} is not a file: delete it")
        flock(descriptor, shared=shared)
    except OSError as error:
        os.close(descriptor)
        if error.errno in LOCK_HELD_ERRORS:
            raise BusyError from error
        if error.errno in NO_LOCKS_ERRORS:
            raise NoLocksError from error
        raise
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def flock(descriptor: int, *, shared: bool) -> None:
    """Lock an open file or folder: alone, or only against those who want it alone (shared).

    A lock that another holds is tried for LOOK_SECONDS; a shared one once. Raises: OSError.
    """
    import fcntl

    end = time.monotonic() + LOOK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in LOCK_HELD_ERRORS or shared or time.monotonic() > end:
                raise
        time.sleep(0.01)


def is_open_path(descriptor: int, path: Path) -> bool:
    """Whether a path still leads to an open file or folder; True if that cannot be told."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
    except OSError:
        return True


def write_owner_file(folder: Path) -> Path:
    """Create .owner, which names this process. Raises: BusyError, OSError."""
    path = folder / ".owner"
    if os.path.lexists(path):
        if is_owner_alive(path):
            raise BusyError
        path.unlink(missing_ok=True)
    try:
        with open(path, "x", encoding="utf-8") as file:
            json.dump(
                {"machine": socket.gethostname(), "process": os.getpid(), "start": process_start_time()}, file
            )
    except FileExistsError as error:
        raise BusyError from error
    return path


def process_start_time(process: int | None = None) -> float:
    """Start time of a process (None: this one), in seconds. Raises: psutil.Error if there is none."""
    import psutil

    return psutil.Process(process).create_time()


def is_owner_alive(owner_file: Path) -> bool:
    """Whether the process that .owner names runs on this machine."""
    import psutil

    try:
        require(owner_file.is_file(), f"{owner_file} is not a file: delete it")
        owner = cast(dict[str, Any], json.loads(owner_file.read_text("utf-8")))
        here = owner["machine"] == socket.gethostname()
        return (
            here
            and abs(process_start_time(int(owner["process"])) - float(owner["start"])) < START_TIME_TOLERANCE
        )
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError, psutil.Error):
        return False
