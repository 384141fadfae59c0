"""The Checkpointer: when and how a run is written to its folder, and read back.

Example: state.checkpointer.save_last(state); state.checkpointer.restore(state, saved)
What a checkpoint file is: checkpoint/format.py. With FSDP, last.pt is sharded (checkpoint/sharded.py): every
process writes its shards in the background, while the training goes on. ckpt.pt is always one file.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nanogpt.checkpoint import sharded
from nanogpt.checkpoint.format import Checkpoint, Progress, save_checkpoint, shards_folder
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.checkpoint.validation import check_states
from nanogpt.config import to_dict
from nanogpt.console import warn
from nanogpt.device import name_of
from nanogpt.distributed import parallelize
from nanogpt.distributed.dtensor import full_state, load_full_state, shard_optimizer_state
from nanogpt.distributed.world import World
from nanogpt.errors import UserError, require
from nanogpt.files import atomic_write, fsync_folder
from nanogpt.training.state import TrainState


@dataclass(frozen=True)
class ShardedSave:
    """A sharded checkpoint that is being written in the background."""

    header: Checkpoint
    """All but the tensors."""
    folder: Path
    digests: "Future[dict[str, str]]"
    """The SHA-256 of each file that this process has written, or a UserError why it has not."""


class Checkpointer:
    """Saves and restores a state. All processes call its methods together; the first one writes."""

    def __init__(
        self, folder: RunFolder, world: World, before_save: Callable[[], object] = lambda: None
    ) -> None:
        """before_save: called on the first process before it writes; there the metrics become durable."""
        self.folder, self.world, self.before_save = folder, world, before_save
        self.saved_at = time.perf_counter()
        self.saved_step: int | None = None
        """Step of the newest checkpoint that this process has written or read."""
        self.last_progress: dict[str, Any] | None = None
        """The progress that last.pt holds, if this process knows it."""
        self.shards: Path | None = None
        """Folder of the shards of last.pt, if it is sharded: it must not be written to."""
        self.pending: ShardedSave | None = None

    # --- save ---

    def save_last(self, state: TrainState) -> bool:
        """Save last.pt. A failure is reported and the training goes on. Returns whether it worked."""
        return attempt(lambda: self.begin_save(state, self.folder.last))

    def save_best(self, state: TrainState) -> bool:
        """Save ckpt.pt. A failure is reported and the training goes on. Returns whether it worked."""
        return attempt(lambda: self.begin_save(state, self.folder.best))

    def save(self, state: TrainState, path: Path) -> None:
        """Write a checkpoint, and wait until it is there. Raises: UserError if it cannot be written."""
        self.begin_save(state, path)
        self.finish_save()

    def save_final(self, state: TrainState) -> None:
        """Write last.pt at the end of the training, unless it holds the same already. Raises: as `save`."""
        self.finish_save()
        if self.last_progress != asdict(state.progress):
            self.save(state, self.folder.last)

    def begin_save(self, state: TrainState, path: Path) -> None:
        """Write a checkpoint; a sharded one is only begun: see finish_save.

        Raises: UserError if it cannot be written, or if the one before could not.
        """
        self.finish_save()
        self.saved_at = time.perf_counter()
        with self.world.raise_on_all():
            if self.world.is_first:
                self.folder.confirm()
        if self.world.is_first:
            self.before_save()
            if self.world.job and not self.saved_step:
                with atomic_write(self.folder.job) as file:
                    file.write(self.world.job.encode())
        if parallelize.is_sharded(state.model) and path == self.folder.last:
            self.begin_sharded_save(state)
            return
        saved = snapshot(state)
        with self.world.raise_on_all():
            if self.world.is_first:
                save_checkpoint(path, saved)
        self.saved_step = state.progress.step
        if path == self.folder.last:
            self.last_progress, self.shards = saved.progress, None
            if self.world.is_first:
                self.folder.delete_shards(keep=None)  # of a run that went on without FSDP

    def begin_sharded_save(self, state: TrainState) -> None:
        """Copy this process's shards, and let a thread write them."""
        average = state.ema_model.state_dict() if state.ema_model else {}
        states = [optimizer.state_dict()["state"] for optimizer in state.optimizers]
        tensors = sharded.flatten(state.model.state_dict(), average, states)
        folder = self.folder.shards / str(state.progress.step)
        if folder == self.shards:
            folder = folder.with_name(f"{folder.name}-again")
        if self.world.is_first:
            self.folder.delete_shards(keep=self.shards)  # left by a killed process
        self.pending = ShardedSave(header(state), folder, sharded.begin_save(folder, tensors))

    def finish_save(self) -> None:
        """Wait for the sharded checkpoint that is being written, if there is one.

        It counts from the moment at which last.pt, which names its shards, is in place.
        Raises: UserError if a process could not write its shards, or the first one the file.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return
        digests = dict[str, str]()
        try:
            with self.world.raise_on_all():
                digests = pending.digests.result()
        except UserError:
            if self.world.is_first:
                self.folder.delete_shards(keep=self.shards)
            raise
        files = self.world.all_gather(list(digests.items()))
        with self.world.raise_on_all():
            if self.world.is_first:
                inside = pending.folder.relative_to(self.folder.path)
                fsync_folder(pending.folder)
                fsync_folder(self.folder.shards)
                named = {(inside / name).as_posix(): digest for name, digest in files}
                save_checkpoint(self.folder.last, replace(pending.header, shards=named))
                self.folder.delete_shards(keep=pending.folder)
        self.shards, self.last_progress = pending.folder, pending.header.progress
        self.saved_step = int(pending.header.progress["step"])

    def try_finish_save(self) -> bool:
        """Like finish_save, but a failure is reported. Returns whether it worked."""
        return attempt(self.finish_save)

    def is_due(self, seconds: float) -> bool:
        """Whether the last save is so many seconds ago."""
        return time.perf_counter() - self.saved_at >= seconds

    @property
    def is_writing(self) -> bool:
        """Whether this process is still writing its shards."""
        return self.pending is not None and not self.pending.digests.done()

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
        self.saved_step = state.progress.step
        if self.folder.resumed == self.folder.last and saved.config == saved_settings(state):
            self.last_progress = saved.progress  # nothing to save before something changes


def attempt(write: Callable[[], None]) -> bool:
    """Whether writing worked; a failure is reported."""
    try:
        write()
    except UserError as error:
        warn(f"{error} (training goes on; what was saved before is whole; the next save tries again)")
        return False
    return True


def snapshot(state: TrainState) -> Checkpoint:
    """The state as a checkpoint. Its tensors are the run's own, not copies.

    With FSDP they are gathered, and the first process alone has them.
    """
    is_first = state.world.is_first
    return replace(
        header(state),
        model=full_state(state.model.state_dict(), is_destination=is_first),
        average=full_state(state.ema_model.state_dict(), is_destination=is_first) if state.ema_model else {},
        optimizers=[
            full_state(optimizer.state_dict(), is_destination=is_first) for optimizer in state.optimizers
        ],
    )


def header(state: TrainState) -> Checkpoint:
    """The state as a checkpoint, without its tensors."""
    muon = {"muon_dtype": name_of(state.muon_precision.dtype)} if state.config.optimizer == "muon" else {}
    return Checkpoint(
        config=saved_settings(state),
        vocab_size=state.model.config.vocab_size,
        progress=asdict(state.progress),
        model={},
        average={},
        optimizers=[optimizer.state_dict() | {"state": {}} for optimizer in state.optimizers],
        scaler=state.scaler.state_dict(),
        precision={
            "device": state.device.type,
            "dtype": name_of(state.dtype),
            **muon,
            "num_micro_batches": state.num_micro_batches * state.world.size,
        },
        tokenizer=state.dataset.tokenizer.to_dict(),
        fingerprint=state.dataset.fingerprint,
    )


def saved_settings(state: TrainState) -> dict[str, Any]:
    """The settings of the run as a checkpoint holds them."""
    return to_dict(replace(state.config, resume=False, overwrite=False))


def load_tensors(state: TrainState, saved: Checkpoint) -> list[dict[int, Any]]:
    """Load weights and their average from a checkpoint in one file. Returns the states of the optimizers.

    Raises: UserError if they do not fit the state.
    """
    check_states(state.optimizers, [optimizer["state"] for optimizer in saved.optimizers])
    check_scaler(state, saved)
    load_full_state(state.model, saved.model)
    if state.ema_model:
        load_full_state(state.ema_model, saved.weights)
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
