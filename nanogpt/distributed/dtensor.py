"""Tensors of which each process holds a part (DTensor), and the whole tensors they stand for.

Use:    whole(parameter.grad); shard_like(direction, parameter)
On an ordinary tensor every function is the identity. All processes have to call them together.
"""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # a PyTorch without torch.distributed has none of it
    from torch.distributed.tensor import DTensor


def is_dtensor(value: object) -> "TypeGuard[DTensor]":
    """Whether it is a tensor of which this process holds a part."""
    tensors = sys.modules.get("torch.distributed.tensor")  # nobody has parts before that is imported
    return tensors is not None and isinstance(value, tensors.DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """All parts, put together."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The part of a whole tensor, the same on every process, that `other` is of its own."""
    if not is_dtensor(other) or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(other.device, other.dtype)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def full_state(value: Any, *, keep: bool = True) -> Any:
    """A state_dict with whole tensors; those put together from parts are on the CPU.

    keep: whether this process wants them. Else they are empty, so that one process alone has to have room.
    """
    if is_dtensor(value):
        together = full_tensor(value)
        return together.cpu() if keep else torch.empty(0)
    if isinstance(value, dict):
        return {key: full_state(item, keep=keep) for key, item in cast(dict[Any, Any], value).items()}
    if isinstance(value, list):
        return [full_state(item, keep=keep) for item in cast(list[Any], value)]
    return value


def load_full_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load whole weights into a module that may hold parts."""
    own = module.state_dict()
    module.load_state_dict({name: shard_like(tensor, own[name]) for name, tensor in state.items()})


def shard_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[int, Any]) -> dict[int, Any]:
    """The parts of an optimizer's whole state that belong to its parameters' parts."""
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        number: {name: shard_like(value, parameters[number]) for name, value in values.items()}
        for number, values in state.items()
    }
