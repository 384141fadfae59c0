"""Parameter groups, the optimizers, and the learning-rate schedule.

Use:    optimizers = build_optimizers(model, config)
        set_learning_rate(optimizers, lr_multiplier(step, config))
Does not know the data, the loop or the device.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nanogpt.config import TrainConfig
from nanogpt.distributed.dtensor import full_tensor, is_dtensor, shard_like

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, chosen for speed near zero (Jordan et al., 2024)."""

STACK = 2**24
"""Elements orthogonalised at once, by all processes together: fast enough, and small beside activations."""


def build_optimizers(
    model: nn.Module, config: TrainConfig, muon_dtype: torch.dtype, rank: int = 0, size: int = 1
) -> list[torch.optim.Optimizer]:
    """The optimizers of config.optimizer, each for its own parameters, on process `rank` of `size`.

    adamw: one for everything. muon: Muon for the matrices inside the blocks, AdamW for
    embeddings, the head and whatever has one dimension. muon_dtype: see Muon.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if config.optimizer == "adamw":
        return [adamw([p for _, p in named], config)]
    matrices = [p for name, p in named if name.startswith("blocks.") and p.dim() == 2]
    chosen = set(map(id, matrices))
    rest = [p for _, p in named if id(p) not in chosen]
    return [adamw(rest, config), Muon(matrices, config, muon_dtype, rank, size)]


def adamw(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019), fused, with weight decay on matrices alone.

    Decay pulls weights towards zero, which means something for matrices and embeddings; biases
    and norms' gains (one dimension) are left free.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al., 2024): every direction of a matrix learns at one rate.

    Matrices of equal shape are stacked and orthogonalised in one batch of products; wide ones
    are treated as their transposes, so that the two layers of an MLP share a batch.
    dtype: of the products, whose result need not be exact: the one that this device multiplies fast.
    """

    found_inf: Tensor | None = None

    def __init__(  # noqa: PLR0917
        self,
        matrices: Iterable[nn.Parameter],
        config: TrainConfig,
        dtype: torch.dtype,
        rank: int = 0,
        size: int = 1,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(
            matrices, {"lr": config.muon_lr, "momentum": momentum, "weight_decay": config.weight_decay}
        )
        self.dtype, self.rank, self.size = dtype, rank, size

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every matrix that has a gradient.

        If `found_inf`, a scalar on the device, is set and 1, all stays as it is (as in torch's fused AdamW).
        """
        for group in self.param_groups:
            stacks: dict[tuple[int, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shape = (max(parameter.shape), min(parameter.shape))
                    stacks.setdefault(shape, []).append(parameter)
            for (rows, columns), matrices in stacks.items():
                most = max(self.size, STACK // (rows * columns))
                for first in range(0, len(matrices), most):
                    self.update(matrices[first : first + most], group)

    def momentum(self, parameter: Tensor, decay: float) -> Tensor:
        """Nesterov's average of the gradients, whole, the matrix stood upright."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        if self.found_inf is not None:
            gradient = torch.where(self.found_inf > 0, state["momentum"], gradient)
        average: Tensor = state["momentum"].lerp_(gradient, 1 - decay)
        ahead = gradient.lerp(average, decay)
        if self.dtype == torch.bfloat16 and is_dtensor(ahead):
            ahead = ahead.to(self.dtype)  # as orthogonalize would: half of it has to travel
        ahead = full_tensor(ahead)
        return ahead if ahead.shape[0] >= ahead.shape[1] else ahead.T

    def update(self, matrices: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Move matrices of one shape along their orthogonalised momenta."""
        momenta = torch.stack([self.momentum(p, group["momentum"]) for p in matrices])  # (N, R, C), R >= C
        directions = (
            orthogonalize(momenta, self.dtype) if self.size == 1 else self.orthogonalize_distributed(momenta)
        )
        decay = group["lr"] * group["weight_decay"]
        if self.found_inf is not None:
            directions, decay = directions * (1 - self.found_inf), decay * (1 - self.found_inf)
        for parameter, direction in zip(matrices, directions, strict=True):
            rows, columns = parameter.shape
            parameter.mul_(1 - decay)
            scale = group["lr"] * max(1.0, rows / columns) ** 0.5
            upright = direction if rows >= columns else direction.T
            parameter.add_(shard_like(upright, parameter), alpha=-scale)

    def orthogonalize_distributed(self, momenta: Tensor) -> Tensor:
        """orthogonalize, each process its part of the matrices, (N, R, C). They travel in self.dtype."""
        import torch.distributed as dist

        each = -(-len(momenta) // self.size)
        mine = momenta[self.rank * each :][:each]
        part = momenta.new_zeros(each, *momenta.shape[1:], dtype=self.dtype)
        if len(mine):
            part[: len(mine)] = orthogonalize(mine, self.dtype)
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part)
        return torch.cat(parts)[: len(momenta)].to(momenta.dtype)


def orthogonalize(matrices: Tensor, dtype: torch.dtype, rounds: int = 5) -> Tensor:
    """Bring the singular values of each matrix near 1 by Newton-Schulz. (N, R, C), R >= C, likewise.

    dtype: of the products and the result's digits; all that they hold is at most about 1.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.transpose(1, 2)  # (N, C, R)
    if dtype != torch.float16:  # whose range does not hold a norm
        x = x.to(dtype)
    x = nn.functional.normalize(x.flatten(1)).view_as(x).to(dtype)  # to Frobenius norm 1
    for _ in range(rounds):
        gram = x @ x.transpose(1, 2)  # (N, C, C)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2).to(matrices.dtype)


def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the weights of `average` towards those of `model`, by 1 - decay of the way."""
    update = cast(Callable[[list[Tensor], list[Tensor], int], None], get_ema_multi_avg_fn(decay))
    update(list(average.parameters()), list(model.parameters()), 0)


def ema_decay(step: int, config: TrainConfig) -> float:
    """The decay of the average at update number `step`: it begins short, to forget the first weights."""
    return min(config.ema_decay, (1 + step) / (10 + step))


def lr_multiplier(step: int, config: TrainConfig) -> float:
    """The learning rate of update number `step`, as a fraction of the highest; the first is 0.

    Linear warm-up, then a cosine (Loshchilov & Hutter, 2017) or a trapezoid (constant, then
    linear) that reaches config.min_lr at config.max_iters.
    """
    if step < config.warmup_iters:
        return (step + 1) / config.warmup_iters
    if step >= config.max_iters:
        return config.min_lr
    if config.schedule == "cosine":
        progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
        height = 0.5 * (1 + math.cos(math.pi * progress))  # 1 -> 0
    else:
        height = min(1.0, (config.max_iters - step) / max(1.0, config.cooldown * config.max_iters))
    return config.min_lr + (1 - config.min_lr) * height


def learning_rate(step: int, config: TrainConfig) -> float:
    """AdamW's learning rate in update number `step`."""
    return config.learning_rate * lr_multiplier(step, config)


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], relative: float) -> None:
    """Give every parameter group this fraction of its highest learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = relative * optimizer.defaults["lr"]
