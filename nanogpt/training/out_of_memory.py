"""How many sequences a process takes at once: as many as fit. The update stays the same.

Use:    pieces = micro_batches_per_rank(config, world); fit_to_memory(run); halve(run)
Micro-batches that fit are worked out beforehand, since running out of memory is not always an error: a
CPU's system kills the process, Windows and macOS go on in main memory or on the disk, many times slower, and
in the middle of a sharded model all processes have to meet. Where it is one (CUDA on Linux), it is caught in
the first updates (training/step.py), should the forecast have been wrong.
"""

from nanogpt.checkpoint.format import Checkpoint
from nanogpt.config import TrainConfig
from nanogpt.console import GIB, warn
from nanogpt.distributed.world import World
from nanogpt.training import memory_estimate
from nanogpt.training.memory_estimate import HEADROOM, Memory
from nanogpt.training.state import Run

WORTH_COUNTING, LARGE_UPDATE = 1e13, 1e11
"""Operations of a training, and of an update, from which half a second of counting is worth while."""


def micro_batches_per_rank(config: TrainConfig, world: World) -> int:
    """How many micro-batches a process cuts its share of the batch into, to begin with."""
    share = max_rank_batch(config, world)
    if config.micro_batch == "auto":
        return min(share, -(-config.gradient_accumulation_steps // world.size))
    return -(-share // config.micro_batch)


def fit_to_memory(run: Run) -> None:
    """Count the memory of an update before it is made, and where it has to fit, see that it does."""
    config, world = run.config, run.world
    if run.work < LARGE_UPDATE and run.work * (config.max_iters - run.progress.step) < WORTH_COUNTING:
        return

    def predict(micro_batch: int) -> Memory:
        """With micro-batches of this size."""
        return memory_estimate.predict(
            run.model.config, config, run.device, run.dtype, micro_batch, world.size, run.newton_schulz.dtype
        )

    share = max_rank_batch(config, world)
    run.memory = wanted = predict(-(-share // run.num_micro_batches))
    if config.micro_batch != "auto":
        return
    run.kind.release_memory()
    room = HEADROOM * memory_estimate.free(run.device) / (world.local_size if run.kind.shares_memory else 1)
    there = wanted.weights + (wanted.optimizer if run.first_step else 0)  # of it, and not free any more
    pieces, plan = run.num_micro_batches, wanted
    while plan.need(run.device) - there > room and pieces < share:
        pieces = min(2 * pieces, share)
        plan = predict(-(-share // pieces))
    most, lacks = world.max_over_ranks(pieces, plan.need(run.device) - there > room)
    run.memory = plan if most == pieces else predict(-(-share // most))
    if lacks:
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


def initial_micro_batches(config: TrainConfig, world: World, saved: Checkpoint | None) -> int:
    """Micro-batches of a process to begin with; as many as before, and so the same rounding, on a resume."""
    pieces = micro_batches_per_rank(config, world)
    same = ("batch_size", "gradient_accumulation_steps", "micro_batch")
    if saved is None or any(getattr(saved.train_config, name) != getattr(config, name) for name in same):
        return pieces
    before = -(-int(saved.precision.get("num_micro_batches", 0)) // world.size)
    return min(max(pieces, before), max_rank_batch(config, world))


def can_halve(run: Run) -> bool:
    """Whether there are smaller micro-batches, and the user did not ask for these."""
    return run.config.micro_batch == "auto" and run.num_micro_batches < max_rank_batch(run.config, run.world)


def halve(run: Run) -> None:
    """Take half as many sequences at once, after the device has run out of memory."""
    run.model.zero_grad()
    run.kind.release_memory()
    run.num_micro_batches = min(2 * run.num_micro_batches, max_rank_batch(run.config, run.world))
    warn(f"out of memory: going on with {run.num_micro_batches} micro-batches, which compute the same")


def max_rank_batch(config: TrainConfig, world: World) -> int:
    """Sequences of a batch that a process has, if it has most."""
    return -(-config.batch_size // world.size)
