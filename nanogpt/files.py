"""Writing files so that they cannot be half-written or lost.

Use:    with replacing(path) as file: file.write(data)
The bytes go to a temporary name beside `path`, are synced to the disk, and only then take the
name `path`: whatever happens before that instant, the file that was there is untouched.
"""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

from nanogpt.config import UserError

TEMPORARY_SUFFIX = ".part"


@contextlib.contextmanager
def replacing(path: Path) -> Generator[BinaryIO]:
    """Open a binary file that becomes `path` when the block ends, and never if it raises.

    Errors: UserError if the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # torch.save turns a full disk into a RuntimeError, raised while the OSError was handled.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror or cause}") from error


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut (POSIX; Windows does it by itself)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
