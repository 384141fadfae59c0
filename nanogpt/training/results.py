"""Results of updates: read once the device has computed them, checked for NaN, and logged.

Example: run.unread.append(train_step(run)); read_results(run, in_flight=1)
On an asynchronous device, results are read one update late, while it computes the next one.
"""

import math
from typing import Any

from nanogpt.terminal.console import warn
from nanogpt.training.recovery import MAX_BAD_STEPS, roll_back
from nanogpt.training.run import Run, UpdateResult


def read_results(run: Run, in_flight: int = 0) -> None:
    """Read and log results, oldest first, until `in_flight` are left. Rolls back after too many bad steps."""
    while len(run.unread) > in_flight:
        result = run.unread.popleft()
        numbers = read_result(run, result)
        run.progress.elapsed_s += run.clock.end_lap()
        if run.progress.bad_steps >= MAX_BAD_STEPS:
            roll_back(run)
        elif not run.progress.bad_steps and result.step % run.config.log_interval == 0:
            log_update(run, result.step, numbers)


def read_result(run: Run, result: UpdateResult) -> dict[str, float]:
    """Wait for the numbers of an update, and count it as a bad step if they are not finite.

    Returns train_loss (nats per token, mean of the batch), grad_norm (before clipping) and lr.
    """
    if result.ready:
        result.ready.synchronize()
    loss, norm = (value.item() for value in result.values)
    # A float16 gradient overflows from time to time. That skips the update too, but is not a bad step while
    # the scaler can still lower its scale (which is 1 without float16).
    overflowed = math.isfinite(loss) and not math.isfinite(norm) and run.scaler.get_scale() > 1
    if math.isfinite(loss) and math.isfinite(norm):
        run.progress.bad_steps = 0
    elif not overflowed:
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
