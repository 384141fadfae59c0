"""One update: batch, gradient, guard, optimizers, average.

Use:    outcome = train_step(run); numbers = read_result(run, outcome)
A GPU is given work and not waited for: train_step queues an update, and read_result, one step later,
reads its numbers. So the guard against numbers that are not finite is computed on the device.
When to evaluate, save and stop is in trainer.py.

# B this process's share of batch_size, T block_size
"""

import math
import time
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from nanogpt.console import warn
from nanogpt.device import Event, autocast, is_out_of_memory, kind_of
from nanogpt.distributed import parallelize
from nanogpt.distributed.dtensor import full_tensor
from nanogpt.training.optimizer import ema_decay, learning_rate, lr_multiplier, set_learning_rate, update_ema
from nanogpt.training.out_of_memory import can_halve, halve
from nanogpt.training.state import Outcome, Run

CAREFUL_STEPS = 2
"""Updates after which memory does not grow any more: the optimizers have made their moments."""


def next_batch(run: Run) -> tuple[Tensor, Tensor]:
    """The batch of the coming step on the device, (B, T) each; also seeds its random numbers."""
    progress = run.progress
    other_masks = [run.world.rank] if run.world.rank else []
    seeds = np.random.SeedSequence([run.config.seed, progress.shuffle_id, progress.step, *other_masks])
    torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
    starts = run.world.local_share(run.batches(progress.step, progress.shuffle_id))
    return run.train_windows(starts, run.config.block_size)


def gradient(run: Run) -> Tensor:
    """Compute the gradient of the whole batch's mean loss, on every process. Returns that loss.

    If the device runs out of memory, the micro-batches are halved, as often as that helps. Of several
    processes all must halve theirs: so at first, when memory grows, they add up their gradients only
    after they have asked each other.
    """
    early = run.progress.step < run.first_step + CAREFUL_STEPS
    careful = run.config.parallel == "ddp" and run.world.size > 1 and early
    while True:
        loss, failed = torch.zeros(()), False
        try:
            loss = forward_backward(run, *next_batch(run), sync=not careful)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not can_halve(run) or (run.world.size > 1 and not careful):
                raise
            failed = True  # go on outside: the error holds on to the memory
        if careful:
            failed = bool(run.world.max_over_ranks(failed)[0])
        if not failed:
            if careful:
                average_gradients(run)
            return run.world.all_reduce_sum(loss)
        halve(run)
        if parallelize.is_compiled(run.loss):
            compile_anew(run)


def compile_anew(run: Run) -> None:
    """Compile for the new size of the micro-batches, on a batch that does not count, and not in the clock."""
    with suppress(RuntimeError):  # out of memory again: the next try sees that, too
        forward_backward(run, *next_batch(run), sync=False)
    run.model.zero_grad(set_to_none=not parallelize.keeps_gradients(run.loss))
    run.clock = time.perf_counter()


def average_gradients(run: Run) -> None:
    """What DDP does during the backward pass, after it."""
    for parameter in run.model.parameters():
        if parameter.grad is not None:
            run.world.all_reduce_sum(parameter.grad).div_(run.world.size)


def forward_backward(run: Run, x: Tensor, y: Tensor, *, sync: bool = True) -> Tensor:
    """Add up the gradients of a batch, micro-batch by micro-batch. Returns its share of the mean loss.

    sync: average the gradients over all processes. x, y: this process's share of the batch. One that is left
    without a sequence, where the shares differ, computes one more for nothing: under FSDP all have to meet.
    """
    total = torch.zeros((), device=run.device)
    pieces = zip(x.tensor_split(run.num_micro_batches), y.tensor_split(run.num_micro_batches), strict=True)
    for number, (x_piece, y_piece) in enumerate(pieces, 1):
        weight = len(x_piece) / run.config.batch_size
        with parallelize.without_sync(run.loss, last=sync and number == run.num_micro_batches):
            with autocast(run.device, run.dtype):
                loss = run.loss(x_piece, y_piece) if weight else run.loss(x[:1], y[:1])
            share = loss * weight
            run.scaler.scale(share * run.world.size).backward()  # of which the processes take the mean
        total += share.detach()
    return total


def train_step(run: Run) -> Outcome:
    """One update; if the loss or the gradient is not finite, the weights stay as they are."""
    config, progress = run.config, run.progress
    set_learning_rate(run.optimizers, lr_multiplier(progress.step, config))
    loss = gradient(run)
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf))
    values = torch.stack((loss, norm))
    if not run.kind.is_async:
        values = values.cpu()  # the one moment at which a step waits for its device
    update(run, ~values.isfinite().all())
    if run.scaler.is_enabled():
        run.scaler.update()
    if run.average:
        update_ema(run.average, run.model, ema_decay(progress.step, config))
    run.model.zero_grad(set_to_none=not parallelize.keeps_gradients(run.loss))
    rate = learning_rate(progress.step, config)
    progress.step += 1
    return Outcome(progress.step, rate, *to_cpu(values))


def update(run: Run, broken: Tensor) -> None:
    """Let the optimizers change the weights unless `broken`, a scalar of bool on the device."""
    if run.kind.is_async:
        for optimizer in run.optimizers:
            optimizer.found_inf = broken.float()  # pyright: ignore[reportAttributeAccessIssue]
    elif broken:
        return
    for optimizer in run.optimizers:
        optimizer.step()


def to_cpu(values: Tensor) -> tuple[Tensor, Event | None]:
    """The values on the CPU, and the event after which they are there, if their device runs ahead."""
    kind = kind_of(values.device)
    copy = values.to("cpu", non_blocking=kind.is_async)
    return copy, kind.record_event(values.device)


def read_result(run: Run, outcome: Outcome) -> dict[str, float]:
    """Wait for the numbers of an update, and count it as broken if they are not finite.

    Returns train_loss (nats per token, mean of the batch), grad_norm (before clipping) and lr.
    """
    if outcome.ready:
        outcome.ready.synchronize()
    loss, norm = (value.item() for value in outcome.values)
    if math.isfinite(loss) and math.isfinite(norm):
        run.progress.bad_steps = 0
    elif math.isfinite(loss) and run.scaler.get_scale() > 1:
        pass  # float16 overflowed: the scaler lowers its scale, as it does in every run
    else:
        run.progress.bad_steps += 1
        warn(f"step {outcome.step}: loss {loss:.4g}, gradient norm {norm:.4g}: update skipped")
    return {"train_loss": loss, "grad_norm": norm, "lr": outcome.lr}
