"""EMA: an exponential moving average of the weights, evaluated and sampled in their place.

Example: update_ema(average, model, step, config)
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from nanogpt.config import TrainConfig
from nanogpt.training import foreach
from nanogpt.training.sparse import sparse_tables

TABLE_INTERVAL = 8
"""The average of a table with sparse gradients is updated once every this many updates, by as much as in all
of them: an update touches few rows, and passing over all of them would take longer than the update."""


def update_ema(
    average: nn.Module, model: nn.Module, step: int, config: TrainConfig, decay: Tensor | None = None
) -> None:
    """Move the weights of `average` towards those of `model`, after update `step`, counted from 0.

    decay: ema_decay(step, config) as a scalar on the device; None: as a number.
    """
    tables = {id(table.weight) for table in sparse_tables(model).values() if table.sparse}
    pairs = list(zip(average.parameters(), model.parameters(), strict=True))
    rest = [pair for pair in pairs if id(pair[1]) not in tables]
    move(rest, ema_decay(step, config) if decay is None else decay)
    if tables and step % TABLE_INTERVAL == TABLE_INTERVAL - 1:
        decays = (ema_decay(step - ago, config) for ago in range(TABLE_INTERVAL))
        move([pair for pair in pairs if id(pair[1]) in tables], math.prod(decays))


def move(pairs: Sequence[tuple[Tensor, Tensor]], decay: float | Tensor) -> None:
    """Move each average towards its weight, by 1 - decay of the way."""
    foreach.lerp_([average for average, _ in pairs], [weight for _, weight in pairs], 1 - decay)


def ema_decay(step: int, config: TrainConfig) -> float:
    """The decay of the EMA at update `step`: low at first, so that the first weights fade fast."""
    return min(config.ema_decay, (1 + step) / (10 + step))
