"""Out of memory: foreseen, survived, or explained. The update stays the same, in smaller micro-batches.

Example: fit_to_memory(run); loss = halve_on_out_of_memory(run, compute_gradient)
Memory is predicted before the first update, since running out of it is not always an error: on a CPU the
system kills the process, Windows and macOS swap and crawl, and with FSDP all processes have to meet in the
middle of the model. Where it is an error (CUDA on Linux), it is caught in the first updates.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from nanogpt.checkpoint.format import Checkpoint
from nanogpt.config import TrainConfig
from nanogpt.console import ceil_div, warn
from nanogpt.device import GIB, is_out_of_memory
from nanogpt.distributed.parallelize import is_sharded
from nanogpt.distributed.world import World
from nanogpt.errors import UserError
from nanogpt.training import memory_estimate
from nanogpt.training.compilation import recompile
from nanogpt.training.memory_estimate import HEADROOM, Memory
from nanogpt.training.run import Run

MIN_RUN_FLOPS, MIN_UPDATE_FLOPS = 1e13, 1e11
"""Operations of a training, or of an update, from which half a second of predicting memory is worth while."""

CAREFUL_UPDATES = 2
"""Updates after which memory grows no more: by then the optimizers have made their moments."""


# --- the number of micro-batches ---


def max_rank_batch(config: TrainConfig, world: World) -> int:
    """The largest number of sequences that a process has of a batch."""
    return ceil_div(config.batch_size, world.size)


def micro_batches_per_rank(config: TrainConfig, world: World) -> int:
    """How many micro-batches the settings ask each process for."""
    sequences = max_rank_batch(config, world)
    if config.micro_batch == "auto":
        return min(sequences, ceil_div(config.gradient_accumulation_steps, world.size))
    return ceil_div(sequences, config.micro_batch)


def initial_micro_batches(config: TrainConfig, world: World, saved: Checkpoint | None) -> int:
    """How many micro-batches a process begins with: on a resume as many as before, for the same rounding."""
    asked = micro_batches_per_rank(config, world)
    same = ("batch_size", "gradient_accumulation_steps", "micro_batch")
    if saved is None or any(getattr(saved.train_config, name) != getattr(config, name) for name in same):
        return asked
    before = ceil_div(int(saved.precision.get("num_micro_batches", 0)), world.size)
    return min(max(asked, before), max_rank_batch(config, world))


# --- foreseen ---


def fit_to_memory(run: Run) -> None:
    """Predict the memory of an update, and take as many micro-batches as make it fit."""
    config, world = run.config, run.world
    run_flops = run.flops_per_update * (config.max_iters - run.progress.step)
    if run.flops_per_update < MIN_UPDATE_FLOPS and run_flops < MIN_RUN_FLOPS:
        return
    run.memory = wanted = predict(run, run.num_micro_batches)
    if config.micro_batch != "auto":
        return
    run.kind.release_memory()
    free = HEADROOM * memory_estimate.free(run.device) / (world.local_size if run.kind.shares_memory else 1)
    free += wanted.weights + (wanted.optimizer if run.first_step else 0)  # allocated already
    count, memory = run.num_micro_batches, wanted
    while memory.need(run.device) > free and count < max_rank_batch(config, world):
        count = min(2 * count, max_rank_batch(config, world))
        memory = predict(run, count)
    most, too_little = world.max_over_ranks(count, memory.need(run.device) > free)
    run.memory = memory if most == count else predict(run, most)
    if too_little:
        warn(
            f"an update takes {run.memory.need(run.device) / GIB:,.1f} GiB, more than is free: "
            "nanogpt plan says what to change"
        )
    elif most > run.num_micro_batches:
        warn(
            f"the batch takes {wanted.need(run.device) / GIB:,.1f} GiB, more than is free: "
            f"going on with {most} micro-batches, which compute the same in "
            f"{run.memory.need(run.device) / GIB:,.1f} GiB"
        )
    run.num_micro_batches = most


def predict(run: Run, num_micro_batches: int) -> Memory:
    """The memory of an update with so many micro-batches."""
    sequences = ceil_div(max_rank_batch(run.config, run.world), num_micro_batches)
    return memory_estimate.predict(
        run.model.config, run.config, run.device, run.dtype, sequences, run.world.size,
        run.muon_precision.dtype,
    )  # fmt: skip


# --- survived ---


def halve_on_out_of_memory(run: Run, compute_gradient: Callable[..., Tensor]) -> Tensor:
    """Call compute_gradient(run, sync=...), with smaller micro-batches if the device runs out of memory.

    Several processes have to halve theirs together. So in the first updates, in which memory grows, DDP's
    gradients are averaged only after all processes have said that they got through. Returns the loss, summed
    over all processes. Raises: what was raised, if halving does not help.
    """
    early = run.progress.step < run.first_step + CAREFUL_UPDATES
    careful = run.config.parallel == "ddp" and run.world.size > 1 and early
    while True:
        loss, failed = torch.zeros(()), False
        try:
            loss = compute_gradient(run, sync=not careful)
        except (RuntimeError, MemoryError) as error:
            alone = run.world.size == 1 or careful
            if not (is_out_of_memory(error) and can_halve(run) and alone):
                raise
            failed = True  # the next try is outside of this block: the error holds on to the memory
        if careful:
            failed = bool(run.world.max_over_ranks(failed)[0])
        if not failed:
            if careful:
                average_gradients(run)
            return run.world.all_reduce_sum(loss)
        halve_micro_batches(run)
        recompile(run, compute_gradient)


def can_halve(run: Run) -> bool:
    """Whether there are smaller micro-batches, and the user has not fixed their size."""
    return run.config.micro_batch == "auto" and run.num_micro_batches < max_rank_batch(run.config, run.world)


def halve_micro_batches(run: Run) -> None:
    """Take half as many sequences at a time."""
    run.model.zero_grad()
    run.kind.release_memory()
    run.num_micro_batches = min(2 * run.num_micro_batches, max_rank_batch(run.config, run.world))
    warn(f"out of memory: going on with {run.num_micro_batches} micro-batches, which compute the same")


def average_gradients(run: Run) -> None:
    """Average the gradients over all processes, as DDP does during the backward pass."""
    for parameter in run.model.parameters():
        if parameter.grad is not None:
            run.world.all_reduce_sum(parameter.grad).div_(run.world.size)


# --- explained ---


@contextmanager
def explain_out_of_memory(config: TrainConfig, world: World, run: Run | None = None) -> Generator[None]:
    """Turn running out of memory, on any device, into a UserError that says what to change.

    run: None while it is being set up.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one; MPS and CPU raise it bare
        if not is_out_of_memory(error):
            raise
        advice = memory_advice(config, world, run)
        raise UserError(f"out of memory: {advice} (or end other programs that use the device)") from error


def memory_advice(config: TrainConfig, world: World, run: Run | None) -> str:
    """The setting to change, the one that costs least first."""
    if run is None:
        return "give a smaller --n_layer or --n_embd"
    micro_batch = ceil_div(max_rank_batch(config, world), run.num_micro_batches)
    if is_sharded(run.model) and micro_batch > 1:
        return f"give --micro_batch {micro_batch // 2}, which computes the same in smaller pieces"
    if config.micro_batch not in ("auto", 1):
        return "give --micro_batch auto, which computes the same in pieces that fit"
    if config.grad_checkpoint != "blocks":
        return "give --grad_checkpoint blocks, which computes the same in less memory"
    return "give a smaller --block_size or --n_embd"
