"""The run folder (--out_dir): its files, its lock, the checkpoint to resume, the archive of earlier runs.

Example: folder = RunFolder(Path("out")); with folder.locked(): folder.archive_previous(); ...
Files:   ckpt.pt (best), last.pt (newest), shards/ (tensors of last.pt with --parallel fsdp),
         checkpoints/ (kept.py), metrics.jsonl, loss.png, runs/ (TensorBoard), adapter/ (LoRA, for peft),
         previous/1, previous/2, ... (earlier runs, moved there when a new one starts).
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Generator
from dataclasses import fields
from pathlib import Path

from nanogpt.checkpoint import sharded
from nanogpt.checkpoint.format import Checkpoint, load_checkpoint, peek
from nanogpt.config import TrainConfig
from nanogpt.distributed.world import ALONE, World
from nanogpt.errors import UserError, require
from nanogpt.storage.files import fsync_folder, make_folder, rename
from nanogpt.storage.locking import FolderLock, lock
from nanogpt.terminal.console import warn

PER_COMMAND_SETTINGS = {"resume": False, "overwrite": False, "out_dir": "out", "data_dir": "data"}
"""Settings of a command, not of a training. A resumed run may change them, so they are not compared."""


class RunFolder:
    """Paths of a run's files, and the operations on the folder as a unit."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "ckpt.pt"
        self.last = path / "last.pt"
        self.shards = path / "shards"
        self.old_shards = path / "parts"
        """Folder of the shards in older versions."""
        self.kept = path / "checkpoints"
        """Folder of the kept checkpoints (kept.py)."""
        self.metrics = path / "metrics.jsonl"
        self.plot = path / "loss.png"
        self.runs = path / "runs"
        self.adapter = path / "adapter"
        self.job = path / ".job"
        self.moving = path / ".moving"
        """Temporary folder of an earlier run that is being moved to previous/."""
        self.owner: FolderLock | None = None
        """The lock that this process holds; None outside of `locked`."""
        self.resumed: Path | None = None
        """The file that `newest_valid` chose."""

    @contextlib.contextmanager
    def locked(self) -> Generator[None]:
        """Lock the folder for the block. The operating system releases the lock if the process dies.

        Raises: UserError if another training has locked it, or if it cannot be written.
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
        """Check that this process still has the lock. Raises: UserError if another training has taken it."""
        if self.owner:
            self.owner.confirm()

    def newest_valid(
        self, report: Callable[[str], None], world: World = ALONE, *, gather: bool = True
    ) -> Checkpoint:
        """Load the valid checkpoint with the most steps; damaged ones are reported and skipped.

        gather: also load the tensors of a sharded checkpoint; else its shards are only verified, some by each
        process.
        Raises: UserError if there is no valid checkpoint.
        """
        valid: list[tuple[Path, Checkpoint]] = []
        damaged = False
        for path in (self.last, self.best):
            if path.is_file():
                try:
                    saved = load_checkpoint(path, gather=gather)
                    if saved.shards:
                        verify_shards(path, saved, world)
                    valid.append((path, saved))
                except UserError as error:
                    damaged = True
                    report(f"{error}: passing it over")
        require(
            bool(valid),
            f"no checkpoint to resume in {self.path}: start without --resume, or check --out_dir"
            if not damaged
            else f"all checkpoints in {self.path} are damaged: start without --resume, which moves them to "
            f"{self.path / 'previous'}",
        )
        self.resumed, newest = max(valid, key=lambda file: int(file[1].progress["step"]))
        if damaged:
            report(f"Going on from step {newest.progress['step']} instead")
        return newest

    def saved_config(self) -> TrainConfig | None:
        """Read the settings of the run without verifying the file; None if no checkpoint can be read."""
        for name in (self.last.name, self.best.name):
            for folder in (self.path, self.moving):
                with contextlib.suppress(Exception):  # `newest_valid` reports a damaged file
                    return peek(folder / name)[0]
        return None

    def best_step(self) -> int | None:
        """Step of ckpt.pt; None if there is none, or it cannot be read."""
        with contextlib.suppress(Exception):  # `newest_valid` reports a damaged file
            return peek(self.best)[1]
        return None

    def is_restart_of(self, config: TrainConfig, job: str, *, restarted: bool) -> bool:
        """Whether a training is a restart of the one in this folder, so that it resumes without --resume.

        It is if the settings are the same and either torchrun restarted the processes, or a job of the same
        name left the training unfinished.
        job: name of torchrun's job; "": it has none. restarted: whether torchrun restarted the processes.
        """
        try:
            saved, step = peek(self.last)
            same_job = self.job.is_file() and self.job.read_text() == job and bool(job)
        except Exception:  # last.pt is missing or damaged; `newest_valid` reports it on --resume
            return False
        if not restarted and not (same_job and step < config.max_iters):
            return False
        return has_settings_of(saved, config)

    def delete_shards(self, *, keep: Path | None) -> None:
        """Delete the shards of all checkpoints, except the folder `keep`."""
        for path in (*self.shards.glob("*"), *self.old_shards.glob("*")):
            if path != keep:
                shutil.rmtree(path, ignore_errors=True)

    def run_files(self, folder: Path) -> list[Path]:
        """The files and folders of a run in `folder`, in the order to move them: last.pt comes last."""
        names = (self.runs, self.adapter, self.kept, self.plot, self.metrics, self.shards, self.old_shards)
        return [
            path for name in (*names, self.best, self.last) if os.path.lexists(path := folder / name.name)
        ]

    def archive_previous(self, *, delete: bool = False) -> Path | None:
        """Archive an earlier run in previous/<number>, or delete it, to start a new run in the folder.

        Its files are first moved to a temporary folder, which is then renamed. If the process is killed in
        between, `undo_move` moves them back.
        Returns the folder in previous/; None if there was no run, or it was deleted.
        """
        files = self.run_files(self.path)
        deleting = self.path / ".deleting"
        shutil.rmtree(deleting, ignore_errors=True)
        if not files:
            return None
        self.moving.mkdir(exist_ok=True)
        for path in files:
            rename(path, self.moving / path.name)
        fsync_folder(self.moving)
        if delete:
            rename(self.moving, deleting)
            shutil.rmtree(deleting)
            return None
        return self.finish_move()

    def finish_move(self) -> Path:
        """Rename the temporary folder to the next number in previous/."""
        archive = self.path / "previous"
        make_folder(archive)
        numbers = [int(path.name) for path in archive.glob("*") if path.name.isdecimal()]
        target = archive / str(max(numbers, default=0) + 1)
        rename(self.moving, target)
        fsync_folder(archive)
        fsync_folder(self.path)
        return target

    def undo_move(self) -> None:
        """Undo an interrupted `archive_previous`: then the run can be resumed, or archived again."""
        if not self.moving.is_dir():
            return
        moved = self.run_files(self.moving)
        if any(os.path.lexists(self.path / path.name) for path in moved):  # a new run has started since
            warn(f"Files of two runs are in {self.path}: one run is now in {self.finish_move()}")
            return
        for path in reversed(moved):
            rename(path, self.path / path.name)
        with contextlib.suppress(OSError):  # the folder is not empty: somebody put other files there
            self.moving.rmdir()
        fsync_folder(self.path)


def has_settings_of(saved: TrainConfig, config: TrainConfig) -> bool:
    """Whether a run with the settings `saved` is the training that `config` describes."""
    names = {item.name for item in fields(config)} - PER_COMMAND_SETTINGS.keys()
    if config.minutes:  # the others were chosen by it
        names &= {"minutes", *config.fixed}
    return all(getattr(saved, name) == getattr(config, name) for name in names)


def verify_shards(path: Path, saved: Checkpoint, world: World) -> None:
    """Verify the shards of the checkpoint at `path`, split over the processes.

    Raises: UserError, on all processes, if a shard is missing or damaged.
    """
    names = sorted(saved.shards)[world.rank :: world.size]
    with world.raise_on_all():
        sharded.verify(path.parent, {name: saved.shards[name] for name in names})
