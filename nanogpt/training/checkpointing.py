"""The Checkpointer: when and how a run is saved to its folder, and restored.

Example: state.checkpointer.save_last(state); state.checkpointer.restore(state, saved)
A save begins and, later, is finished. In between, a thread hashes and writes a copy of the state while the
training goes on; if memory has no room for a copy, the training waits. A checkpoint counts once it is in
place: a process that is killed before that resumes from the previous one.
checkpoint/format.py describes the files. ckpt.pt is always one file. With FSDP, last.pt is sharded
(checkpoint/sharded.py): every process writes its shards. At a best evaluation last.pt is a copy of ckpt.pt.
With --keep_checkpoints, an evaluation is also kept as a file without optimizer state (checkpoint/kept.py). It
is written first, so that no run resumes from a step whose kept checkpoint is missing; if that fails, the
training goes on.
"""

import math
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nanogpt.checkpoint import sharded
from nanogpt.checkpoint.format import Checkpoint, Progress, save_checkpoint, shards_folder
from nanogpt.checkpoint.kept import forget_after, kept_path, thin_out
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.checkpoint.validation import check_states
from nanogpt.distributed import parallelize
from nanogpt.distributed.dtensor import load_full_state, shard_optimizer_state
from nanogpt.distributed.world import World
from nanogpt.errors import UserError, require
from nanogpt.storage.files import atomic_write, copy_file, fsync_folder
from nanogpt.terminal.console import warn
from nanogpt.training.snapshot import header, named_tensors, saved_settings, take_snapshot
from nanogpt.training.state import TrainState

MAX_SAVE_FRACTION = 0.02
"""Largest fraction of the time for which saves may hold up the training: slow saves become rarer."""

MAX_STRETCH = 10
"""The interval between saves grows to at most this many times --save_seconds."""

BYTES_PER_SECOND = 3e8
"""Speed at which an ordinary disk takes a checkpoint, as long as none has been written."""

MIN_TIMED_BYTES = 10_000_000
"""Size of a file from which on the speed of writing it says something of others."""

Digests = dict[str, str]
"""Name of each file that a process has written into a folder of shards -> its SHA-256."""


@dataclass(frozen=True)
class PendingSave:
    """A save that has begun, on all processes at the same time."""

    state: TrainState
    header: Checkpoint
    """The state when the save began, without its tensors."""
    kept: "Future[Digests] | None"
    """The writing of the kept checkpoint, if this evaluation has one."""
    best: "Future[Digests] | None"
    """The writing of ckpt.pt, at a best evaluation."""
    last: "Future[Digests]"
    """The writing of last.pt or, with FSDP, of this process's shards."""
    folder: Path | None
    """Folder of the shards; None without FSDP."""

    @property
    def futures(self) -> "list[Future[Digests]]":
        """Everything that this process writes."""
        return [future for future in (self.kept, self.best, self.last) if future]


class Checkpointer:
    """Saves and restores a state. All processes call its methods together. Two saves never overlap."""

    def __init__(
        self, folder: RunFolder, world: World, before_save: Callable[[], object] = lambda: None
    ) -> None:
        """before_save: called on the first process before it writes, to make the metrics durable."""
        self.folder, self.world, self.before_save = folder, world, before_save
        self.thread = ThreadPoolExecutor(1, "save")
        self.pending: PendingSave | None = None
        self.saved_at = time.perf_counter()
        """When the newest save began."""
        self.bytes_per_second = BYTES_PER_SECOND
        """Speed at which the newest large file was written."""
        self.held_up = 0.0
        """Seconds for which the training has waited for the newest save."""
        self.saved_step: int | None = None
        """Step of the newest checkpoint that this process has written or read."""
        self.best_val_loss = math.inf
        """The validation loss of ckpt.pt."""
        self.best_step: int | None = None
        """Its step, if this process knows it."""
        self.last_progress: dict[str, Any] | None = None
        """The progress that last.pt holds, if this process knows it."""
        self.shards: Path | None = None
        """Folder of the shards of last.pt, if it is sharded: the next save must not write to it."""

    # --- save ---

    def save_last(self, state: TrainState, *, best: bool = False) -> None:
        """Begin to save last.pt and, at a best evaluation, ckpt.pt.

        A failure, now or later, is reported and the training goes on, with the best loss that ckpt.pt has.
        """
        if not attempt(lambda: self.begin_save(state, best=best)):
            state.progress.best_val_loss = self.best_val_loss

    def save(self, state: TrainState) -> None:
        """Save last.pt, and wait until it is in place. Raises: UserError if it cannot be written."""
        self.begin_save(state)
        self.finish_save()

    def save_final(self, state: TrainState) -> None:
        """Save last.pt at the end of the training, unless it is up to date. Raises: as `save`."""
        self.try_finish_save()
        if self.last_progress != asdict(state.progress):
            self.save(state)

    def begin_save(self, state: TrainState, *, best: bool = False) -> None:
        """Begin to save last.pt, and ckpt.pt too if `best`, after the save before is finished.

        Raises: UserError if the folder cannot be written.
        """
        self.try_finish_save()
        self.saved_at, self.held_up = time.perf_counter(), 0.0
        with self.count_hold_up():
            with self.world.raise_on_all():
                if self.world.is_first:
                    self.prepare_folder()
            kept = self.begin_kept(state)
            best_file = self.begin_file(state, self.folder.best) if best else None
            folder = self.new_shards_folder(state) if parallelize.is_sharded(state.model) else None
            if folder:
                last = sharded.begin_save(folder, named_tensors(state))
            elif best_file:
                last = self.begin_copy(best_file)
            else:
                last = self.begin_file(state, self.folder.last)
            self.pending = PendingSave(state, header(state), kept, best_file, last, folder)

    def prepare_folder(self) -> None:
        """Check that the folder is still this run's, and write what a checkpoint relies on."""
        self.folder.confirm()
        self.before_save()
        if self.world.job and not self.saved_step:
            with atomic_write(self.folder.job) as file:
                file.write(self.world.job.encode())

    def begin_kept(self, state: TrainState) -> "Future[Digests] | None":
        """Begin to write a kept checkpoint, if they are wanted and the model is new or just evaluated."""
        step = state.progress.step
        if not state.config.keep_checkpoints or state.progress.evaluated_at != step:  # both are 0 at first
            return None
        return self.begin_file(state, kept_path(self.folder.kept, step), model_only=True)

    def begin_file(self, state: TrainState, path: Path, *, model_only: bool = False) -> "Future[Digests]":
        """Begin to write a checkpoint in one file, on the first process. With FSDP it is gathered there."""
        if not self.world.is_first and not parallelize.is_sharded(state.model):
            return self.submit(Digests, in_background=False)
        snapshot = take_snapshot(state, model_only=model_only)

        def write() -> Digests:
            """Write the file once the tensors are copied."""
            if snapshot.ready:
                snapshot.ready.synchronize()
            began = time.perf_counter()
            save_checkpoint(path, snapshot.checkpoint)
            size = path.stat().st_size
            if size >= MIN_TIMED_BYTES:
                self.bytes_per_second = size / (time.perf_counter() - began)
            return {}

        return self.submit(write if self.world.is_first else Digests, in_background=snapshot.is_copied)

    def begin_copy(self, best_file: "Future[Digests]") -> "Future[Digests]":
        """Make last.pt a copy of ckpt.pt once that is written, on the first process.

        A hard link would be cheaper, but then damage to one would be damage to both.
        """

        def copy() -> Digests:
            """Copy the file, unless it could not be written."""
            best_file.result()
            copy_file(self.folder.best, self.folder.last)
            return {}

        return self.submit(copy if self.world.is_first else Digests, in_background=not best_file.done())

    def submit(self, work: Callable[[], Digests], *, in_background: bool) -> "Future[Digests]":
        """Queue work for the thread; wait for it unless in_background. A failure is the future's."""
        future = self.thread.submit(work)
        if not in_background:
            wait([future])
        return future

    def new_shards_folder(self, state: TrainState) -> Path:
        """The folder for the shards of the next last.pt, which is not that of the current one."""
        folder = self.folder.shards / str(state.progress.step)
        if folder == self.shards:
            folder = folder.with_name(f"{folder.name}-again")
        if self.world.is_first:
            self.folder.delete_shards(keep=self.shards)  # left by a killed process
        return folder

    def finish_save(self) -> None:
        """Wait for the save that has begun, if there is one, and complete it.

        Raises: UserError if a process could not write. Then the best loss is set back to that of ckpt.pt, and
        a save is due at once, since last.pt has to hold it.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        with self.count_hold_up():
            wait(pending.futures)
            try:
                self.complete(pending)
            except UserError:
                if pending.best and pending.state.progress.best_val_loss != self.best_val_loss:
                    pending.state.progress.best_val_loss, self.saved_at = self.best_val_loss, -math.inf
                if self.world.is_first and pending.folder:
                    self.folder.delete_shards(keep=self.shards)
                raise
            finally:
                self.finish_kept(pending)

    def finish_kept(self, pending: PendingSave) -> None:
        """Report a kept checkpoint that could not be written, and delete the surplus ones."""
        if pending.kept and self.world.is_first:
            attempt(pending.kept.result)
            thin_out(self.folder.kept, pending.state.config.keep_checkpoints, self.best_step)

    def complete(self, pending: PendingSave) -> None:
        """Complete a save that all processes have written. Raises: UserError if one of them could not."""
        progress = pending.header.progress
        if pending.best:
            with self.world.raise_on_all():
                pending.best.result()
            self.best_val_loss, self.saved_step = progress["best_val_loss"], int(progress["step"])
            self.best_step = self.saved_step
        with self.world.raise_on_all():
            digests = pending.last.result()
        if pending.folder:
            self.commit_shards(pending, pending.folder, digests)
        self.shards, self.last_progress, self.saved_step = pending.folder, progress, int(progress["step"])
        if self.world.is_first:
            self.folder.delete_shards(keep=pending.folder)

    def commit_shards(self, pending: PendingSave, folder: Path, digests: Digests) -> None:
        """Write last.pt, which lists the shards of all processes. Raises: UserError if that fails."""
        files = self.world.all_gather(list(digests.items()))
        with self.world.raise_on_all():
            if self.world.is_first:
                inside = folder.relative_to(self.folder.path)
                fsync_folder(folder)
                fsync_folder(self.folder.shards)
                named = {(inside / name).as_posix(): digest for name, digest in files}
                save_checkpoint(self.folder.last, replace(pending.header, shards=named))

    def try_finish_save(self) -> bool:
        """Like finish_save, but a failure is reported. Returns whether it worked."""
        return attempt(self.finish_save)

    def is_due(self, seconds: float) -> bool:
        """Whether the newest save began at least `seconds` ago, or longer if the training waited for it.

        Only the first process decides, since it writes most.
        """
        interval = min(max(seconds, self.held_up / MAX_SAVE_FRACTION), MAX_STRETCH * seconds)
        is_over = time.perf_counter() - self.saved_at >= interval
        return self.world.is_first and is_over and not self.is_writing

    @property
    def is_writing(self) -> bool:
        """Whether this process is still writing."""
        return self.pending is not None and not all(future.done() for future in self.pending.futures)

    @contextmanager
    def count_hold_up(self) -> Generator[None]:
        """Add the time of a block to `held_up`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.held_up += time.perf_counter() - start

    def close(self) -> None:
        """Wait for the file that this process is writing, but not for other processes: they may be dead."""
        self.thread.shutdown()

    # --- restore ---

    def restore(self, state: TrainState, saved: Checkpoint) -> None:
        """Put the run where the checkpoint is. Hyperparameters stay those of state.config.

        Raises: UserError if the checkpoint does not fit the state.
        """
        if saved.shards:
            self.shards = shards_folder(self.folder.last, saved.shards)
            states = load_shards(state, self.shards)
        else:
            try:
                states = load_tensors(state, saved)
            except UserError as error:
                raise UserError(f"the checkpoint in {self.folder.path} is malformed: {error}") from error
        for optimizer, moments in zip(state.optimizers, states, strict=True):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        if saved.scaler and state.scaler.is_enabled():
            state.scaler.load_state_dict(saved.scaler)
        state.progress = Progress(**saved.progress)
        self.saved_step, self.best_val_loss = state.progress.step, state.progress.best_val_loss
        if self.folder.resumed == self.folder.last and saved.config == saved_settings(state):
            self.last_progress = saved.progress  # nothing to save before something changes
        if self.world.is_first:
            self.restore_kept(state)

    def restore_kept(self, state: TrainState) -> None:
        """Keep the checkpoints that a run which never stopped would have."""
        self.best_step = self.folder.best_step()
        forget_after(self.folder.kept, state.progress.evaluated_at)
        if state.config.keep_checkpoints:
            thin_out(self.folder.kept, state.config.keep_checkpoints, self.best_step)


def attempt(write: Callable[[], object]) -> bool:
    """Call `write`, and report a failure. Returns whether it worked."""
    try:
        write()
    except UserError as error:
        warn(f"{error} (training goes on; what was saved before is whole; the next save tries again)")
        return False
    return True


def load_tensors(state: TrainState, saved: Checkpoint) -> list[dict[int, Any]]:
    """Load weights and their average from a checkpoint in one file. Returns the states of the optimizers.

    Raises: UserError if they do not fit the state.
    """
    check_states(state.optimizers, [optimizer["state"] for optimizer in saved.optimizers])
    check_scaler(state, saved)
    load_full_state(state.model, saved.model)
    if state.ema_model:
        load_full_state(state.ema_model, saved.average or saved.model)
    pairs = zip(state.optimizers, saved.optimizers, strict=True)
    return [shard_optimizer_state(optimizer, own["state"]) for optimizer, own in pairs]


def check_scaler(state: TrainState, saved: Checkpoint) -> None:
    """Check the saved gradient scaler. Raises: UserError if it is incomplete or has no positive scale."""
    if saved.scaler and state.scaler.is_enabled():
        require(saved.scaler.keys() == state.scaler.state_dict().keys(), "the scaler is not whole")
        require(saved.scaler["scale"] > 0, f"the scaler's scale is {saved.scaler['scale']}")


def load_shards(state: TrainState, folder: Path) -> list[dict[int, Any]]:
    """Load weights and their average from a sharded checkpoint. Returns the states of the optimizers."""
    saved = sharded.shapes(folder)
    states = sharded.empty_states(saved, state.optimizers)
    average = state.ema_model.state_dict() if state.ema_model else {}
    if any(name.startswith("average.") for name in saved) or not average:
        sharded.load(folder, sharded.flatten(state.model.state_dict(), average, states))
        return states
    sharded.load(folder, sharded.flatten(state.model.state_dict(), {}, states))
    sharded.load(folder, sharded.flatten(average, {}, []))  # the run begins to average: from the weights
    return states
