"""Elementwise operations on many tensors at once, in place: on a GPU one launch for all of them.

Example: foreach.lerp_(averages, gradients, 1 - momentum, skip=found_inf)
PyTorch's optimizers use the same operations (`torch._foreach_*`); on a CPU they are a loop. Each process
changes its own shard of a sharded tensor. A list may be empty.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nanogpt.distributed.dtensor import local_tensor, shard_like

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false


@torch.no_grad()
def mul_(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply each tensor by a number, or by a scalar tensor on its device."""
    if shards := list(map(local_tensor, tensors)):
        torch._foreach_mul_(shards, factor)


@torch.no_grad()
def add_(tensors: Sequence[Tensor], others: Iterable[Tensor], alpha: float | Tensor) -> None:
    """Add alpha times the other tensor to each; the others may be full tensors where these are sharded."""
    shards = [local_tensor(shard_like(other, t)) for t, other in zip(tensors, others, strict=True)]
    if isinstance(alpha, Tensor):  # PyTorch takes only numbers
        shards, alpha = [*torch._foreach_mul(shards, alpha)] if shards else [], 1.0
    if shards:
        torch._foreach_add_(list(map(local_tensor, tensors)), shards, alpha=alpha)


@torch.no_grad()
def lerp_(
    tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float | Tensor, skip: Tensor | None = None
) -> None:
    """Move each tensor towards its end by `weight` of the way, unless `skip`, a scalar, is 1.

    A skipped end may be NaN or infinite: it is overwritten.
    """
    shards, ends = list(map(local_tensor, tensors)), list(map(local_tensor, ends))
    if not shards:
        return
    if skip is not None:
        # The end becomes the tensor itself. A NaN times 0 is NaN, but its bits times 0 are 0.
        torch._foreach_mul_([end.view(torch.int32) for end in ends], (1 - skip).int())
        torch._foreach_add_(ends, torch._foreach_mul(shards, skip))
    if isinstance(weight, Tensor):  # PyTorch takes only numbers
        torch._foreach_sub_(shards, ends)
        torch._foreach_mul_(shards, 1 - weight)
        torch._foreach_add_(shards, ends)
    else:
        torch._foreach_lerp_(shards, ends, weight)
