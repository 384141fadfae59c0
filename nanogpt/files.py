"""Writing files so that they cannot be half-written or lost.

Use:    with replacing(path) as file: file.write(data)
The bytes go to a temporary name beside `path`, are synced to the disk, and only then take the
name `path`: whatever happens before that instant, the file that was there is untouched.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nanogpt.config import UserError

TEMPORARY_SUFFIX = ".part"


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO]:
    """Open a binary file that becomes `path` when the block ends, and never if it raises.

    Errors: UserError if the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut (POSIX; Windows does it by itself)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
