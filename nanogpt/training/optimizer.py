"""The optimizers, their parameter groups, and the learning-rate schedule.

Example: optimizers = build_optimizers(model, config, muon_dtype=torch.bfloat16)
         set_learning_rate(optimizers, lr_multiplier(step, config))
         step_optimizers(optimizers, skip=~loss.isfinite(), is_async=False)
An optimizer is a row in OPTIMIZERS. It keeps the highest learning rate of each parameter group in `base_lr`,
and changes nothing in a step whose `found_inf` is 1. Knows nothing of the data, the loop or the device.

Shapes: N matrices of one shape, R rows <= C columns
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.config import TrainConfig, decay_spans
from nanogpt.distributed.dtensor import full_tensor, is_dtensor
from nanogpt.training import foreach
from nanogpt.training.optimizer_base import AdamW, UncompiledOptimizer
from nanogpt.training.sparse import RowAdam, table_names
from nanogpt.units import ceil_div

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, chosen to raise small singular values fast (Jordan et al., 2024)."""

MAX_STACKED_ELEMENTS = 2**24
"""Elements that all processes orthogonalize at a time: enough for speed, few compared with activations."""

Parameters = Mapping[str, nn.Parameter]

# --- optimizers ---


def build_optimizers(
    model: nn.Module, config: TrainConfig, muon_dtype: torch.dtype, rank: int = 0, size: int = 1
) -> list[torch.optim.Optimizer]:
    """Build the optimizers that config.optimizer names, on process `rank` of `size`. muon_dtype: see Muon.

    Each has its own parameters; those that are not trained have none.
    """
    parameters = trained_parameters(model)
    tables = [parameters.pop(name) for name in table_names(model) if name in parameters]
    optimizers = OPTIMIZERS[config.optimizer](parameters, config, muon_dtype, rank, size)
    if tables:
        optimizers.append(RowAdam(tables, config))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("base_lr", group["lr"])
    return optimizers


def build_adamw(parameters: Parameters, config: TrainConfig, *_: object) -> list[torch.optim.Optimizer]:
    """AdamW for everything."""
    return [adamw(parameters.values(), config)]


def build_muon(
    parameters: Parameters, config: TrainConfig, muon_dtype: torch.dtype, rank: int, size: int
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks; AdamW for embeddings, the head, and vectors."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        if name.startswith("blocks.") and parameter.dim() == 2:
            matrices.append(parameter)
        else:
            others.append(parameter)
    muon = [Muon(matrices, config, muon_dtype, rank, size)] if matrices else []
    return [adamw(others, config), *muon]


OPTIMIZERS: dict[str, Callable[..., list[torch.optim.Optimizer]]] = {"adamw": build_adamw, "muon": build_muon}
"""Name to function (parameters, config, muon_dtype, rank, size) -> list of optimizers."""


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def step_optimizers(optimizers: Iterable[torch.optim.Optimizer], *, skip: Tensor, is_async: bool) -> None:
    """Update the weights, unless `skip`, a scalar of bool on the device, is true.

    The CPU does not wait for an asynchronous device: an optimizer that supports it (PyTorch marks that by
    `_step_supports_amp_scaling`) gets `found_inf`, and changes nothing if that is 1; any other one waits.
    GradScaler.step is not used: it decides for each optimizer separately, and only in float16. Here one bad
    loss or gradient stops all optimizers, in any dtype.
    """
    for optimizer in optimizers:
        if is_async and getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = skip.float()  # pyright: ignore[reportAttributeAccessIssue]
            optimizer.step()
        elif not skip:
            optimizer.step()


def adamw(parameters: Iterable[nn.Parameter], config: TrainConfig) -> AdamW:
    """AdamW (Loshchilov & Hutter, 2019), fused.

    For a weight w with gradient g, in step t = 1, 2, ...: m <- beta1 m + (1 - beta1) g, the mean gradient;
    v <- beta2 v + (1 - beta2) g^2; w <- w - lr (decay w + m' / (sqrt(v') + eps)), where
    m' = m / (1 - beta1^t) and v' = v / (1 - beta2^t) correct for the start of both at 0.
    """
    groups = decay_groups(parameters, config)
    return AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def decay_groups(parameters: Iterable[nn.Parameter], config: TrainConfig) -> list[dict[str, Any]]:
    """Two parameter groups: with weight decay (matrices and embeddings), and without.

    Decay pulls weights towards zero. Biases and the gains of norms, which have one dimension, are exempt.
    """
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


class Muon(UncompiledOptimizer):
    """Momentum, orthogonalized (Jordan et al., 2024).

    The momentum of a matrix, U S V^T, is replaced by about U V^T, so that directions in which the gradient is
    small move as far as those in which it is large. A fused matrix such as qkv is orthogonalized as one.
    Matrices of one shape are stacked and orthogonalized in one batch of products; tall ones are transposed
    first, so that both layers of an MLP share a batch.
    dtype: of these products, which need not be exact: one that the device multiplies fast.
    """

    found_inf: Tensor | None = None
    """Scalar on the device, 1 if this step must change nothing. Set by step_optimizers."""

    _step_supports_amp_scaling = True  # read by step_optimizers
    state_names = ("momentum",)  # read where a checkpoint is validated

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
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every matrix that has a gradient, unless `found_inf` is 1. Overwrites the gradients."""
        for group in self.param_groups:
            stacks, decay = dict[tuple[int, ...], list[Tensor]](), group["lr"] * group["weight_decay"]
            if self.found_inf is not None:  # no `if`: the CPU would have to wait for the device
                decay = decay * (1 - self.found_inf)
            trained = (p for p in group["params"] if p.grad is not None)
            matrices = sorted(trained, key=is_tall)  # wide ones first
            foreach.mul_(matrices, 1 - decay)
            for matrix in matrices:
                stacks.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
            for shape, stack in stacks.items():
                count = max(MAX_STACKED_ELEMENTS // math.prod(shape), self.size)  # one for each process
                for first in range(0, len(stack), count):
                    self.update_momenta(stack[first : first + count], group["momentum"])
                    self.move(stack[first : first + count], group["lr"])

    def update_momenta(self, matrices: Sequence[Tensor], momentum: float) -> None:
        """Update the momenta of matrices, and turn their gradients into their Nesterov directions."""
        for p in matrices:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        gradients = [p.grad for p in matrices if p.grad is not None]
        averages = [self.state[p]["momentum"] for p in matrices]
        foreach.lerp_(averages, gradients, 1 - momentum, skip=self.found_inf)
        foreach.lerp_(gradients, averages, momentum)

    def move(self, matrices: Sequence[Tensor], lr: float | Tensor) -> None:
        """Move matrices of one shape, wide ones first, along their orthogonalized directions."""
        directions = torch.stack([self.direction(p) for p in matrices])  # (N, R, C)
        if self.size == 1:
            directions = orthogonalize(directions, self.dtype)
        else:
            directions = self.orthogonalize_distributed(directions)
        if self.found_inf is not None:
            directions = directions * (1 - self.found_inf)
        _, R, C = directions.shape
        wide = sum(not is_tall(p) for p in matrices)
        foreach.add_(matrices[:wide], directions[:wide], alpha=-lr)
        # A tall matrix has more outputs than inputs: a larger step changes each output as much as that of a
        # square matrix would.
        foreach.add_(matrices[wide:], directions[wide:].mT.contiguous(), alpha=-lr * (C / R) ** 0.5)

    def direction(self, matrix: Tensor) -> Tensor:
        """The direction of a matrix, (R, C): gathered if it is sharded, transposed if it is tall."""
        direction = matrix.grad
        assert direction is not None
        if self.dtype == torch.bfloat16 and is_dtensor(direction):
            direction = direction.to(self.dtype)  # halves the traffic of gathering
        direction = full_tensor(direction)
        return direction.T if is_tall(matrix) else direction

    def orthogonalize_distributed(self, matrices: Tensor) -> Tensor:
        """Orthogonalize (N, R, C): each process does 1 / size of the matrices, then all are gathered."""
        import torch.distributed as dist

        share = ceil_div(len(matrices), self.size)
        own = matrices[self.rank * share :][:share]
        sent = matrices.new_zeros(share, *matrices.shape[1:], dtype=self.dtype)
        if len(own):
            sent[: len(own)] = orthogonalize(own, self.dtype)
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent)
        return torch.cat(received)[: len(matrices)].to(matrices.dtype)


def is_tall(matrix: Tensor) -> bool:
    """Whether a matrix is tall or square: at least as many rows as columns."""
    return matrix.shape[0] >= matrix.shape[1]


def orthogonalize(matrices: Tensor, dtype: torch.dtype, rounds: int = 5) -> Tensor:
    """Bring the singular values of each matrix near 1 by Newton-Schulz, (N, R, C) -> (N, R, C), R <= C.

    dtype: of the products.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices
    if dtype != torch.float16:  # in float16 the sum of squares could overflow: normalize before casting
        x = x.to(dtype)
    x = nn.functional.normalize(x.flatten(1)).view_as(x).to(dtype)  # to Frobenius norm 1
    for _ in range(rounds):  # x <- a x + (b G + c G^2) x, where G = x x^T
        gram = x @ x.transpose(1, 2)  # (N, R, R)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.to(matrices.dtype)


# --- learning rate ---


def lr_multiplier(step: int, config: TrainConfig) -> float:
    """The learning rate of update `step`, counted from 0, as a fraction of the highest rate.

    Linear warm-up from 1 / warmup_iters, then a cosine (Loshchilov & Hutter, 2017), a trapezoid (constant,
    then linear) or a constant with config.decays, to config.min_lr, a fraction too, at config.max_iters.
    """
    if step < config.warmup_iters:
        return (step + 1) / config.warmup_iters
    if step >= config.max_iters:
        return config.min_lr
    if config.schedule == "constant":
        height = decayed(step, decay_spans(config.decays))
    elif config.schedule == "cosine":
        progress = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)  # 0 -> 1
        height = 0.5 * (1 + math.cos(math.pi * progress))  # 1 -> 0
    else:
        cooldown_iters = max(1.0, config.cooldown * config.max_iters)
        height = min(1.0, (config.max_iters - step) / cooldown_iters)  # 1, then 1 -> 0
    return config.min_lr + (1 - config.min_lr) * height


def decayed(step: int, spans: Sequence[tuple[int, int]]) -> float:
    """What linear decays to 0 leave of a rate of 1. Each decay replaces the rest of the one before.

    spans: first and last step of each decay (see --decays).
    """
    spans = [span for span in spans if span[0] <= step]
    if not spans:
        return 1.0
    start, end = spans[-1]
    return decayed(start, spans[:-1]) * (max(0, end - step) / (end - start))


def learning_rate(step: int, config: TrainConfig) -> float:
    """AdamW's learning rate in update `step`."""
    return config.learning_rate * lr_multiplier(step, config)


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], multiplier: float) -> None:
    """Set the learning rate of every parameter group to this fraction of its highest one."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = multiplier * group["base_lr"]
