"""EMA: an exponential moving average of the weights, evaluated and sampled in their place.

Example: update_ema(average, model, ema_decay(step, config))
"""

from torch import Tensor, nn

from nanogpt.config import TrainConfig
from nanogpt.training import foreach


def update_ema(average: nn.Module, model: nn.Module, decay: float | Tensor) -> None:
    """Move the weights of `average` towards those of `model`, by 1 - decay of the way."""
    foreach.lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def ema_decay(step: int, config: TrainConfig) -> float:
    """The decay of the EMA at update `step`: low at first, so that the first weights fade fast."""
    return min(config.ema_decay, (1 + step) / (10 + step))
