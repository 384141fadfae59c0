"""Decisions: whether the loop stops, evaluates or saves next, the same on all processes.

Example: due = all_reduce_decisions(run)
"""

from typing import NamedTuple

from nanogpt.checkpoint.format import Progress
from nanogpt.config import TrainConfig
from nanogpt.training.deadline import keep_to_time
from nanogpt.training.run import Run, StopReason


class Due(NamedTuple):
    """What the next round of the loop has to do."""

    reason: StopReason | None
    """Why to stop; None: go on, or evaluate first."""
    evaluation: bool
    save: bool


def all_reduce_decisions(run: Run) -> Due:
    """Decide what is due. Where processes disagree, all do what one of them wants, after the same step.

    This also completes a save that all processes have written, since only here do all know that. An
    evaluation waits for the save: its loss is compared with that of a ckpt.pt that is in place.
    """
    keep_to_time(run)
    reason = stop_reason(run)
    save = run.stop.save_asked or run.checkpointer.is_due(run.config.save_seconds)
    highest, save, writing = run.world.max_over_ranks(reason or 0, save, run.checkpointer.is_writing)
    reason = StopReason(highest) if highest else None
    evaluation = is_evaluation_due(run, reason)
    if evaluation or not writing:
        run.checkpointer.try_finish_save()
    return Due(None if evaluation else reason, evaluation, bool(save) and not run.progress.bad_steps)


def stop_reason(run: Run) -> StopReason | None:
    """Why this process would stop now; None: it would go on."""
    config, progress = run.config, run.progress
    if run.stop.signal:
        return StopReason[run.stop.signal.name]
    if (reason := end_of(config, progress)) is not None:
        return reason
    if run.stopped_by_callback:
        return StopReason.CALLBACK
    return None


def end_of(config: TrainConfig, progress: Progress) -> StopReason | None:
    """Why a training with these settings is over; None: it is not."""
    if progress.step >= config.max_iters:
        return StopReason.FINISHED
    if config.max_seconds is not None and progress.elapsed_s >= config.max_seconds:
        return StopReason.TIME
    if config.patience is not None and progress.worse_evaluations >= config.patience:
        return StopReason.PATIENCE
    return None


def is_evaluation_due(run: Run, reason: StopReason | None) -> bool:
    """Whether to evaluate now: at the interval and at the end, once per step, and not at step 0."""
    step = run.progress.step
    if run.progress.evaluated_at == step or (reason and reason.is_signal):
        return False
    if reason in (StopReason.FINISHED, StopReason.TIME):
        return True
    # With --minutes, skip an evaluation shortly before the last one.
    soon = run.deadline is not None and run.config.max_iters - step < run.config.eval_interval / 4
    return step % run.config.eval_interval == 0 and not soon
