"""Parameter groups, the optimizer, and the learning-rate schedule.

Use:    optimizer = adamw(model, config); set_learning_rate(optimizer, learning_rate(step, config))
Does not know the data, the loop or the device.
"""

import math

import torch
from torch import nn

from nanogpt.config import TrainConfig


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019), fused, with weight decay on matrices alone.

    Decay pulls weights towards zero, which means something for matrices and embeddings; biases
    and layer-norm gains (one dimension) are left free.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of update number `step`; the first update is number 0.

    Linear warm-up, then a cosine (Loshchilov & Hutter, 2017) that reaches config.min_lr times the
    highest rate at config.max_iters.
    """
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    if step >= config.max_iters:
        return config.learning_rate * config.min_lr
    progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))  # 1 -> 0
    return config.learning_rate * (config.min_lr + (1 - config.min_lr) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate
