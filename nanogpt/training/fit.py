"""One training, from its settings to its result: lock the run folder, set up, train, report.

Run:     python train.py --max_iters 1000            then: python train.py --resume
Example: result = fit(TrainConfig(data_dir="data", out_dir="out", max_iters=1000))
Reads the data folder and writes the run folder (checkpoint/run_dir.py lists its files). The loop itself is in
trainer.py.
"""

import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nanogpt.checkpoint.format import load_checkpoint
from nanogpt.checkpoint.kept import refuse_kept
from nanogpt.checkpoint.run_dir import PER_COMMAND_SETTINGS, RunFolder
from nanogpt.config import TrainConfig, from_dict, to_dict
from nanogpt.data.dataset import Dataset, load_dataset
from nanogpt.distributed.world import World, distributed_world, hard_exit, local_device
from nanogpt.errors import UserError, require
from nanogpt.machine.device import pick_device
from nanogpt.terminal.console import say, silence, warn
from nanogpt.training.adapters import save_adapters
from nanogpt.training.autosize import Text, changed_settings, choose_settings
from nanogpt.training.compilation import compile_model, pick_compile
from nanogpt.training.cuda_graph import UpdateGraph, pick_graph
from nanogpt.training.deadline import measure_evaluation, process_began
from nanogpt.training.out_of_memory import explain_training_memory, fit_to_memory
from nanogpt.training.report import print_plan, print_summary
from nanogpt.training.run import Deadline, Run, StopReason
from nanogpt.training.setup import set_up
from nanogpt.training.stopping import StopRequest
from nanogpt.training.trainer import forward_backward, next_batch, train, update


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    reason: str
    """finished, time, patience, callback (keep_going returned False), or the name of a signal: SIGINT, ..."""
    step: int
    """Updates done."""
    best_val_loss: float
    """Nats per token."""
    elapsed_s: float
    """Seconds spent in updates."""
    exit_code: int = 0
    """0, or the exit code of the signal that stopped the run (130 for Ctrl-C)."""


def main(config: TrainConfig) -> int:
    """Train. Returns the exit code; one of several processes exits here instead."""
    result = fit(config, began=process_began())
    hard_exit(result.exit_code)
    return result.exit_code


def fit(
    config: TrainConfig,
    keep_going: Callable[[int, float], bool | None] | None = None,
    began: float | None = None,
    *,
    quiet: bool = False,
) -> Result:
    """Train as `config` says, from the start or (config.resume) from where the run stopped.

    keep_going: called after each evaluation with the step and the validation loss; False ends the run, None
    does not. began: value of time.perf_counter() from which config.minutes counts; None: now.
    quiet: print and show nothing.
    A resumed run takes all settings from `config`, except for those that config.minutes has chosen. To keep
    all old settings, pass RunFolder(path).saved_config().
    Raises: UserError for everything that the user can fix.
    """
    with silence(quiet):
        return run_to_end(config, keep_going, time.perf_counter() if began is None else began)


def run_to_end(
    config: TrainConfig, keep_going: Callable[[int, float], bool | None] | None, began: float
) -> Result:
    """Train to the end. Arguments: see fit."""
    folder = RunFolder(Path(config.out_dir))
    dataset: Dataset | None = None
    if config.resume:
        refuse_kept(folder.path)
        missing = f"no checkpoint to resume in {folder.path}: start without --resume, or check --out_dir"
        require(folder.path.is_dir(), missing)
    else:
        dataset = load_dataset(Path(config.data_dir))  # fails before a run folder is made
    with (
        one_at_a_time(),
        StopRequest() as stop,  # around the world: else torchrun's SIGTERM may cut off its error message
        distributed_world(config.device) as world,
        ExitStack() as stack,
    ):
        if world.is_first:
            stack.enter_context(folder.locked())
        if world.broadcast_bool(lambda: folder.is_restart_of(config, world.job, restarted=world.restarted)):
            config = replace(config, resume=True, overwrite=False)
        if config.resume and config.minutes:
            config = with_earlier_choices(config, folder.saved_config())
        with explain_training_memory(config, world):
            if config.minutes and dataset and not config.resume:
                config = settings_for_minutes(config, dataset, world)
            run = set_up(config, folder, world)
        if config.minutes:
            run.deadline = Deadline(began - run.progress.used_s)
        run.stop, run.callback = stop, keep_going
        try:
            with explain_training_memory(config, world, run):
                start(run)
                reason = train(run)
        finally:
            run.checkpointer.close()
            run.metrics.close()
        if world.is_first:
            export_adapters(run)
            print_summary(run, reason)
    return result_of(run, reason)


def settings_for_minutes(config: TrainConfig, dataset: Dataset, world: World) -> TrainConfig:
    """Choose the settings that --minutes leaves open: the first process measures, and all take its choice."""
    chosen: list[dict[str, Any]] = []
    if world.is_first:
        device = pick_device(local_device(config.device, world))
        chosen = [to_dict(choose_settings(config, Text.of(dataset), device, world.size))]
    return from_dict(TrainConfig, world.all_gather(chosen)[0])


def with_earlier_choices(config: TrainConfig, saved: TrainConfig | None) -> TrainConfig:
    """The settings of a resumed run, with the choices that --minutes made when it started."""
    if saved is None or saved.minutes is None:
        return config
    given = changed_settings(config) | {*config.fixed, *PER_COMMAND_SETTINGS}
    chosen = {item.name: getattr(saved, item.name) for item in fields(config) if item.name not in given}
    return replace(config, **chosen | {"fixed": saved.fixed})


def start(run: Run) -> None:
    """Print the plan, compile, and save step 0, so that an unwritable folder shows now, not after hours."""
    fit_to_memory(run)
    print_plan(run)
    flops = run.flops_per_update * (run.config.max_iters - run.progress.step)
    if pick_compile(run.config.compile, run.device, flops):
        compile_model(run, forward_backward)
    if pick_graph(run):
        run.graph = UpdateGraph(update, next_batch)
    if run.deadline is not None:
        run.deadline.evaluation_s = measure_evaluation(run)
    if not run.config.resume:
        run.checkpointer.save(run)


def export_adapters(run: Run) -> None:
    """With LoRA, also write the adapters of ckpt.pt for peft. A failure is only reported."""
    if not run.config.lora_rank or not run.folder.best.is_file():
        return
    folder = run.folder.adapter
    try:
        if save_adapters(folder, load_checkpoint(run.folder.best)):
            say(f"Adapters for peft: {folder}")
    except ModuleNotFoundError as error:
        warn(f"No {folder}: {error.name} is not installed (pip install nanogpt[finetune])")
    except (UserError, OSError) as error:
        warn(f"No {folder}: {error}")


def result_of(run: Run, reason: StopReason) -> Result:
    """The result of a run that has stopped."""
    progress = run.progress
    return Result(reason.label, progress.step, progress.best_val_loss, progress.elapsed_s, reason.exit_code)


RUNNING = threading.Lock()


@contextmanager
def one_at_a_time() -> Generator[None]:
    """Let one thread of this process train at a time: two would share PyTorch's random-number generator.

    Raises: UserError if another thread is training.
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
