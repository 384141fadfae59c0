"""The folder of a run: what is in it, who may write to it, and how an earlier run is kept.

Use:    folder = RunFolder(Path("out")); with folder.locked(): folder.archive_previous(); ...
Holds:  ckpt.pt (best), last.pt (newest; with --parallel fsdp its tensors are in parts/),
        metrics.jsonl, loss.png, runs/ (TensorBoard),
        previous/1, previous/2, ... (earlier runs, moved there when a new one starts).
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

from nanogpt.checkpoint import sharded
from nanogpt.checkpoint.format import Checkpoint, load_checkpoint, peek
from nanogpt.config import TrainConfig
from nanogpt.console import warn
from nanogpt.distributed.world import ALONE, World
from nanogpt.errors import UserError, require
from nanogpt.files import fsync_folder, make_folder, rename
from nanogpt.locking import FolderLock, lock

RUN_BY_RUN = {"resume": False, "overwrite": False, "out_dir": "out", "data_dir": "data"}
"""Settings of one invocation: a run that goes on may have others, and nobody need be told."""


class RunFolder:
    """Paths of the files of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "ckpt.pt"
        self.last = path / "last.pt"
        self.shards = path / "shards"
        self.old_shards = path / "parts"
        """Where older versions put them."""
        self.metrics = path / "metrics.jsonl"
        self.plot = path / "loss.png"
        self.runs = path / "runs"
        self.job = path / ".job"
        self.moving = path / ".moving"
        """An earlier run on its way to previous/, or back."""
        self.owner: FolderLock | None = None
        """Whoever holds the folder in this process."""
        self.resumed: Path | None = None
        """The file that `newest` chose."""

    @contextlib.contextmanager
    def locked(self) -> Generator[None]:
        """Own the folder for the length of the block; the lock goes with the process, however it ends.

        Errors: UserError if another training owns it, or if it cannot be written.
        """
        try:
            with lock(
                self.path, f"another training is writing to {self.path}: use another --out_dir"
            ) as self.owner:
                self.undo_move()
                yield
        except OSError as error:
            if self.owner:
                raise
            raise UserError(
                f"--out_dir {self.path} cannot be written ({error.strerror}): give another"
            ) from error
        finally:
            self.owner = None

    def confirm(self) -> None:
        """Own the folder still. Errors: UserError if another training has taken it."""
        if self.owner:
            self.owner.confirm()

    def newest_valid(
        self, report: Callable[[str], None], world: World = ALONE, *, gather: bool = True
    ) -> Checkpoint:
        """The valid checkpoint with the most steps; damaged ones are reported and passed over.

        whole: with all its tensors. Else those that lie in parts are only verified, by all processes
        together.
        Errors: UserError if there is none.
        """
        found: list[tuple[Path, Checkpoint]] = []
        damaged = False
        for path in (self.last, self.best):
            if path.is_file():
                try:
                    saved = load_checkpoint(path, gather=gather)
                    if saved.shards:
                        verify_shards(path, saved, world)
                    found.append((path, saved))
                except UserError as error:
                    damaged = True
                    report(f"{error}: passing it over")
        require(
            bool(found),
            f"no checkpoint to resume in {self.path}: start without --resume, or check --out_dir"
            if not damaged
            else f"no checkpoint in {self.path} is whole: start without --resume, which keeps what is there",
        )
        self.resumed, newest = max(found, key=lambda one: int(one[1].progress["step"]))
        if damaged:
            report(f"Going on from step {newest.progress['step']} instead")
        return newest

    def saved_config(self) -> TrainConfig | None:
        """The settings of the run, read quickly and unverified; None if there is none to read."""
        for name in (self.last.name, self.best.name):
            for folder in (self.path, self.moving):
                with contextlib.suppress(Exception):  # a damaged file is reported by `newest`
                    return peek(folder / name)[0]
        return None

    def is_restart_of(self, config: TrainConfig, job: str, *, restarted: bool) -> bool:
        """Whether the folder has a checkpoint of this very training, which a cluster has started again.

        That is one with the same settings, left by this job unfinished; or, if the job says that it has been
        restarted, by whomever. job: its name, "" if it has none.
        """
        try:
            saved, step = peek(self.last)
            named = self.job.is_file() and self.job.read_text() == job
            own = bool(job) and named and step < config.max_iters
        except Exception:  # none, or damaged: `newest` looks more closely if asked to resume
            return False
        return (own or restarted) and replace(saved, **RUN_BY_RUN) == replace(config, **RUN_BY_RUN)

    def delete_shards(self, *, keep: Path | None) -> None:
        """Delete the shards of all checkpoints but those in the folder `keep`."""
        for path in (*self.shards.glob("*"), *self.old_shards.glob("*")):
            if path != keep:
                shutil.rmtree(path, ignore_errors=True)

    def belongings(self, folder: Path) -> list[Path]:
        """What there is of a run in a folder, what is resumed last."""
        names = (self.runs, self.plot, self.metrics, self.shards, self.old_shards, self.best, self.last)
        return [path for name in names if os.path.lexists(path := folder / name.name)]

    def archive_previous(self, *, delete: bool = False) -> Path | None:
        """Make room for a new run: move an earlier one to previous/<number>, or delete it.

        Its files are gathered in one folder, which then takes its name at once: killed at any moment, the run
        is whole in one place, or `undo_move` puts it back together.
        Returns where it went, None if there was none or it was deleted.
        """
        present = self.belongings(self.path)
        doomed = self.path / ".deleting"
        shutil.rmtree(doomed, ignore_errors=True)
        if not present:
            return None
        self.moving.mkdir(exist_ok=True)
        for path in present:
            rename(path, self.moving / path.name)
        fsync_folder(self.moving)
        if delete:
            rename(self.moving, doomed)
            shutil.rmtree(doomed)
            return None
        return self.number_the_move()

    def number_the_move(self) -> Path:
        """Give what has been gathered its place among the earlier runs."""
        archive = self.path / "previous"
        make_folder(archive)
        numbers = [int(path.name) for path in archive.glob("*") if path.name.isdecimal()]
        target = archive / str(max(numbers, default=0) + 1)
        rename(self.moving, target)
        fsync_folder(archive)
        fsync_folder(self.path)
        return target

    def undo_move(self) -> None:
        """Put an earlier run back whose move was cut short: it is resumed whole, or moved anew."""
        if not self.moving.is_dir():
            return
        moved = self.belongings(self.moving)
        if any(os.path.lexists(self.path / path.name) for path in moved):  # somebody has written both
            warn(f"Parts of two runs are in {self.path}: one of them is now in {self.number_the_move()}")
            return
        for path in reversed(moved):
            rename(path, self.path / path.name)
        with contextlib.suppress(OSError):  # what is not of a run stays there
            self.moving.rmdir()
        fsync_folder(self.path)


def verify_shards(path: Path, saved: Checkpoint, world: World) -> None:
    """Verify the parts of the checkpoint at `path`, each process a share of them.

    Errors: UserError, on all processes, if one of them is damaged.
    """
    names = sorted(saved.shards)[world.rank :: world.size]
    with world.raise_on_all():
        sharded.verify(path.parent, {name: saved.shards[name] for name in names})
