"""Sharded tensors (PyTorch's DTensor): gather the shards into the full tensor, or shard a full tensor.

Example: full = full_tensor(parameter.grad); shard = shard_like(full, parameter)
Every process of the group holds one shard of a sharded tensor. The functions communicate, so all processes
call them at the same place. On ordinary tensors they change nothing.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # does not exist in a PyTorch without torch.distributed
    from torch.distributed.tensor import DTensor


def is_dtensor(value: object) -> "TypeGuard[DTensor]":
    """Whether a value is a sharded tensor (a DTensor)."""
    module = sys.modules.get("torch.distributed.tensor")  # no DTensor exists before this is imported
    return module is not None and isinstance(value, module.DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """All-gather the shards of a tensor into the full tensor."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """The shard of a tensor that this process holds, in the same memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Shard a full tensor, which is the same on every process, as `other` is sharded.

    A tensor of another shape, such as an optimizer's step count, is returned unchanged.
    """
    if not is_dtensor(other) or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(other.device, other.dtype)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def full_state(
    value: Any, *, is_destination: bool = True, copy: Callable[[Tensor], Tensor] = Tensor.detach
) -> Any:
    """Gather the sharded tensors of a state_dict into full tensors on the CPU, one tensor at a time.

    is_destination: whether this process gets them; else it gets empty tensors and needs no memory for them.
    copy: applied to every tensor that is not sharded.
    """
    if is_dtensor(value):
        full = full_tensor(value.detach())
        return full.cpu() if is_destination else torch.empty(0)
    if isinstance(value, Tensor):
        return copy(value)
    if isinstance(value, dict):
        items = cast(dict[Any, Any], value).items()
        return {key: full_state(item, is_destination=is_destination, copy=copy) for key, item in items}
    if isinstance(value, list):
        items = cast(list[Any], value)
        return [full_state(item, is_destination=is_destination, copy=copy) for item in items]
    return value


def load_full_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load full weights into a module, which may be sharded."""
    current = module.state_dict()
    module.load_state_dict({name: shard_like(tensor, current[name]) for name, tensor in state.items()})


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of an optimizer, in the order of the indices in its state."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def shard_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[int, Any]) -> dict[int, Any]:
    """Shard the full state of an optimizer's parameters as the parameters are sharded."""
    parameters = parameters_of(optimizer)
    return {
        index: {name: shard_like(value, parameters[index]) for name, value in values.items()}
        for index, values in state.items()
    }
