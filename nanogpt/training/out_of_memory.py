"""Out of memory: predict it, recover from it with smaller micro-batches, or explain it.

Example: fit_to_memory(run); loss = halve_on_out_of_memory(run, forward_backward)
Smaller micro-batches compute the same update. Unless there is plenty, memory is predicted before the first
update, since running out of memory does not always raise an error: on a CPU the system kills the process,
Windows and macOS swap and become slow, and with FSDP the other processes are left waiting in the middle of
the model. Where it raises an error (CUDA on Linux), the error is caught and the micro-batches are halved.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from nanogpt.checkpoint.format import Checkpoint
from nanogpt.config import TrainConfig
from nanogpt.distributed.parallelize import is_sharded
from nanogpt.distributed.world import World
from nanogpt.errors import UserError
from nanogpt.machine.device import is_out_of_memory
from nanogpt.terminal.console import warn
from nanogpt.training import memory_estimate
from nanogpt.training.compilation import recompile
from nanogpt.training.memory_estimate import HEADROOM, Memory
from nanogpt.training.run import Run
from nanogpt.units import GIB, ceil_div

MIN_RUN_FLOPS, MIN_UPDATE_FLOPS = 1e13, 1e11
"""A run or an update of fewer operations is not worth the half second that predicting memory takes."""

CAREFUL_UPDATES = 2
"""Number of updates in which memory can still grow, until the optimizers have created their state."""


# --- the number of micro-batches ---


def max_rank_batch(config: TrainConfig, world: World) -> int:
    """Number of sequences that a process has of a batch, at most."""
    return ceil_div(config.batch_size, world.size)


def micro_batches_per_rank(config: TrainConfig, world: World) -> int:
    """Number of micro-batches of each process, as the settings ask for."""
    sequences = max_rank_batch(config, world)
    if config.micro_batch == "auto":
        return min(sequences, ceil_div(config.gradient_accumulation_steps, world.size))
    return ceil_div(sequences, config.micro_batch)


def initial_micro_batches(config: TrainConfig, world: World, saved: Checkpoint | None) -> int:
    """Number of micro-batches of each process at the start. A resumed run keeps it, for the same rounding."""
    asked = micro_batches_per_rank(config, world)
    same = ("batch_size", "gradient_accumulation_steps", "micro_batch")
    if saved is None or any(getattr(saved.train_config, name) != getattr(config, name) for name in same):
        return asked
    before = ceil_div(int(saved.precision.get("num_micro_batches", 0)), world.size)
    return min(max(asked, before), max_rank_batch(config, world))


# --- prediction ---


def fit_to_memory(run: Run) -> None:
    """Predict the memory of an update, and double the number of micro-batches until it fits."""
    config, world = run.config, run.world
    run_flops = run.flops_per_update * (config.max_iters - run.progress.step)
    if run.flops_per_update < MIN_UPDATE_FLOPS and run_flops < MIN_RUN_FLOPS:
        return
    if world.size == 1 and 2 * allocated_at_most(run) < HEADROOM * memory_estimate.free(run.device):
        return
    run.memory = wanted = predict_update(run, run.num_micro_batches)
    if config.micro_batch != "auto":
        return
    run.kind.release_memory()
    free = HEADROOM * memory_estimate.free(run.device) / (world.local_size if run.kind.shares_memory else 1)
    free += wanted.weights + (wanted.optimizer if run.first_step else 0)  # these are already allocated
    count, memory = run.num_micro_batches, wanted
    while memory.need(run.device) > free and count < max_rank_batch(config, world):
        count = min(2 * count, max_rank_batch(config, world))
        memory = predict_update(run, count)
    most, too_little = world.max_over_ranks(count, memory.need(run.device) > free)
    run.memory = memory if most == count else predict_update(run, most)
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


def allocated_at_most(run: Run) -> int:
    """More bytes than an update in one process allocates beside its weights."""
    sequences = ceil_div(run.config.batch_size, run.num_micro_batches)
    return memory_estimate.at_most(run.model.config, run.model.num_parameters(), sequences)


def predict_update(run: Run, num_micro_batches: int) -> Memory:
    """Predict the memory of an update with `num_micro_batches` in each process."""
    sequences = ceil_div(max_rank_batch(run.config, run.world), num_micro_batches)
    return memory_estimate.predict(
        run.model.config, run.config, run.device, run.dtype, sequences, run.world.size,
        run.muon_precision.dtype,
    )  # fmt: skip


# --- recovery ---


def halve_on_out_of_memory(run: Run, forward_backward: Callable[..., Tensor]) -> Tensor:
    """Call forward_backward(run, sync=...), with smaller micro-batches if the device runs out of memory.

    Several processes must halve their micro-batches together. So in the first updates, while memory can still
    grow, DDP averages gradients only after every process has reported success.
    Returns what it returns. Raises: the original error, if halving does not help.
    """
    early = run.progress.step < run.first_step + CAREFUL_UPDATES
    careful = run.config.parallel == "ddp" and run.world.size > 1 and early
    while True:
        loss, failed = torch.zeros(()), False
        try:
            loss = forward_backward(run, sync=not careful)
        except (RuntimeError, MemoryError) as error:
            alone = run.world.size == 1 or careful
            if not (is_out_of_memory(error) and can_halve(run) and alone):
                raise
            failed = True  # retry after this block, since the error keeps tensors alive
        if careful:
            failed = bool(run.world.max_over_ranks(failed)[0])
        if not failed:
            if careful:
                average_gradients(run)
            return loss
        halve_micro_batches(run)
        recompile(run, forward_backward)


def can_halve(run: Run) -> bool:
    """Whether micro-batches can be smaller, and the user has not fixed their size."""
    return run.config.micro_batch == "auto" and run.num_micro_batches < max_rank_batch(run.config, run.world)


def halve_micro_batches(run: Run) -> None:
    """Halve the size of the micro-batches, and drop the gradients of the failed attempt."""
    run.model.zero_grad()
    run.kind.release_memory()
    run.num_micro_batches = min(2 * run.num_micro_batches, max_rank_batch(run.config, run.world))
    warn(f"out of memory: going on with {run.num_micro_batches} micro-batches, which compute the same")


def average_gradients(run: Run) -> None:
    """Average the gradients over all processes, as DDP does during the backward pass."""
    for parameter in run.model.parameters():
        if parameter.grad is not None:
            run.world.all_reduce_sum(parameter.grad).div_(run.world.size)


# --- explanation ---


@contextmanager
def explain_training_memory(config: TrainConfig, world: World, run: Run | None = None) -> Generator[None]:
    """Turn an out-of-memory error, of any device, into a UserError that says what to change.

    run: the run, or None while it is being set up.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        advice = memory_advice(config, world, run)
        raise UserError(f"out of memory: {advice} (or end other programs that use the device)") from error


def memory_advice(config: TrainConfig, world: World, run: Run | None) -> str:
    """The cheapest setting to change next, as a message."""
    if run is None:
        return "give a smaller --n_layer or --n_embd"
    micro_batch = ceil_div(max_rank_batch(config, world), run.num_micro_batches)
    if is_sharded(run.model) and micro_batch > 1:
        return f"give --micro_batch {micro_batch // 2}, which computes the same in smaller micro-batches"
    if config.micro_batch not in ("auto", 1):
        return "give --micro_batch auto, which computes the same in micro-batches that fit"
    if config.grad_checkpoint != "blocks":
        return "give --grad_checkpoint blocks, which computes the same in less memory"
    return "give a smaller --block_size or --n_embd"
