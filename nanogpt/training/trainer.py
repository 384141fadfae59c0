"""The training loop, and all that an update does: in one sight, in reading order.

Example: reason = train(run)                a Run comes from setup.py; fit.py surrounds both
An update is a function of the weights, the optimizers and (seed, shuffle_id, step): batches and dropout are
drawn anew from these numbers. So a run that is killed and resumed ends with the same weights as one that
never stopped, and evaluating, logging or sampling more often changes nothing.

A GPU is given work and not waited for: launch_update queues an update, and its loss is read while the device
computes the next one. So the guard against a loss that is not finite is computed on the device.

# B sequences of a batch on this process, T block_size
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from nanogpt.console import ceil_div, warn
from nanogpt.device import autocast
from nanogpt.distributed import parallelize
from nanogpt.distributed.dtensor import full_tensor
from nanogpt.errors import UserError
from nanogpt.evaluation import evaluate, evaluation_windows, sample_text
from nanogpt.training.decisions import Due, all_reduce_decisions
from nanogpt.training.optimizer import (
    ema_decay,
    learning_rate,
    lr_multiplier,
    set_learning_rate,
    step_optimizers,
    update_ema,
)
from nanogpt.training.out_of_memory import halve_on_out_of_memory
from nanogpt.training.recovery import MAX_BAD_STEPS, roll_back
from nanogpt.training.report import print_eta, resume_command
from nanogpt.training.run import Run, StopReason, UpdateResult


def train(run: Run) -> StopReason:
    """Update, evaluate and save until there is a reason to stop; the end is saved.

    Raises: UserError if the end cannot be saved, or the training breaks down in every order of the data.
    """
    while not (due := decide(run)).reason:
        if due.evaluation:
            evaluate_and_save(run)
        else:
            if due.save:
                save_last(run)
            launch_update(run)
    save_final(run)
    return due.reason


def decide(run: Run) -> Due:
    """What is due before the next update, on all processes alike, once all results it depends on are read."""
    due = all_reduce_decisions(run)
    if run.unread and any(due):
        read_results(run)  # may roll the run back
        due = all_reduce_decisions(run)
    return due


# --- update ---


def launch_update(run: Run) -> None:
    """Do one update. An asynchronous device computes it while the numbers of the one before are read."""
    if not run.unread:
        run.clock.restart_lap()
    run.unread.append(train_step(run))
    read_results(run, leave=1 if run.kind.is_async else 0)
    run.console.advance(run.progress.step)
    print_eta(run)


def train_step(run: Run) -> UpdateResult:
    """One update: learning rate, gradient, clipping, optimizers, EMA.

    If the loss or the gradient is not finite, the weights stay as they are.
    """
    config, step = run.config, run.progress.step
    set_learning_rate(run.optimizers, lr_multiplier(step, config))

    loss = halve_on_out_of_memory(run, compute_gradient)  # forward and backward

    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)  # float16: the gradient of the loss itself, which clipping is about
    norm = full_tensor(clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf))

    values = torch.stack((loss, norm))  # (2,)
    if not run.kind.is_async:
        values = values.cpu()  # the one moment at which a step waits for its device
    step_optimizers(run.optimizers, skip=~values.isfinite().all(), is_async=run.kind.is_async)
    if run.scaler.is_enabled():
        run.scaler.update()
    if run.ema_model:
        update_ema(run.ema_model, run.model, ema_decay(step, config))

    run.model.zero_grad(set_to_none=not parallelize.has_gradient_buckets(run.loss_fn))
    run.progress.step += 1
    return UpdateResult.of(run.progress.step, learning_rate(step, config), values)


def compute_gradient(run: Run, *, sync: bool = True) -> Tensor:
    """Compute the gradient of the batch's mean loss. Returns the share of that loss that this process has.

    sync: average the gradients over all processes.
    """
    x, y = next_batch(run)
    return forward_backward(run, x, y, sync=sync)


def next_batch(run: Run) -> tuple[Tensor, Tensor]:
    """The coming step's batch on the device, inputs and targets, (B, T) each. Seeds dropout for it."""
    progress, rank = run.progress, run.world.rank
    other_masks = [rank] if rank else []  # every process drops out other activations
    seeds = np.random.SeedSequence([run.config.seed, progress.shuffle_id, progress.step, *other_masks])
    torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
    starts = run.world.local_share(run.sampler(progress.step, progress.shuffle_id))  # (B,)
    return run.train_loader(starts, run.config.block_size)


def forward_backward(run: Run, x: Tensor, y: Tensor, *, sync: bool = True) -> Tensor:
    """Accumulate the gradients of x and y, (B, T), micro-batch by micro-batch.

    Returns the share of the mean loss that these sequences have. Where the shares of the processes differ, a
    micro-batch can be empty. It then computes one sequence for nothing: with FSDP all have to take part.
    """
    total = torch.zeros((), device=run.device)
    count = run.num_micro_batches
    micro_batches = zip(x.tensor_split(count), y.tensor_split(count), strict=True)
    for number, (x_micro, y_micro) in enumerate(micro_batches, 1):
        weight = len(x_micro) / run.config.batch_size
        with parallelize.without_sync(run.loss_fn, last=sync and number == count):
            with autocast(run.device, run.dtype):
                loss = run.loss_fn(x_micro, y_micro) if weight else run.loss_fn(x[:1], y[:1])
            share = loss * weight
            run.scaler.scale(share * run.world.size).backward()  # DDP and FSDP average over the processes
        total += share.detach()
    return total


# --- results ---


def read_results(run: Run, leave: int = 0) -> None:
    """Read and log the results of updates, but for the last `leave`. Rolls back after too many bad ones."""
    while len(run.unread) > leave:
        result = run.unread.popleft()
        numbers = read_result(run, result)
        run.progress.elapsed_s += run.clock.end_lap()
        if run.progress.bad_steps >= MAX_BAD_STEPS:
            roll_back(run)
        elif not run.progress.bad_steps and result.step % run.config.log_interval == 0:
            log_update(run, result.step, numbers)


def read_result(run: Run, result: UpdateResult) -> dict[str, float]:
    """Wait for the numbers of an update, and count it as bad if they are not finite.

    Returns train_loss (nats per token, mean of the batch), grad_norm (before clipping) and lr.
    """
    if result.ready:
        result.ready.synchronize()
    loss, norm = (value.item() for value in result.values)
    if math.isfinite(loss) and math.isfinite(norm):
        run.progress.bad_steps = 0
    elif math.isfinite(loss) and run.scaler.get_scale() > 1:
        pass  # float16 overflowed: the scaler lowers its scale, as it does in every run
    else:
        run.progress.bad_steps += 1
        warn(f"step {result.step}: loss {loss:.4g}, gradient norm {norm:.4g}: update skipped")
    return {"train_loss": loss, "grad_norm": norm, "lr": result.lr}


def log_update(run: Run, step: int, numbers: dict[str, float]) -> None:
    """Send an update's numbers to the sinks, with the speed since the last ones."""
    seconds_per_step = run.clock.seconds_per_step()
    tokens = run.config.batch_size * run.config.block_size
    left_s = seconds_per_step * (run.config.max_iters - step)
    log(run, step, numbers | {"tokens_per_s": round(tokens / seconds_per_step, 1), "left_s": left_s})


def log(run: Run, step: int, numbers: dict[str, Any]) -> None:
    """Send the numbers of a step to the sinks, with the clocks."""
    clocks = {
        "step": step,
        "elapsed_s": round(run.progress.elapsed_s, 3),
        "wall_s": round(run.clock.wall_seconds(), 3),
    }
    run.metrics.write(clocks | numbers)


# --- evaluate and save ---


def evaluate_and_save(run: Run) -> None:
    """Evaluate, log it, and save last.pt, and ckpt.pt too if the loss is the best so far."""
    progress = run.progress
    loss = validation_loss(run)
    if loss is None:  # interrupted by a signal
        return
    if not math.isfinite(loss):
        warn(f"step {progress.step}: validation loss {loss}")
        roll_back(run)
        return
    before = progress.best_val_loss
    best = loss < before
    progress.evaluated_at = progress.step
    progress.worse_evaluations = 0 if best else progress.worse_evaluations + 1
    sample = sample_text(run.eval_model, run.dataset, run.device, run.dtype, run.config.seed)
    numbers: dict[str, Any] = {"val_loss": loss, "best": best, "sample": sample}
    bits = run.dataset.bits_per_byte(loss)
    if bits is not None:
        numbers["val_bits_per_byte"] = bits
    log(run, progress.step, numbers)
    if best:
        progress.best_val_loss = loss
        if not run.checkpointer.save_best(run):
            progress.best_val_loss = before  # that of the ckpt.pt which is there
    save_last(run)
    if run.callback is not None:
        run.stopped_by_callback = not run.callback(progress.step, loss)


def validation_loss(run: Run) -> float | None:
    """Mean loss over the validation split, in nats per token; None if a signal interrupts it."""
    config, world = run.config, run.world
    windows = evaluation_windows(
        run.dataset.val,
        block_size=config.block_size,
        batch_size=config.batch_size,
        micro_batch=ceil_div(config.batch_size, run.num_micro_batches * world.size),
        max_batches=config.eval_iters,
    )
    with run.console.evaluating(ceil_div(len(windows), world.size)) as advance:
        return evaluate(
            run.eval_model, run.val_loader, windows, dtype=run.dtype, world=world,
            advance=advance, interrupted=lambda: run.stop.signal is not None,
        )  # fmt: skip


def save_last(run: Run) -> None:
    """Save last.pt. A failure is reported, and the training goes on."""
    run.stop.save_asked = False  # first: another signal may come meanwhile
    run.checkpointer.save_last(run)


def save_final(run: Run) -> None:
    """Save the end of the training. Raises: UserError that says from where the run can be continued."""
    try:
        run.checkpointer.save_final(run)
    except UserError as error:
        saved = run.checkpointer.saved_step
        raise UserError(
            f"{error}: step {saved} is saved and whole: make room, then {resume_command(run)}"
        ) from error
