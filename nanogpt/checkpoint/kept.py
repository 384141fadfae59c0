"""Kept checkpoints: the models of some evaluations, spread over a training (--keep_checkpoints).

Example: save_checkpoint(kept_path(folder, 200), checkpoint); thin_out(folder, 10, best=200)
Files:   out/checkpoints/step-000200.pt, in the format of ckpt.pt (format.py), without optimizer state.
The first, the best and the newest are always among them. The others are about evenly spaced in the square
root of the step, so closer together at the start, where a model changes most. Which ones are kept depends
only on the evaluations, so a run that was killed and resumed has the same ones.
"""

import contextlib
import math
import re
from collections.abc import Iterable
from pathlib import Path

from nanogpt.errors import UserError
from nanogpt.storage.files import TEMPORARY_SUFFIX


def kept_path(folder: Path, step: int) -> Path:
    """The file of a step."""
    return folder / f"step-{step:06}.pt"


def kept_checkpoints(folder: Path) -> dict[int, Path]:
    """The kept checkpoints in a folder: step -> file, in the order of the steps. Other files are left out."""
    found: dict[int, Path] = {}
    for path in folder.glob("step-*.pt"):
        digits = re.fullmatch(r"step-([0-9]{6,18})\.pt", path.name)
        if digits and kept_path(folder, int(digits[1])) == path:
            found[int(digits[1])] = path
    return dict(sorted(found.items()))


def surplus(steps: Iterable[int], count: int, best: int | None = None) -> list[int]:
    """The steps to delete, one after the other, until `count` are left (at least 3).

    Each time it is the one whose neighbours are nearest to each other, in the square root of the step; never
    the first, the last, or `best`.
    """
    left, deleted = sorted(steps), list[int]()
    while len(left) > count:
        inner = [place for place in range(1, len(left) - 1) if left[place] != best]
        place = min(inner, key=lambda place: math.sqrt(left[place + 1]) - math.sqrt(left[place - 1]))
        deleted.append(left.pop(place))
    return deleted


def thin_out(folder: Path, count: int, best: int | None) -> None:
    """Delete kept checkpoints until `count` are left. If a file cannot be deleted, the next call tries again.

    best: step of the best evaluation.
    """
    found = kept_checkpoints(folder)
    for step in surplus(found, count, best):
        with contextlib.suppress(OSError):
            found[step].unlink(missing_ok=True)


def forget_after(folder: Path, step: int) -> None:
    """Delete the kept checkpoints of later steps, which will be done again, and leftovers of a kill."""
    later = [path for kept, path in kept_checkpoints(folder).items() if kept > step]
    for path in (*later, *folder.glob(f"step-*.pt{TEMPORARY_SUFFIX}")):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def refuse_kept(out_dir: Path) -> None:
    """Raise UserError if the run to resume is a folder of kept checkpoints, or one of them."""
    is_run = any((out_dir / name).is_file() for name in ("ckpt.pt", "last.pt"))
    folder = out_dir if out_dir.is_dir() else out_dir.parent
    found = list(kept_checkpoints(folder).values())
    if found and not is_run and out_dir in (folder, *found):
        start = out_dir if out_dir in found else found[-1]
        raise UserError(
            f"--resume cannot go on from {out_dir}: kept checkpoints have no optimizer state: give the run, "
            f"--out_dir {folder.parent}, or start a new one with --init_from {start}"
        )
