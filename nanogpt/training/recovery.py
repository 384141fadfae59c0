"""Recovery from a training that breaks down: roll back to a checkpoint, and go on with another shuffle.

Example: if run.progress.bad_steps >= MAX_BAD_STEPS: roll_back(run)
"""

from nanogpt.checkpoint.format import load_checkpoint
from nanogpt.distributed.parallelize import is_sharded
from nanogpt.errors import UserError
from nanogpt.terminal.console import warn
from nanogpt.training.report import resume_command
from nanogpt.training.run import Run

MAX_BAD_STEPS = 3
"""The run is rolled back after this many updates in a row whose loss or gradient is not finite."""

MAX_ROLLBACKS = 3
"""How often the run is rolled back without getting past the place where it broke down."""


def roll_back(run: Run) -> None:
    """Go back to a good checkpoint, with the data shuffled differently from there on.

    That is the newest one or, if the training broke down again after going back to it, the best one.
    Raises: UserError after MAX_ROLLBACKS tries at one place.
    """
    run.checkpointer.try_finish_save()
    saved = run.folder.newest_valid(warn, run.world, gather=not is_sharded(run.model))
    broken = run.progress  # restoring makes a new one
    if int(saved.progress["step"]) <= broken.furthest_bad_step and run.folder.best.is_file():
        saved = load_checkpoint(run.folder.best)
    good_step = int(saved.progress["step"])
    rollbacks = 1 if good_step > broken.furthest_bad_step else broken.rollbacks + 1
    if rollbacks > MAX_ROLLBACKS:
        raise UserError(
            f"the training breaks down near step {broken.step} in every data order tried; step {good_step} "
            f"is saved. Try half the learning rate: {resume_command(run)} "
            f"--learning_rate {run.config.learning_rate / 2:g}"
        )
    run.checkpointer.restore(run, saved)
    run.progress.shuffle_id = broken.shuffle_id + 1
    run.progress.bad_steps, run.progress.rollbacks = 0, rollbacks
    run.progress.furthest_bad_step = max(broken.step, broken.furthest_bad_step)
    run.unread.clear()
    run.metrics.rewind(good_step, run.progress.evaluated_at)
    warn(f"Back to step {good_step}, with the data in another order from there on")
