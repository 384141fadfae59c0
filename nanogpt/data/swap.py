"""Replace a data set by a new one, so that a kill at any instant leaves one of the two complete.

Example: new = make_new_folder(folder)               # write the new files there, then:
         replace_dataset(folder, names, stale)
         finish_interrupted_swap(folder)             # in every program that opens the folder
The new files are written and synced in a folder inside the data folder. Then a journal that lists them is
written. Until the journal exists, the old set is complete. From then on the new one is, since any program
that finds the journal moves the files that have not been moved yet.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from nanogpt.errors import UserError, require
from nanogpt.storage.files import atomic_write, fsync_folder, rename
from nanogpt.storage.locking import lock

WORK, NEW, JOURNAL = "preparing", "new", "swap.json"
"""The folder of an unfinished preparation; in it, the folder of the new set and the journal."""

VOCAB_FILE = "vocab.pt"
"""This file is moved last, since it lists the others."""

FILE_NAME = re.compile(r"(train|val)(_mask)?(-\d{5,})?\.pt|vocab\.pt")
"""The names of the files of a data set."""

WAIT_SECONDS = 10.0
"""How long to wait for another program that writes to the folder."""


def make_new_folder(folder: Path) -> Path:
    """Make an empty folder for the files of the new set. Raises: UserError if that fails."""
    new = folder / WORK / NEW
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {new}: {error.strerror or error}") from error
    return new


def replace_dataset(folder: Path, names: Iterable[str], stale: Iterable[str]) -> None:
    """Replace the data set in the folder by the files `names` in its new folder, and delete the stale files.

    Raises: UserError if that fails. Then the old set is still complete, or the journal exists.
    """
    names, stale = sorted(names), sorted(stale)
    for name in (*names, *stale):
        require(not (folder / name).is_dir(), f"{folder / name} is a folder: move it away")
    with atomic_write(folder / WORK / JOURNAL) as file:
        file.write(json.dumps({"names": names, "stale": stale}).encode())
    finish_swap(folder)


def read_journal(folder: Path) -> dict[str, list[str]] | None:
    """The journal of an interrupted swap; None if there is none.

    A link in place of the folder is not followed: its files are not ours to move.
    """
    path = folder / WORK / JOURNAL
    if path.parent.is_symlink() or path.is_symlink() or not path.is_file():
        return None
    try:
        found: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    lists = cast(dict[str, Any], found) if isinstance(found, dict) else {}
    for key in ("names", "stale"):
        values = lists.get(key)
        if not isinstance(values, list):
            return None
        names = cast(list[Any], values)
        if not all(isinstance(name, str) and FILE_NAME.fullmatch(name) for name in names):
            return None
    return lists


def finish_swap(folder: Path) -> bool:
    """Move the files that the journal lists. The caller holds the folder's lock. False: no journal.

    Raises: UserError if the folder cannot be written. The journal stays, and so does the new set.
    """
    found = read_journal(folder)
    if found is None:
        return False
    new = folder / WORK / NEW
    try:
        for name in sorted(found["names"], key=lambda name: name == VOCAB_FILE):
            with contextlib.suppress(FileNotFoundError):  # moved before the interruption
                rename(new / name, folder / name)
        for name in found["stale"]:
            (folder / name).unlink(missing_ok=True)
        fsync_folder(folder)
        (folder / WORK / JOURNAL).unlink(missing_ok=True)
        fsync_folder(folder / WORK)
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(
            f"cannot finish replacing the data set in {folder} ({why}): end the programs that use it, and "
            "see that it can be written; then run the command again"
        ) from error
    return True


def finish_interrupted_swap(folder: Path) -> None:
    """Finish a swap that was interrupted, before the folder is read.

    Raises: UserError if another program holds the lock for long, or if the folder cannot be written.
    """
    if read_journal(folder) is None:
        return
    busy = f"another program is writing to {folder}: wait until it is done"
    try:
        with lock(folder, busy, wait=WAIT_SECONDS):
            finish_swap(folder)
    except OSError:  # the folder cannot be written, and finish_swap says so
        finish_swap(folder)
