"""EMA: an exponential moving average of the weights, evaluated and sampled in their place.

Example: update_ema(average, model, step, config)
"""

import math
from collections.abc import Callable
from typing import cast

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nanogpt.config import TrainConfig
from nanogpt.training.sparse import sparse_tables

TABLE_INTERVAL = 8
"""The average of a table with sparse gradients is updated once in so many updates, by as much as in all of
them: an update of the model touches few rows, and passing over all of them would take longer."""


def update_ema(average: nn.Module, model: nn.Module, step: int, config: TrainConfig) -> None:
    """Move the weights of `average` towards those of `model`, after update `step`, counted from 0."""
    tables = {id(table.weight) for table in sparse_tables(model).values() if table.sparse}
    pairs = list(zip(average.parameters(), model.parameters(), strict=True))
    move([pair for pair in pairs if id(pair[1]) not in tables], ema_decay(step, config))
    if tables and step % TABLE_INTERVAL == TABLE_INTERVAL - 1:
        decays = (ema_decay(step - ago, config) for ago in range(TABLE_INTERVAL))
        move([pair for pair in pairs if id(pair[1]) in tables], math.prod(decays))


def move(pairs: list[tuple[Tensor, Tensor]], decay: float) -> None:
    """Move each average by 1 - decay of the way to its weight."""
    update = cast(Callable[[list[Tensor], list[Tensor], int], None], get_ema_multi_avg_fn(decay))
    averages, weights = map(list, zip(*pairs, strict=True))
    update(averages, weights, 0)  # it ignores the number


def ema_decay(step: int, config: TrainConfig) -> float:
    """The decay of the EMA at update `step`: low at first, so that the first weights fade fast."""
    return min(config.ema_decay, (1 + step) / (10 + step))
