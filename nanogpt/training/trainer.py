"""The training loop, and everything that one update does, in reading order.

Example: reason = train(run)

Stripped of what makes it work on any machine, an update is

    set_learning_rate(optimizers, lr_multiplier(step, config))
    x, y = loader(sampler(step), block_size)
    model.loss(x, y).backward()
    clip_grad_norm(model, grad_clip)
    for optimizer in optimizers: optimizer.step()
    model.zero_grad()

train_step also works in micro-batches that fit in memory, on several processes and in float16, and leaves the
weights unchanged if the loss is not finite. `run` holds everything: config, model, optimizers, sampler and
loader of batches, progress (step, best loss, ...), checkpointer, metrics. setup.py builds it.

An update is a function of the weights, the optimizers and (seed, shuffle_id, step): batch and dropout masks
follow from these numbers. So a run that is killed and resumed ends with the same weights as one that never
stopped, and evaluating, logging or sampling more often changes nothing. The CPU does not wait for a GPU: an
update is queued, and its loss is read (results.py) while the GPU computes the next one.

Shapes: B sequences of a batch on this process, T block_size
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanogpt.distributed import parallelize
from nanogpt.distributed.dtensor import full_tensor
from nanogpt.errors import UserError
from nanogpt.evaluation import evaluate, sample_text
from nanogpt.machine.device import autocast
from nanogpt.terminal.console import warn
from nanogpt.training.decisions import Due, all_reduce_decisions
from nanogpt.training.ema import update_ema
from nanogpt.training.optimizer import learning_rate, lr_multiplier, set_learning_rate, step_optimizers
from nanogpt.training.out_of_memory import halve_on_out_of_memory
from nanogpt.training.recovery import roll_back
from nanogpt.training.report import print_eta, resume_command
from nanogpt.training.results import log, read_results
from nanogpt.training.run import Run, StopReason, UpdateResult
from nanogpt.training.sparse import clip_grad_norm
from nanogpt.units import ceil_div


def train(run: Run) -> StopReason:
    """Update, evaluate and save until there is a reason to stop; then save the final state.

    Raises: UserError if it cannot be saved, or if the training breaks down in every data order tried.
    """
    due = decide(run)
    while not due.reason:
        if due.evaluation:
            evaluate_and_save(run)
        else:
            if due.save:
                save_last(run)
            launch_update(run)
        due = decide(run)
    save_final(run)
    return due.reason


def decide(run: Run) -> Due:
    """Decide what is due, the same on all processes: an evaluation; else a reason to stop; else a save.

    If anything is due, the losses that are still on the device are read first: they may change the decision.
    """
    due = all_reduce_decisions(run)
    if run.unread and any(due):
        read_results(run)
        due = all_reduce_decisions(run)
    return due


# --- update ---


def launch_update(run: Run) -> None:
    """Do one update. An asynchronous device computes it while the result of the one before is read."""
    if not run.unread:  # after an evaluation or a save, whose time does not count as training
        run.clock.restart_lap()
    run.unread.append(train_step(run))
    read_results(run, in_flight=1 if run.kind.is_async else 0)
    run.console.advance(run.progress.step)
    print_eta(run)


def train_step(run: Run) -> UpdateResult:
    """Do one update, kernel by kernel or as one CUDA graph (cuda_graph.py)."""
    config, step = run.config, run.progress.step
    set_learning_rate(run.optimizers, lr_multiplier(step, config))
    values = (run.graph or update)(run)
    run.progress.step += 1
    return UpdateResult.of(run.progress.step, learning_rate(step, config), values)


def update(run: Run, decay: Tensor | None = None) -> Tensor:
    """Compute the gradient, clip it, step the optimizers and the EMA. Returns loss and gradient norm, (2,).

    If either is not finite, the weights stay unchanged. decay: see update_ema.
    """
    loss_share = halve_on_out_of_memory(run, forward_backward)  # fills the gradients
    loss = run.world.all_reduce_sum(loss_share)  # the mean over the batch
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)  # float16: from the gradient of the scaled loss to that of the loss
    norm = full_tensor(clip_grad_norm(run.model, run.config.grad_clip or math.inf))

    values = torch.stack((loss, norm))  # (2,)
    if not run.kind.is_async:
        values = values.cpu()  # the one place where an update waits for the device
    step_optimizers(run.optimizers, skip=~values.isfinite().all(), is_async=run.kind.is_async)
    if run.scaler.is_enabled():
        run.scaler.update()  # unscale_ has seen whether the gradient overflowed: lower or raise the scale
    if run.ema_model:
        update_ema(run.ema_model, run.model, run.progress.step, run.config, decay)
    parallelize.zero_grad(run.model, run.loss_fn)
    return values


def forward_backward(run: Run, *, sync: bool = True) -> Tensor:
    """Compute the gradient of the batch's mean loss, micro-batch by micro-batch.

    Returns this process's share of that loss: the sum over processes is the mean over the batch.
    sync: average the gradients over all processes.
    """
    x, y = run.captured_batch or next_batch(run)  # (B, T) each
    loss_share = torch.zeros((), device=run.device)
    count = run.num_micro_batches
    micro_batches = zip(x.tensor_split(count), y.tensor_split(count), run.loss_weights(y), strict=True)
    for number, (x_micro, y_micro, weight) in enumerate(micro_batches, 1):
        if len(x_micro) == 0:  # nothing left to do, but with FSDP every process must take part
            x_micro, y_micro = x[:1], y[:1]  # noqa: PLW2901
        with parallelize.sync_gradients(run.loss_fn, when=sync and number == count):
            with autocast(run.device, run.dtype):
                loss = weight * run.loss_fn(x_micro, y_micro)
            # DDP and FSDP average the gradients over the processes: times their number, they add them up.
            run.scaler.scale(loss * run.world.size).backward()
        loss_share += loss.detach()
    return loss_share


def next_batch(run: Run) -> tuple[Tensor, Tensor]:
    """The next update's inputs and targets on the device, (B, T) each. Also seeds its dropout."""
    progress, rank = run.progress, run.world.rank
    own_dropout = [rank] if rank else []  # rank 0 draws the masks of a run on one process
    seeds = np.random.SeedSequence([run.config.seed, progress.shuffle_id, progress.step, *own_dropout])
    torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
    starts = run.world.local_share(run.sampler(progress.step, progress.shuffle_id))  # (B,)
    return run.train_loader(starts, run.config.block_size)


# --- evaluate and save ---


def evaluate_and_save(run: Run) -> None:
    """Evaluate, log the loss, and save last.pt; if the loss is the best so far, ckpt.pt too."""
    progress = run.progress
    loss = validation_loss(run)
    if loss is None:  # interrupted by a signal
        return
    if not math.isfinite(loss):
        warn(f"step {progress.step}: validation loss {loss}")
        roll_back(run)
        return
    best = loss < progress.best_val_loss
    progress.evaluated_at = progress.step
    progress.worse_evaluations = 0 if best else progress.worse_evaluations + 1
    sample = sample_text(run.eval_model, run.dataset, run.device, run.dtype, run.config.seed)
    numbers: dict[str, Any] = {"val_loss": loss, "best": best, "sample": sample}
    if (bits := run.dataset.bits_per_byte(loss)) is not None:
        numbers["val_bits_per_byte"] = bits
    log(run, progress.step, numbers)
    if best:
        progress.best_val_loss = loss  # set back by the checkpointer if ckpt.pt cannot be written
    save_last(run, best=best)
    if run.callback is not None:
        go_on = run.callback(progress.step, loss)
        run.stopped_by_callback = go_on is not None and not go_on


def validation_loss(run: Run) -> float | None:
    """Mean loss over the validation split, in nats per token; None if a signal interrupts it."""
    config, world = run.config, run.world
    windows = run.validation_windows(config.eval_iters)
    with run.console.evaluating(ceil_div(len(windows), world.size)) as advance:
        return evaluate(
            run.eval_model,
            run.val_loader,
            windows,
            dtype=run.dtype,
            world=world,
            advance=advance,
            interrupted=lambda: run.stop.signal is not None,
        )


def save_last(run: Run, *, best: bool = False) -> None:
    """Save last.pt, and ckpt.pt if `best`. A failure is reported, and the training goes on."""
    run.stop.save_asked = False  # before saving: another signal may arrive meanwhile
    run.checkpointer.save_last(run, best=best)


def save_final(run: Run) -> None:
    """Save the final state. Raises: UserError that says from which step the run can be continued."""
    try:
        run.checkpointer.save_final(run)
    except UserError as error:
        saved = run.checkpointer.saved_step
        raise UserError(
            f"{error}: step {saved} is saved and whole: make room, then {resume_command(run)}"
        ) from error
