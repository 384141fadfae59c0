"""Training: evaluate, fit.

Run:    python train.py --max_iters 1000            then: python train.py --resume
Use:    result = fit(TrainConfig(data_dir="data", out_dir="out", max_iters=1000))
Reads the data folder; writes the run folder (checkpoint/run_dir.py says what is in it). How a run is set
up is in training/setup.py, how it is saved in training/checkpointing.py, an update in training/step.py.

The loop is `loop`, below. Everything a step does is a function of the weights, the optimizer and
(seed, order, step): batches and dropout are drawn anew from these at every step. So a run that is
killed and resumed ends with the same weights as one that never stopped, and evaluating, logging
or sampling more often changes nothing.
"""

import math
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.compiler import config as compiler_cache

from nanogpt.checkpoint.format import load_checkpoint
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.config import TrainConfig
from nanogpt.console import say, warn
from nanogpt.data.batches import evaluation_batches
from nanogpt.data.dataset import load_dataset
from nanogpt.device import autocast, eager_mode, is_out_of_memory, pick_compile
from nanogpt.distributed.parallelize import is_sharded, unsharded
from nanogpt.distributed.world import World, distributed_world, hard_exit
from nanogpt.errors import UserError, require
from nanogpt.inference.generate import generate
from nanogpt.model.gpt import Block
from nanogpt.training.checkpointing import restore, save, save_at_the_end, try_finish_save, try_save
from nanogpt.training.out_of_memory import fit_to_memory, max_rank_batch
from nanogpt.training.report import print_eta, print_plan, print_summary, resume_command
from nanogpt.training.setup import set_up
from nanogpt.training.state import Run
from nanogpt.training.step import forward_backward, next_batch, read_result, train_step
from nanogpt.training.stopping import EXIT_CODES, STOP_REASONS, StopRequest

MAX_BAD_STEPS = 3
"""Non-finite steps in a row after which the run goes back to its last checkpoint."""

MAX_ROLLBACKS = 3
"""Times it may go back without getting past the place before the training is given up."""

REASONS = ("", "told", "patience", "time", "finished", *STOP_REASONS)
"""Why a training stops, the weightier last."""

SAMPLE_TOKENS = 120
"""Length of the sample shown at an evaluation."""


@dataclass(frozen=True)
class Result:
    """How a run ended. reason: finished, time, patience, told (by keep_going), SIGINT or another signal."""

    reason: str
    step: int
    best_val_loss: float
    """Nats per token."""
    elapsed_s: float


def main(config: TrainConfig) -> int:
    """Train, and return the exit code: 0, or that of the signal that stopped it (130 for Ctrl-C)."""
    result = fit(config)
    codes = {number.name: code for number, code in EXIT_CODES.items()}
    code = codes.get(result.reason, 0)
    hard_exit(code)
    return code


def fit(config: TrainConfig, keep_going: Callable[[int, float], bool] | None = None) -> Result:
    """Train as `config` says, from the start or (config.resume) from where the run stopped.

    keep_going: asked after each evaluation, with the step and the validation loss; False ends the run.
    A resumed run takes all settings from `config` too: RunFolder(path).saved_config() has those it had.
    Errors: UserError for everything the user can mend.
    """
    folder = RunFolder(Path(config.out_dir))
    require(
        not config.resume or folder.path.is_dir(),
        f"no checkpoint to resume in {folder.path}: start without --resume, or check --out_dir",
    )
    if not config.resume:
        load_dataset(Path(config.data_dir))  # before a folder is made for a run that cannot begin
    with (
        one_at_a_time(),
        distributed_world(config.device) as world,
        StopRequest() as stop,
        ExitStack() as stack,
    ):
        if world.is_first:
            stack.enter_context(folder.locked())
        if world.broadcast_bool(lambda: folder.is_restart_of(config, world.job, restarted=world.restarted)):
            config = replace(config, resume=True, overwrite=False)
        with explain_out_of_memory(config, world):
            run = set_up(config, folder, world)
        run.keep_going = keep_going
        try:
            with explain_out_of_memory(config, world, run):
                start(run)
                reason = loop(run, stop)
        finally:
            run.metrics.close()
        if world.is_first:
            print_summary(run, reason)
    return Result(reason, run.progress.step, run.progress.best_val_loss, run.progress.elapsed_s)


RUNNING = threading.Lock()


@contextmanager
def one_at_a_time() -> Generator[None]:
    """Let one thread of this process train: PyTorch has one source of random numbers, which two would share.

    Errors: UserError if another thread trains already.
    """
    require(
        RUNNING.acquire(blocking=False),
        "another thread of this process is training, and their random numbers would mix: start one after the "
        "other, or in a process of its own",
    )
    try:
        yield
    finally:
        RUNNING.release()


@contextmanager
def explain_out_of_memory(config: TrainConfig, world: World, run: Run | None = None) -> Generator[None]:
    """Turn running out of memory, on whatever device, into a UserError that says what to change.

    run: None while it is being set up.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one; MPS and CPU raise it bare
        if not is_out_of_memory(error):
            raise
        micro_batch = -(-max_rank_batch(config, world) // run.num_micro_batches) if run else 1
        if run is None:
            fix = "give a smaller --n_layer or --n_embd"
        elif is_sharded(run.model) and micro_batch > 1:
            fix = f"give --micro_batch {micro_batch // 2}, which computes the same in smaller pieces"
        elif config.micro_batch not in ("auto", 1):
            fix = "give --micro_batch auto, which computes the same in pieces that fit"
        elif config.grad_checkpoint != "blocks":
            fix = "give --grad_checkpoint blocks, which computes the same in less memory"
        else:
            fix = "give a smaller --block_size or --n_embd"
        raise UserError(f"out of memory: {fix} (or end other programs that use the device)") from error


def start(run: Run) -> None:
    """Say the plan, compile, and save step 0.

    That first save finds a folder that cannot be written before hours of work, not after.
    """
    fit_to_memory(run)
    print_plan(run)
    work = run.work * (run.config.max_iters - run.progress.step)
    if pick_compile(run.config.compile, run.device, work):
        compile_model(run)
    if not run.config.resume:
        save(run, run.folder.last)


def compile_model(run: Run) -> None:
    """torch.compile the model and try it; if that fails, on whichever process, say why and go on without.

    Of a sharded model the blocks are compiled: between them its weights come and go. Shapes are fixed: those
    of the micro-batches, which all are compiled for here, before the clock starts.
    """
    say("Compiling the model (about a minute the first time)...")
    torch.compiler.reset()  # an earlier training of this process counts towards a limit of recompilations
    # PyTorch's cache does not tell vector instructions apart: another processor's give NaN, or a crash.
    compiler_cache.cache_key_tag = torch.backends.cpu.get_cpu_capability()
    plain = run.loss
    problems = run.world.all_gather(try_compile(run))
    if problems:
        warn(f"torch.compile failed, going on without it: {problems[0]}")
        run.loss = plain
    elif is_sharded(run.model):
        for block in run.model.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)
        forward_backward(run, *next_batch(run))
    run.model.zero_grad()
    run.kind.release_memory()


def try_compile(run: Run) -> list[str]:
    """Compile the loss and try it. Returns why that fails, in a line, or nothing. Waits for no other process.

    Of a model in parts, whose weights only all processes together have, a new block is compiled and tried.
    """
    try:
        if is_sharded(run.model):
            block = torch.compile(Block(run.model.config).to(run.device), dynamic=False)
            x = torch.zeros(1, run.config.block_size, run.config.n_embd, device=run.device)
            x.requires_grad_()
            with autocast(run.device, run.dtype):
                y = block(x, run.model.rotation)
            y.sum().backward()
        else:
            run.loss = torch.compile(run.loss, dynamic=False)
            forward_backward(run, *next_batch(run), sync=False)
    except Exception as error:  # no C compiler, an unsupported GPU, a fault of the compiler, ...
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            return []  # the first update sees to that
        return [next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)]
    return []


# --- step ---


def advance(run: Run) -> None:
    """Do one update; a device that runs ahead does it while the numbers of the one before are read."""
    if not run.pending:
        run.clock = time.perf_counter()
    run.pending.append(train_step(run))
    read_outcomes(run, ahead=1 if run.kind.is_async else 0)
    run.console.advance(run.progress.step)
    print_eta(run)


def read_outcomes(run: Run, ahead: int = 0) -> None:
    """Log the updates that were given to the device, but for the last `ahead` ones.

    The training time of an update ends when its numbers are there, and begins where that of the one
    before ended, if the device had both. Goes back to a checkpoint if too many in a row were broken.
    """
    while len(run.pending) > ahead:
        outcome = run.pending.popleft()
        numbers = read_result(run, outcome)
        seconds = time.perf_counter() - run.clock
        run.clock += seconds
        run.progress.elapsed_s += seconds
        run.pace.add(seconds)
        if run.progress.bad_steps >= MAX_BAD_STEPS:
            roll_back(run)
        elif not run.progress.bad_steps and outcome.step % run.config.log_interval == 0:
            record_step(run, outcome.step, numbers)


def roll_back(run: Run) -> None:
    """Return to the last good checkpoint, with the data in another order from there on.

    That is the newest; or, if the training broke again after going back to it, the best one.
    Errors: UserError if that has been tried MAX_ROLLBACKS times at the same place.
    """
    try_finish_save(run)
    saved = run.folder.newest_valid(warn, run.world, gather=not is_sharded(run.model))
    if int(saved.progress["step"]) <= run.progress.furthest_bad_step and run.folder.best.is_file():
        saved = load_checkpoint(run.folder.best)
    good, before = int(saved.progress["step"]), run.progress
    rollbacks = 1 if good > before.furthest_bad_step else before.rollbacks + 1
    require(
        rollbacks <= MAX_ROLLBACKS,
        f"the training breaks down near step {before.step} in every data order tried; step {good} is saved. "
        f"Try half the learning rate: {resume_command(run)} --learning_rate {run.config.learning_rate / 2:g}",
    )
    restore(run, saved)
    run.progress.shuffle_id = before.shuffle_id + 1
    run.progress.bad_steps, run.progress.rollbacks = 0, rollbacks
    run.progress.furthest_bad_step = max(before.step, before.furthest_bad_step)
    run.pending.clear()
    run.metrics.rewind(good, run.progress.evaluated_at)
    warn(f"Back to step {good}, with the data in another order from there on")


# --- evaluate ---


def evaluate(run: Run, stop: StopRequest) -> float | None:
    """Mean loss over the validation split, in nats per token; None if interrupted by a signal."""
    config = run.config
    batches = evaluation_batches(
        run.dataset.val, block_size=config.block_size, batch_size=config.batch_size, most=config.eval_iters
    )
    micro = math.ceil(config.batch_size / (run.num_micro_batches * run.world.size))
    losses: list[Tensor] = []  # on the device: nothing waits for them before the end
    pieces = [
        (starts[first : first + micro], length)
        for starts, length in batches
        for first in range(0, len(starts), micro)
    ]
    rounds = math.ceil(len(pieces) / run.world.size)
    model, interrupted = run.final_model.eval(), False
    with torch.no_grad(), eager_mode(), run.console.evaluating(rounds) as tick:
        for first in range(0, len(pieces), run.world.size):
            number = first + run.world.rank
            x, y = run.val_windows(*pieces[min(number, len(pieces) - 1)])
            with autocast(run.device, run.dtype):
                loss = model.loss(x, y)  # all processes: a model in parts takes them all
            if number < len(pieces):
                losses.append(loss * y.numel())
            tick()
            interrupted = bool(run.world.max_over_ranks(bool(stop.signal))[0])
            if interrupted:
                break
    model.train()
    if interrupted:
        return None
    sums = cast(list[float], torch.stack(losses).tolist() if losses else [])
    tokens = sum(len(starts) * length for starts, length in batches)
    return math.fsum(run.world.all_gather(sums)) / tokens  # the same in whatever order they come


def sample_text(run: Run) -> str:
    """A short text in the model's present style, always from the same seed."""
    generator = run.kind.generator(run.device, run.config.seed)
    prompt = torch.from_numpy(run.dataset.val[:1][None].astype(np.int64)).to(run.device)  # (1, 1)
    model = run.final_model.eval()
    with unsharded(model), eager_mode(), autocast(run.device, run.dtype):
        tokens = generate(model, prompt, num_tokens=SAMPLE_TOKENS, temperature=0.8, generator=generator)
        text = run.dataset.tokenizer.decode(int(token) for token in tokens)
    model.train()
    return text


def evaluate_and_record(run: Run, stop: StopRequest) -> None:
    """Evaluate, write it down, and save last.pt, and ckpt.pt too if this is the best so far."""
    progress = run.progress
    loss = evaluate(run, stop)
    if loss is None:
        return
    if not math.isfinite(loss):
        warn(f"step {progress.step}: validation loss {loss}")
        roll_back(run)
        return
    before = progress.best_val_loss
    best = loss < before
    progress.evaluated_at = progress.step
    progress.worse_evaluations = 0 if best else progress.worse_evaluations + 1
    numbers: dict[str, Any] = {"val_loss": loss, "best": best, "sample": sample_text(run)}
    bits = run.dataset.bits_per_byte(loss)
    if bits is not None:
        numbers["val_bits_per_byte"] = bits
    record(run, progress.step, numbers)
    if best:
        progress.best_val_loss = loss
        if not try_save(run, run.folder.best):
            progress.best_val_loss = before  # that of the ckpt.pt which is there
    try_save(run, run.folder.last)
    if run.keep_going is not None:
        run.stopped_by_callback = not run.keep_going(progress.step, loss)


# --- fit ---


def loop(run: Run, stop: StopRequest) -> str:
    """Step until there is a reason to stop, and return it (see Result)."""
    while True:
        reason, save_is_due = all_reduce_decisions(run, stop)
        evaluation_due = evaluation_is_due(run, reason)
        if run.pending and (reason or evaluation_due or save_is_due):
            read_outcomes(run)  # which may go back to a checkpoint: look again
            continue
        if evaluation_due or save_is_due:
            stop.save_asked = False  # before it is done: another signal may come while it is
        if evaluation_due:
            evaluate_and_record(run, stop)
            reason, save_is_due = all_reduce_decisions(run, stop)[0], False
        if reason:
            save_final(run)
            return reason
        if save_is_due and not run.progress.bad_steps:
            try_save(run, run.folder.last)
        advance(run)


def all_reduce_decisions(run: Run, stop: StopRequest) -> tuple[str, bool]:
    """Why to stop, and whether to save: what one process wants, all do, after the same step."""
    save_is_due = stop.save_asked or time.perf_counter() - run.saved_at >= run.config.save_seconds
    is_writing = run.writing is not None and not run.writing.digests.done()
    reason, save, writes = run.world.max_over_ranks(
        REASONS.index(reason_to_stop(run, stop)), save_is_due, is_writing
    )
    if run.writing and not writes:
        try_finish_save(run)
    return REASONS[reason], bool(save)


def save_final(run: Run) -> None:
    """Save the end of the training. Errors: UserError saying from where the run can be continued."""
    try:
        save_at_the_end(run)
    except UserError as error:
        raise UserError(
            f"{error}: step {run.saved_step} is saved and whole: make room, then {resume_command(run)}"
        ) from error


def reason_to_stop(run: Run, stop: StopRequest) -> str:
    """Why the run should stop now (see Result), "" if it should not."""
    config, progress = run.config, run.progress
    if stop.signal:
        return stop.signal.name
    if progress.step >= config.max_iters:
        return "finished"
    if config.max_seconds is not None and progress.elapsed_s >= config.max_seconds:
        return "time"
    if config.patience is not None and progress.worse_evaluations >= config.patience:
        return "patience"
    if run.stopped_by_callback:
        return "told"
    return ""


def evaluation_is_due(run: Run, reason: str) -> bool:
    """Whether to evaluate before the next step: at the interval and at the end, once for a step."""
    step = run.progress.step
    if run.progress.evaluated_at == step:
        return False
    return step % run.config.eval_interval == 0 or reason in ("finished", "time")


def record(run: Run, step: int, numbers: dict[str, Any]) -> None:
    """Send the numbers of a step to the readers, with the clocks."""
    clocks = {
        "step": step,
        "elapsed_s": round(run.progress.elapsed_s, 3),
        "wall_s": round(time.perf_counter() - run.started, 3),
    }
    run.metrics.write(clocks | numbers)


def record_step(run: Run, step: int, numbers: dict[str, float]) -> None:
    """Send an update's numbers to the readers, with the pace since the last ones."""
    pace = run.pace.take_window()
    tokens = run.config.batch_size * run.config.block_size
    left = pace * (run.config.max_iters - step)
    record(run, step, numbers | {"tokens_per_s": round(tokens / pace, 1), "left_s": left})
