"""Deadline: end a training on time (--minutes), even if the machine becomes faster or slower meanwhile.

Example: keep_to_time(run)      # after each update
The learning rate is constant until the time left is what the cool-down takes. Then it falls linearly to its
minimum over the updates that still fit. If they turn out faster or slower, the rest of the decay gets another
end. Each decision is written into the settings (`--decays START:END`), and takes effect once a checkpoint has
it: so the learning rate stays a function of the step, a resumed run goes on in the same way, and the same
settings without --minutes give the same training.
"""

import math
import time
from dataclasses import replace
from statistics import median

import psutil

from nanogpt.config import decay_spans
from nanogpt.evaluation import SAMPLE_TOKENS, evaluate, sample_text
from nanogpt.machine.device import seconds_of
from nanogpt.terminal.console import say
from nanogpt.training.autosize import Text
from nanogpt.training.run import Deadline, Run
from nanogpt.training.snapshot import named_tensors

TOLERANCE = 0.03
"""Fraction of the whole time by which the forecast end may be off before it is decided anew."""

END_SECONDS = 0.4
"""Time from the last evaluation to the end of the process, besides writing: the loss curve, the exit."""

FILES_AT_END = 2
"""Checkpoints written in that time: ckpt.pt, and last.pt as a copy of it."""


def process_began() -> float:
    """The value of time.perf_counter() when this process began."""
    return time.perf_counter() - (time.time() - psutil.Process().create_time())


def updates_left(run: Run, deadline: Deadline) -> int:
    """Updates that fit in the time left beside the evaluations, but no more than the text is good for."""
    config, step = run.config, run.progress.step
    useful = Text.of(run.dataset).useful_tokens(tables=config.ngram_vocab > 0)
    useful = useful // (config.batch_size * config.block_size) - step
    assert config.minutes is not None
    update_s = median(deadline.update_s)
    evaluation_s = deadline.evaluation_s
    end_s = evaluation_s + FILES_AT_END * deadline.save_s + END_SECONDS
    left_s = 60 * config.minutes - deadline.last_s - end_s
    about = step + max(0, math.floor(left_s / (update_s + evaluation_s / config.eval_interval)))
    others = about // config.eval_interval - step // config.eval_interval
    return max(0, min(useful, math.floor((left_s - others * evaluation_s) / update_s)))


def measure_evaluation(run: Run) -> float:
    """Forecast the seconds of an evaluation from one batch and a few tokens of the sample.

    All processes call it together, and take the time of the slowest one.
    """
    config, val, few = run.config, run.dataset.val, SAMPLE_TOKENS // 15
    windows = run.validation_windows(1)
    batch = config.batch_size * config.block_size
    batches = min(len(val) / batch, config.eval_iters or math.inf)

    def validate() -> None:
        """Validate on one batch."""
        evaluate(run.eval_model, run.val_loader, windows, dtype=run.dtype, world=run.world)

    def sample() -> None:
        """Sample a few tokens."""
        sample_text(run.eval_model, run.dataset, run.device, run.dtype, config.seed, num_tokens=few)

    for action in (validate, sample):
        action()  # warm-up
    seconds = seconds_of(validate, run.device) * max(1.0, batches)
    seconds += seconds_of(sample, run.device) * SAMPLE_TOKENS / few
    return run.world.max_over_ranks(round(1e6 * seconds))[0] / 1e6


def keep_to_time(run: Run) -> None:
    """After an update, decide whether the learning rate begins to decay, or decays to another end."""
    deadline, config, step = run.deadline, run.config, run.progress.step
    if config.minutes is None or deadline is None or step >= config.max_iters:
        return
    wait_for_record(run, deadline)
    if not deadline.state_bytes and step > run.first_step:  # from now on the optimizers have their states
        deadline.state_bytes = sum(tensor.nbytes for tensor in named_tensors(run).values())
    save_s = deadline.state_bytes / run.checkpointer.bytes_per_second
    if not deadline.read_lap(run.world, run.progress, save_s):
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
        is_new = is_new and deadline.unrecorded is None
    if is_new:
        updates_of_a_save = math.ceil(deadline.save_s / median(deadline.update_s))
        start = step + min(updates_of_a_save, (end - step) // 4)
        if config.decays:  # decays are sorted by their start, and the newest counts
            start = max(start, decay_spans(config.decays)[-1][0] + 1)
        end = max(end, start + 1)
        deadline.decided_s, deadline.unrecorded = deadline.last_s, step
        run.config = replace(config, max_iters=end, decays=(*config.decays, f"{start}:{end}"))
        run.checkpointer.begin_save(run)
        say(f"The learning rate falls from step {start:,} to step {end:,}, when the time is over")
        wait_for_record(run, deadline)
    run.console.set_total(run.config.max_iters)


def wait_for_record(run: Run, deadline: Deadline) -> None:
    """Make sure that a checkpoint has the newest decision before it takes effect.

    Raises: UserError if none can be written.
    """
    start, _ = decay_spans(run.config.decays)[-1] if run.config.decays else (0, 0)
    if deadline.unrecorded is None or run.progress.step < start:
        return
    run.checkpointer.finish_save()
    if (run.checkpointer.saved_step or 0) < deadline.unrecorded:  # that save failed
        run.checkpointer.save(run)
    deadline.unrecorded = None
