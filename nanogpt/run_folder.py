"""The folder of a run: what is in it, who may write to it, and how an earlier run is kept.

Use:    folder = RunFolder(Path("out")); with folder.locked(): folder.set_aside(); ...
Holds:  ckpt.pt (best), last.pt (newest; with --parallel fsdp its tensors are in parts/),
        metrics.jsonl, loss.png, runs/ (TensorBoard),
        previous/1, previous/2, ... (earlier runs, moved there when a new one starts).
"""

import contextlib
import shutil
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from nanogpt import parts
from nanogpt.checkpoint import Checkpoint, load, peek
from nanogpt.config import TrainConfig, UserError, require
from nanogpt.world import ALONE, World

RUN_BY_RUN = {"resume": False, "overwrite": False, "out_dir": "out", "data_dir": "data"}
"""Settings of one invocation: a run that goes on may have others, and nobody need be told."""


class RunFolder:
    """Paths of the files of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "ckpt.pt"
        self.last = path / "last.pt"
        self.parts = path / "parts"
        self.metrics = path / "metrics.jsonl"
        self.plot = path / "loss.png"
        self.runs = path / "runs"
        self.job = path / ".job"

    @contextlib.contextmanager
    def locked(self) -> Generator[None]:
        """Own the folder for the length of the block; the lock goes with the process, however it ends.

        Errors: UserError if another training owns it, or if it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock", timeout=0)
            lock.acquire()
        except Timeout as error:
            raise UserError(f"another training is writing to {self.path}: use another --out_dir") from error
        except OSError as error:
            raise UserError(
                f"--out_dir {self.path} cannot be written ({error.strerror}): give another"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def newest(
        self, report: Callable[[str], None], world: World = ALONE, *, whole: bool = True
    ) -> Checkpoint:
        """The valid checkpoint with the most steps; damaged ones are reported and passed over.

        whole: with all its tensors. Else those that lie in parts are only verified, by all processes
        together.
        Errors: UserError if there is none.
        """
        found: list[Checkpoint] = []
        damaged = False
        for path in (self.last, self.best):
            if path.is_file():
                try:
                    found.append(load(path, whole=whole))
                    if found[-1].parts:
                        verify_parts(path, found[-1], world)
                except UserError as error:
                    damaged = True
                    found = [checkpoint for checkpoint in found if not checkpoint.parts]
                    report(f"{error}: passing it over")
        require(
            bool(found),
            f"no checkpoint to resume in {self.path}: start without --resume, or check --out_dir"
            if not damaged
            else f"no checkpoint in {self.path} is whole: start without --resume, which keeps what is there",
        )
        newest = max(found, key=lambda checkpoint: int(checkpoint.progress["step"]))
        if damaged:
            report(f"Going on from step {newest.progress['step']} instead")
        return newest

    def saved_config(self) -> TrainConfig | None:
        """The settings of the run, read quickly and unverified; None if there is none to read."""
        for path in (self.last, self.best):
            with contextlib.suppress(Exception):  # a damaged file is reported by `newest`
                return peek(path)[0]
        return None

    def holds(self, config: TrainConfig, job: str, *, restarted: bool) -> bool:
        """Whether the folder has a checkpoint of this very training, which a cluster has started again.

        That is one with the same settings, left by this job unfinished; or, if the job says that it has been
        restarted, by whomever. job: its name, "" if it has none.
        """
        try:
            saved, step = peek(self.last)
            own = bool(job) and self.job.read_text() == job and step < config.max_iters
        except Exception:  # none, or damaged: `newest` looks more closely if asked to resume
            return False
        return (own or restarted) and replace(saved, **RUN_BY_RUN) == replace(config, **RUN_BY_RUN)

    def drop_parts(self, *, but: Path | None) -> None:
        """Delete the parts of all checkpoints but the one that has its own in the folder `but`."""
        for path in self.parts.glob("*"):
            if path != but:
                shutil.rmtree(path, ignore_errors=True)

    def set_aside(self, *, delete: bool = False) -> Path | None:
        """Make room for a new run: move an earlier one to previous/<number>, or delete it.

        Returns where it went, None if there was none or it was deleted.
        """
        belongings = (self.last, self.best, self.parts, self.metrics, self.plot, self.runs)
        present = [path for path in belongings if path.exists()]
        if delete:
            for path in present:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            return None
        if not present:
            return None
        archive = self.path / "previous"
        numbers = [int(path.name) for path in archive.glob("*") if path.name.isdecimal()]
        target = archive / str(max(numbers, default=0) + 1)
        target.mkdir(parents=True)
        for path in present:
            path.rename(target / path.name)
        return target


def verify_parts(path: Path, saved: Checkpoint, world: World) -> None:
    """Verify the parts of the checkpoint at `path`, each process a share of them.

    Errors: UserError, on all processes, if one of them is damaged.
    """
    names = sorted(saved.parts)[world.rank :: world.size]
    with world.together():
        parts.verify(path.parent, {name: saved.parts[name] for name in names})
