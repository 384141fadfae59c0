"""Report of a training to the user: the plan, the expected time (ETA), and the summary at the end.

Example: print_plan(run); print_eta(run); print_summary(run, reason)
print_summary also draws loss.png, and shows it in a notebook.
"""

import json
import shlex

import numpy as np
import torch

from nanogpt.checkpoint.kept import kept_checkpoints
from nanogpt.checkpoint.validation import state_names
from nanogpt.config import TrainConfig
from nanogpt.distributed.dtensor import parameters_of
from nanogpt.distributed.parallelize import is_sharded
from nanogpt.machine.cores import usable_cores
from nanogpt.machine.device import name_of
from nanogpt.terminal.console import command, in_notebook, say, show_in_notebook, warn
from nanogpt.training.optimizer import trained_parameters
from nanogpt.training.plot import plot_losses
from nanogpt.training.run import Run, StopReason
from nanogpt.units import MIB, duration

ETA_AFTER_SECONDS, ETA_AFTER_STEPS = 2.0, 3
"""The ETA is printed after this much training time and this many steps have been measured."""

ONE_HOUR = 3600.0

BUSY_CORES = 0.5
"""A line reports other programs that keep more cores busy than this."""

MAX_ADAPTED = 0.05
"""Size of adapters, relative to the model, above which a line suggests a lower --lora_rank."""


def print_plan(run: Run) -> None:
    """Print the plan: model, device, dtype, number of steps, memory, micro-batches."""
    config, progress = run.config, run.progress
    tokens = config.batch_size * config.block_size
    say(f"Starting training on {run.device.type.upper()}...")
    say(
        f"Model: {run.model.num_parameters():,} parameters, {name_of(run.dtype)}, "
        f"vocabulary of {run.dataset.tokenizer.vocab_size}"
    )
    if config.lora_rank:
        say(f"LoRA: {describe_adapters(run)}")
    say(f"Arithmetic: {name_of(run.dtype)} ({run.precision.reason})")
    if config.optimizer == "muon":
        say(f"Muon orthogonalizes in {name_of(run.muon_precision.dtype)} ({run.muon_precision.reason})")
    if run.dataset.counted is not None:
        say(f"Loss: on completions alone, {run.dataset.counted['train']:,} of the training tokens")
    start = f", from step {progress.step:,}" if config.resume else ""
    say(
        f"Plan: {max(0, config.max_iters - progress.step):,} steps of {tokens:,} tokens, "
        f"{run.sampler.steps_per_epoch:,.1f} steps an epoch{start}"
    )
    activations = f"{run.memory.activations / MIB:,.1f} MiB for" if run.memory else "not counting"
    say(
        f"A step: {run.flops_per_update / 1e9:,.1f} GFLOP; {constant_bytes(run) / MIB:,.1f} MiB for "
        f"weights, gradients and optimizer state, {activations} activations"
    )
    if run.world.size > 1 or run.num_micro_batches > 1:
        say(f"Batch: {describe_batch(config.batch_size, run.world.size, run.num_micro_batches)}")


def describe_adapters(run: Run) -> str:
    """The size of the adapters, absolute and relative to the model, in words."""
    total = run.model.num_parameters()
    trained = sum(parameter.numel() for parameter in trained_parameters(run.model).values())
    share = trained / (total - trained)
    advice = "" if share <= MAX_ADAPTED else ": that is much for adapters, a lower --lora_rank trains fewer"
    return f"{trained:,} parameters in adapters are trained, {share:.1%} of the model{advice}"


def constant_bytes(run: Run) -> float:
    """Bytes that this process always holds: weights, their EMA, gradients and optimizer state."""
    if run.memory:
        return run.memory.held
    weights = sum(parameter.nbytes for parameter in run.model.parameters())
    state_bytes = sum(
        parameter.nbytes * len({*state_names(optimizer)} - {"step"})
        for optimizer in run.optimizers
        for parameter in parameters_of(optimizer)
    )
    gradients = sum(parameter.nbytes for parameter in trained_parameters(run.model).values())
    total = weights * (2 if run.ema_model else 1) + gradients + state_bytes
    return total / (run.world.size if is_sharded(run.model) else 1)


def describe_batch(batch_size: int, processes: int, num_micro_batches: int) -> str:
    """How a batch is split into micro-batches, in words. num_micro_batches: per process."""
    local_batches = split_sizes(batch_size, processes)
    sizes = [size for local in local_batches for size in split_sizes(local, min(num_micro_batches, local))]
    each = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} or {max(sizes)}"
    among = f"{processes} processes x " if processes > 1 else ""
    count = min(num_micro_batches, max(local_batches))
    noun = "micro-batch" if count == 1 else "micro-batches"
    return f"{batch_size} sequences = {among}{count} {noun} of {each}"


def split_sizes(total: int, count: int) -> list[int]:
    """Sizes of `count` shares of `total`, as even as possible."""
    return [len(share) for share in np.array_split(np.arange(total), count)]


def print_eta(run: Run) -> None:
    """Print the expected training time (ETA), once, after the first measured steps."""
    clock, config = run.clock, run.config
    if run.eta_printed or clock.steps < ETA_AFTER_STEPS or clock.seconds < ETA_AFTER_SECONDS:
        return
    run.eta_printed = True
    seconds_per_step = clock.seconds / clock.steps
    expected = seconds_per_step * (config.max_iters - run.progress.step)
    if config.max_seconds is not None:
        expected = min(expected, config.max_seconds - run.progress.elapsed_s)
    pace = f"{seconds_per_step * 1000:,.0f} ms a step, evaluation not counted"
    say(f"Expected: {duration(expected)} more ({pace})")
    others, cores = run.core_watch.held_by_others(), usable_cores()
    if (
        run.kind.shares_memory
        and others > BUSY_CORES
        and others + torch.get_num_threads() > cores + BUSY_CORES
    ):
        say(
            f"Other programs hold {others:.1f} of {cores} cores and slow this training down: end them, "
            "or try fewer threads (OMP_NUM_THREADS)"
        )
    if expected > ONE_HOUR and run.kind.shares_memory and config.preset != "cpu":
        say("That is long for a CPU: --preset cpu trains a smaller model in a minute or two")


def print_summary(run: Run, reason: StopReason) -> None:
    """Print why the run ended and what to do next; draw the loss curve unless a signal stopped the run."""
    config, progress, folder = run.config, run.progress, run.folder
    if reason.is_signal:
        say(f"Stopped at step {progress.step} and saved. To continue: {resume_command(run)}")
        return
    why = {
        StopReason.FINISHED: f"{progress.step:,} steps done",
        StopReason.TIME: f"--max_seconds {config.max_seconds:g} reached" if config.max_seconds else "",
        StopReason.CALLBACK: f"{progress.step:,} steps done, then stopped by keep_going",
        StopReason.PATIENCE: f"no better loss in {config.patience} evaluations",
    }
    say(f"Finished: {why[reason]}, in {duration(progress.elapsed_s)} of training")
    say(f"Best validation loss: {progress.best_val_loss:.4f} ({folder.best})")
    if kept := kept_checkpoints(folder.kept):
        say(f"Kept checkpoints: {len(kept)}, from step {min(kept):,} to {max(kept):,} ({folder.kept})")
    try:
        plot_losses(folder.metrics, folder.plot)
        say(f"Loss curve: {folder.plot}")
        show_in_notebook(folder.plot)
    except Exception as error:  # the training is saved: a failed plot must not fail it
        warn(f"No loss curve: {error}")
    say(next_step(run))


def next_step(run: Run) -> str:
    """The line that suggests what to do with the model: a command or, in a notebook, Python."""
    if in_notebook():
        return f"Next: model = load_model({json.dumps(run.config.out_dir)})"
    is_default = run.config.out_dir == TrainConfig.out_dir
    checkpoint = [] if is_default else ["--checkpoint", str(run.folder.best)]
    return f"Now try: {shlex.join([*command('sample'), *checkpoint])}"


def resume_command(run: Run) -> str:
    """The command that resumes the run with the same number of processes or, in a notebook, the call."""
    if in_notebook():
        return "fit(TrainConfig(..., resume=True)), with the same settings"
    out_dir = run.config.out_dir
    folder = [] if out_dir == TrainConfig.out_dir else ["--out_dir", out_dir]
    start = command("train")
    if run.world.size > 1:
        start = ["torchrun", f"--nproc_per_node={run.world.local_size}", "train.py"]
    return shlex.join([*start, "--resume", *folder])
