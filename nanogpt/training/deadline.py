"""Deadline: end a training when its time is over (--minutes), whatever becomes of the machine's speed.

Example: keep_to_time(run)      # after each update
The rate is constant until the time left is what the cool-down takes. Then the updates that still fit are
counted, and the rate falls linearly to its minimum over them. If they turn out faster or slower, the rest of
the decay gets another end. Each decision is written into the settings (`--decays START:END`) and saved before
it is acted on: the rate stays a function of the step, a resumed run goes on in the same way, and the same
settings without --minutes give the same training.
"""

import math
import time
from dataclasses import replace
from statistics import median

import psutil

from nanogpt.console import say
from nanogpt.evaluation import SAMPLE_TOKENS
from nanogpt.training.run import Deadline, Run

TOLERANCE = 0.03
"""Share of the whole time by which the end may be off before it is decided anew."""

END_SECONDS = 0.4
"""Time that the end takes after the last evaluation: a save, the loss curve, the end of the process."""


def process_began() -> float:
    """The value of time.perf_counter() when this process began."""
    return time.perf_counter() - (time.time() - psutil.Process().create_time())


def updates_left(run: Run, deadline: Deadline) -> int:
    """The number of updates that fit into the time left, besides the evaluations that are due."""
    config, step = run.config, run.progress.step
    assert config.minutes is not None
    update_s = median(deadline.update_s)
    evaluation_s = deadline.evaluation_s or forecast_evaluation(run, update_s)
    left_s = 60 * config.minutes - END_SECONDS - deadline.last_s - evaluation_s  # that of the end
    about = step + max(0, math.floor(left_s / (update_s + evaluation_s / config.eval_interval)))
    others = about // config.eval_interval - step // config.eval_interval
    return max(0, math.floor((left_s - others * evaluation_s) / update_s))


def forecast_evaluation(run: Run, update_s: float) -> float:
    """Forecast the seconds of an evaluation from those of an update, of which a forward pass is a third."""
    config = run.config
    tokens = len(run.dataset.val)
    if config.eval_iters:
        tokens = min(tokens, config.eval_iters * config.batch_size * config.block_size)
    sample_s = SAMPLE_TOKENS * update_s / 3 / config.batch_size
    return tokens / (config.batch_size * config.block_size) * update_s / 3 + sample_s


def keep_to_time(run: Run) -> None:
    """Decide, after an update, whether the rate begins to decay, or decays to another end."""
    deadline, config, step = run.deadline, run.config, run.progress.step
    if config.minutes is None or deadline is None or step >= config.max_iters:
        return
    if not deadline.read_lap(run.world, run.progress):
        return
    run.progress.used_s = deadline.last_s
    end = max(step + updates_left(run, deadline), step + 1)
    if not config.decays:
        run.config = replace(config, max_iters=end)  # a forecast, for the progress bar
        is_new = end - step <= config.cooldown * end
    else:
        enough_s = TOLERANCE * 60 * config.minutes
        off_s = abs(end - config.max_iters) * median(deadline.update_s)
        is_new = off_s > enough_s and deadline.last_s - deadline.decided_s > enough_s
    if is_new:
        deadline.decided_s = deadline.last_s
        run.config = replace(config, max_iters=end, decays=(*config.decays, f"{step}:{end}"))
        run.checkpointer.save(run)
        say(f"The learning rate falls from step {step:,} to step {end:,}, when the time is over")
    run.console.set_total(run.config.max_iters)
