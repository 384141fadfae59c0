"""Sparse updates of embedding tables: only the rows that occur in a batch are clipped and moved.

Example: use_sparse_gradients(model); ...; norm = clip_grad_norm(model, 1.0); RowAdam(tables, config).step()
A dense update passes over all rows of the n-gram tables, which takes a quarter of a small model's update. A
dense gradient (GPU, DDP, FSDP) gives the same numbers: a row whose gradient is zero does not move.

Shapes: N rows of a table, R of them touched, C columns
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from nanogpt.config import TrainConfig
from nanogpt.model.ngram import NgramEmbedding
from nanogpt.training import foreach
from nanogpt.training.optimizer_base import UncompiledOptimizer


def sparse_tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """The tables that RowAdam updates, by name: those for n-grams, except in models of earlier versions."""
    ngrams = getattr(model, "ngram_embedding", None)
    if not isinstance(ngrams, NgramEmbedding) or not ngrams.exact:
        return {}
    return {"ngram_embedding.pairs": ngrams.pairs, "ngram_embedding.triples": ngrams.triples}


def table_names(model: nn.Module) -> list[str]:
    """Names of the parameters that RowAdam updates."""
    return [f"{name}.weight" for name in sparse_tables(model)]


def use_sparse_gradients(model: nn.Module) -> None:
    """Make the gradients of the tables sparse tensors, (N, C), which hold only the touched rows."""
    for table in sparse_tables(model).values():
        table.sparse = True


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradient of all parameters to a norm of `max_norm`: clip_grad_norm_ for sparse gradients too.

    Returns the norm before clipping, a scalar.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if not any(is_sparse(parameter) for parameter in parameters):
        return clip_grad_norm_(parameters, max_norm)
    for parameter in filter(is_sparse, parameters):
        assert parameter.grad is not None
        parameter.grad = parameter.grad.coalesce()  # add up the gradients of a row that occurs several times
    gradients = [p.grad.values() if is_sparse(p) else p.grad for p in parameters if p.grad is not None]
    norm = get_total_norm(gradients)
    if math.isfinite(max_norm):
        foreach.mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def is_sparse(parameter: Tensor) -> bool:
    """Whether a parameter has a sparse gradient."""
    return parameter.grad is not None and parameter.grad.is_sparse


TABLE_RATE = 1.7
"""Learning rate of the tables, relative to that of AdamW's parameters."""

DECAY_INTERVAL = 8
"""All rows decay once every this many updates, by as much as in all of them: touching every row is slow."""


class RowAdam(UncompiledOptimizer):
    """Lazy Adam without momentum: torch.optim.SparseAdam with betas (0, beta2), and decoupled weight decay.

    For a touched row w with gradient g, in step t = 1, 2, ...: v <- beta2 v + (1 - beta2) g^2;
    w <- w - lr g / (sqrt(v / (1 - beta2^t)) + eps). There is no momentum, which would go on moving rows that
    are no longer touched. Every row decays by lr decay w per update, touched or not: so a model forgets the
    n-grams that it has seen only once, which are most of what it overfits to.
    """

    found_inf: Tensor | None = None
    """Scalar on the device, 1 if this step must change nothing. Set by step_optimizers."""

    _step_supports_amp_scaling = True  # read by step_optimizers
    state_names = ("step", "exp_avg_sq")  # read where a checkpoint is validated

    def __init__(self, tables: Iterable[nn.Parameter], config: TrainConfig, eps: float = 1e-8) -> None:
        settings = {"weight_decay": config.weight_decay, "beta2": config.beta2, "eps": eps}
        super().__init__(tables, {"lr": TABLE_RATE * config.learning_rate, **settings})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the touched rows and decay all, unless `found_inf` is 1. Closures are not supported."""
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self.update(table, table.grad, group)

    def update(self, table: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Move the touched rows of one table, (N, C), along a gradient that is sparse or dense."""
        state = self.state[table]
        if not state:
            state["step"] = torch.zeros((), device=table.device)
            state["exp_avg_sq"] = torch.zeros_like(table)
        state["step"] = state["step"].to(table.device)  # load_state_dict leaves it on the CPU
        average, beta2 = state["exp_avg_sq"], group["beta2"]
        keep = 1.0 if self.found_inf is None else 1 - self.found_inf  # 0: change nothing (see Muon.step)
        state["step"] += keep
        self.decay(table, keep * (state["step"] % DECAY_INTERVAL == 0), group)
        scale = (1 - beta2 ** state["step"]) ** 0.5
        lr = keep * group["lr"]
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            rows, g = gradient.indices()[0], gradient.values()  # (R,), (R, C)
            if self.found_inf is not None:
                g = torch.where(self.found_inf > 0, 0, g)
            v = average[rows].lerp_(g.square(), (1 - beta2) * keep)
            average[rows] = v
            table.index_add_(0, rows, g.div_(v.sqrt_().div_(scale).add_(group["eps"])).mul_(-lr))
            return
        touched = (gradient != 0).any(dim=1, keepdim=True) * keep  # (N, 1)
        g = torch.where(touched > 0, gradient, 0)  # a broken gradient may be NaN
        average.lerp_(g.square(), (1 - beta2) * touched)
        table.sub_(lr * g / (average.sqrt() / scale + group["eps"]))

    @staticmethod
    def decay(table: Tensor, due: Tensor, group: dict[str, Any]) -> None:
        """Decay all rows for DECAY_INTERVAL updates, if `due` is 1, a scalar on the device."""
        if not group["weight_decay"]:
            return
        factor = (1 - group["lr"] * group["weight_decay"]) ** DECAY_INTERVAL
        if not table.is_cpu:  # no `if due`: the CPU would have to wait for the device
            foreach.mul_([table], 1 - due * (1 - factor))
        elif due:
            foreach.mul_([table], factor)
