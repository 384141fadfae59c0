"""Tensors of which each process holds a part (DTensor), and the whole tensors they stand for.

Use:    whole(parameter.grad); part_like(direction, parameter)
On an ordinary tensor every function is the identity. All processes have to call them together.
"""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # a PyTorch without torch.distributed has none of it
    from torch.distributed.tensor import DTensor


def is_part(value: object) -> "TypeGuard[DTensor]":
    """Whether it is a tensor of which this process holds a part."""
    tensors = sys.modules.get("torch.distributed.tensor")  # nobody has parts before that is imported
    return tensors is not None and isinstance(value, tensors.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All parts, put together."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def part_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The part of a whole tensor, the same on every process, that `other` is of its own."""
    if not is_part(other) or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(other.device, other.dtype)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def whole_state(value: Any, *, keep: bool = True) -> Any:
    """A state_dict with whole tensors; those put together from parts are on the CPU.

    keep: whether this process wants them. Else they are empty, so that one process alone has to have room.
    """
    if is_part(value):
        together = whole(value)
        return together.cpu() if keep else torch.empty(0)
    if isinstance(value, dict):
        return {key: whole_state(item, keep=keep) for key, item in cast(dict[Any, Any], value).items()}
    if isinstance(value, list):
        return [whole_state(item, keep=keep) for item in cast(list[Any], value)]
    return value


def load_whole(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load whole weights into a module that may hold parts."""
    own = module.state_dict()
    module.load_state_dict({name: part_like(tensor, own[name]) for name, tensor in state.items()})


def optimizer_parts(optimizer: torch.optim.Optimizer, state: dict[int, Any]) -> dict[int, Any]:
    """The parts of an optimizer's whole state that belong to its parameters' parts."""
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        number: {name: part_like(value, parameters[number]) for name, value in values.items()}
        for number, values in state.items()
    }
