"""EMA: an exponential moving average of the weights, evaluated and sampled in their place.

Example: update_ema(average, model, ema_decay(step, config))
"""

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nanogpt.config import TrainConfig


def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the weights of `average` towards those of `model`, by 1 - decay of the way."""
    update = cast(Callable[[list[Tensor], list[Tensor], int], None], get_ema_multi_avg_fn(decay))
    update(list(average.parameters()), list(model.parameters()), 0)  # it ignores the number


def ema_decay(step: int, config: TrainConfig) -> float:
    """The decay of the EMA at update `step`: low at first, so that the first weights fade fast."""
    return min(config.ema_decay, (1 + step) / (10 + step))
