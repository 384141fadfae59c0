"""A new set of files takes the place of an old one: a kill at any instant leaves one of the two.

Use:    write into fresh(folder); commit(folder, names, stale)      in prepare.py, which owns the folder
        finish_what_was_begun(folder)                               in whoever opens it
The new files are written and synced in a folder inside the folder. Then a journal that lists them is, and
with it the new set is there: whoever finds the journal moves the files that have not been moved yet. So the
old set is whole until the journal is, and from then on the new one can always be finished.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from nanogpt.errors import UserError, require
from nanogpt.files import atomic_write, fsync_folder, rename
from nanogpt.locking import lock

WORK, NEW, JOURNAL = "preparing", "new", "swap.json"
"""The folder of an unfinished preparation, in it the folder of the new set, and the journal."""

LAST = "vocab.pt"
"""The file that is moved last, since it names the others."""

NAME = re.compile(r"(train|val)(-\d{5,})?\.pt|vocab\.pt")
"""The files that a set is made of."""

WAIT_SECONDS = 10.0
"""How long to wait for a program that is at it."""


def fresh(folder: Path) -> Path:
    """The empty folder for the files of the new set. Errors: UserError if it cannot be made."""
    new = folder / WORK / NEW
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {new}: {error.strerror or error}") from error
    return new


def commit(folder: Path, names: Iterable[str], stale: Iterable[str]) -> None:
    """Replace the set in the folder by the files of these names in its new folder; delete the stale ones.

    Errors: UserError if that is not possible; then the old set is there, or the journal is.
    """
    names, stale = sorted(names), sorted(stale)
    for name in (*names, *stale):
        require(not (folder / name).is_dir(), f"{folder / name} is a folder: move it away")
    with atomic_write(folder / WORK / JOURNAL) as file:
        file.write(json.dumps({"names": names, "stale": stale}).encode())
    finish(folder)


def journal(folder: Path) -> dict[str, list[str]] | None:
    """The journal of a swap that was cut short, if there is one.

    A link in place of the folder is not followed: what it leads to is not ours to move.
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
        if not all(isinstance(name, str) and NAME.fullmatch(name) for name in names):
            return None
    return lists


def finish(folder: Path) -> bool:
    """Move what a journal lists and has not been moved, for the owner of the folder. False: no journal.

    Errors: UserError if the folder cannot be written; the journal stays, and with it the new set.
    """
    found = journal(folder)
    if found is None:
        return False
    new = folder / WORK / NEW
    try:
        for name in sorted(found["names"], key=lambda name: name == LAST):
            with contextlib.suppress(FileNotFoundError):  # moved before the cut
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


def finish_what_was_begun(folder: Path) -> None:
    """Move what a swap that was cut short has left, before the folder is read.

    Errors: UserError if another program is at it for long, or if the folder cannot be written.
    """
    if journal(folder) is None:
        return
    busy = f"another program is writing to {folder}: wait until it is done"
    try:
        with lock(folder, busy, wait=WAIT_SECONDS):
            finish(folder)
    except OSError:  # it cannot be written, which `finish` then says
        finish(folder)
