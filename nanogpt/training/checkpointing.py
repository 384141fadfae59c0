"""Writing a run to its folder, and reading it back.

Use:    save(run, run.folder.last); try_save(run, run.folder.best); restore(run, saved)
What a checkpoint file is: checkpoint/format.py; the tensors that several processes share:
checkpoint/sharded.py.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nanogpt.checkpoint import sharded
from nanogpt.checkpoint.format import Checkpoint, Progress, save_checkpoint, shards_folder
from nanogpt.checkpoint.validation import check_states
from nanogpt.config import to_dict
from nanogpt.console import warn
from nanogpt.device import name_of
from nanogpt.distributed import parallelize
from nanogpt.distributed.dtensor import full_state, load_full_state, shard_optimizer_state
from nanogpt.errors import UserError, require
from nanogpt.files import atomic_write, fsync_folder
from nanogpt.training.state import Run, Writing


def snapshot(run: Run) -> Checkpoint:
    """The run as a checkpoint. Its tensors are the run's own, not copies, unless they had to be put together.

    Then they are on the first process alone.
    """
    keep = run.world.is_first
    return replace(
        head(run),
        model=full_state(run.model.state_dict(), keep=keep),
        average=full_state(run.average.state_dict(), keep=keep) if run.average else {},
        optimizers=[full_state(optimizer.state_dict(), keep=keep) for optimizer in run.optimizers],
    )


def head(run: Run) -> Checkpoint:
    """The run as a checkpoint, without its tensors."""
    return Checkpoint(
        config=settings(run),
        vocab_size=run.model.config.vocab_size,
        progress=asdict(run.progress),
        model={},
        average={},
        optimizers=[optimizer.state_dict() | {"state": {}} for optimizer in run.optimizers],
        scaler=run.scaler.state_dict(),
        precision={
            "device": run.device.type,
            "dtype": name_of(run.dtype),
            **({"muon_dtype": name_of(run.newton_schulz.dtype)} if run.config.optimizer == "muon" else {}),
            "num_micro_batches": run.num_micro_batches * run.world.size,
        },
        tokenizer=run.dataset.tokenizer.to_dict(),
        fingerprint=run.dataset.fingerprint,
    )


def settings(run: Run) -> dict[str, Any]:
    """The settings of the run as they are saved."""
    return to_dict(replace(run.config, resume=False, overwrite=False))


def restore(run: Run, saved: Checkpoint) -> None:
    """Put the run where the checkpoint is. Hyperparameters stay those of run.config."""
    if saved.shards:
        run.shards = shards_folder(run.folder.last, saved.shards)
        states = read_parts(run, run.shards)
    else:
        try:
            check_states(run.optimizers, [optimizer["state"] for optimizer in saved.optimizers])
            check_scaler(run, saved)
        except UserError as error:
            raise UserError(f"the checkpoint in {run.folder.path} is malformed: {error}") from error
        load_full_state(run.model, saved.model)
        if run.average:
            load_full_state(run.average, saved.weights)
        pairs = zip(run.optimizers, saved.optimizers, strict=True)
        states = [shard_optimizer_state(optimizer, state["state"]) for optimizer, state in pairs]
    for optimizer, state in zip(run.optimizers, states, strict=True):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    if saved.scaler and run.scaler.is_enabled():
        run.scaler.load_state_dict(saved.scaler)
    run.progress = Progress(**saved.progress)
    run.saved_step = run.progress.step
    if run.folder.resumed == run.folder.last and saved.config == settings(run):
        run.kept = saved.progress  # nothing to save before something changes


def check_scaler(run: Run, saved: Checkpoint) -> None:
    """Errors: UserError if the gradient scaler cannot go on from what was saved."""
    if saved.scaler and run.scaler.is_enabled():
        require(saved.scaler.keys() == run.scaler.state_dict().keys(), "the scaler is not whole")
        require(saved.scaler["scale"] > 0, f"the scaler's scale is {saved.scaler['scale']}")


def read_parts(run: Run, folder: Path) -> list[dict[int, Any]]:
    """Fill weights and average from a checkpoint in parts. Returns the states of the optimizers."""
    saved = sharded.shapes(folder)
    states = sharded.empty_states(saved, run.optimizers)
    average = run.average.state_dict() if run.average else {}
    if any(name.startswith("average.") for name in saved) or not average:
        sharded.load(folder, sharded.flatten(run.model.state_dict(), average, states))
        return states
    sharded.load(folder, sharded.flatten(run.model.state_dict(), {}, states))
    sharded.load(folder, sharded.flatten(average, {}, []))  # a run that begins to average
    return states


def save(run: Run, path: Path) -> None:
    """Write a checkpoint of the run. Errors: UserError if it cannot be written."""
    begin_save(run, path)
    finish_save(run)


def save_at_the_end(run: Run) -> None:
    """Write last.pt, if it is not what it would be already. Errors: as `save`."""
    finish_save(run)
    if run.kept != asdict(run.progress):
        save(run, run.folder.last)


def begin_save(run: Run, path: Path) -> None:
    """Write a checkpoint of the run, on the first process; or let each begin to write its part of it.

    In parts is what is resumed, of a model in parts. What is sampled from is one ordinary file.
    Errors: UserError if it cannot be written, or if the one before could not.
    """
    finish_save(run)
    run.saved_at = time.perf_counter()
    with run.world.raise_on_all():
        if run.world.is_first:
            run.folder.confirm()
    if run.world.is_first:
        run.metrics.flush()
        if run.world.job and not run.saved_step:
            with atomic_write(run.folder.job) as file:
                file.write(run.world.job.encode())
    if parallelize.is_sharded(run.model) and path == run.folder.last:
        average = run.average.state_dict() if run.average else {}
        states = [optimizer.state_dict()["state"] for optimizer in run.optimizers]
        tensors = sharded.flatten(run.model.state_dict(), average, states)
        folder = run.folder.shards / str(run.progress.step)
        if folder == run.shards:
            folder = folder.with_name(f"{folder.name}-again")
        if run.world.is_first:
            run.folder.delete_shards(
                keep=run.shards
            )  # what a killed process left: nobody writes before this one
        run.writing = Writing(head(run), folder, sharded.begin_save(folder, tensors))
        return
    saved = snapshot(run)
    with run.world.raise_on_all():
        if run.world.is_first:
            save_checkpoint(path, saved)
    run.saved_step = run.progress.step
    if path == run.folder.last:
        run.kept, run.shards = saved.progress, None
        if run.world.is_first:
            run.folder.delete_shards(keep=None)  # of a run that went on without fsdp


def finish_save(run: Run) -> None:
    """Wait until the checkpoint is there that is being written in parts, if there is one.

    It counts from the moment at which the file that names its parts is in place.
    Errors: UserError if one process could not write its part, or the first one the file.
    """
    writing, run.writing = run.writing, None
    if writing is None:
        return
    digests = dict[str, str]()
    try:
        with run.world.raise_on_all():
            digests = writing.digests.result()
    except UserError:
        if run.world.is_first:
            run.folder.delete_shards(keep=run.shards)
        raise
    files = run.world.all_gather(list(digests.items()))
    with run.world.raise_on_all():
        if run.world.is_first:
            inside = writing.folder.relative_to(run.folder.path)
            fsync_folder(writing.folder)
            fsync_folder(run.folder.shards)
            named = {(inside / name).as_posix(): digest for name, digest in files}
            save_checkpoint(run.folder.last, replace(writing.head, shards=named))
            run.folder.delete_shards(keep=writing.folder)
    run.shards, run.kept = writing.folder, writing.head.progress
    run.saved_step = int(run.kept["step"])


def try_save(run: Run, path: Path) -> bool:
    """Like begin_save, but a failure is reported and the training goes on. Returns whether it worked."""
    return attempt(run, lambda: begin_save(run, path))


def try_finish_save(run: Run) -> bool:
    """Like finish_save, but a failure is reported and the training goes on. Returns whether it worked."""
    return attempt(run, lambda: finish_save(run))


def attempt(run: Run, write: Callable[[], None]) -> bool:
    """Whether writing worked; if not, say why not."""
    try:
        write()
    except UserError as error:
        warn(f"{error} (training goes on; what was saved before is whole; the next save tries again)")
        return False
    return True
