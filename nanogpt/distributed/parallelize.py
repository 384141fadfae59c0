"""What wraps the model from outside: DDP, FSDP, activation checkpointing.

Use:    loss = distributed_loss(model, world, device); shard(model, device, dtype)
        checkpoint_activations(model, "blocks")
DDP adds up the processes' gradients, FSDP leaves each process a part of the model. Who the processes are is
in distributed/world.py. Does not know the training loop.
"""

import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nanogpt.config import GradCheckpoint
from nanogpt.device import kind_of
from nanogpt.distributed.dtensor import shard_like
from nanogpt.distributed.world import World
from nanogpt.errors import require
from nanogpt.model.gpt import GPT, meta_model
from nanogpt.model.kernels import CHUNKED_LOSS_MIN_VOCAB, Recomputed

if TYPE_CHECKING:  # a PyTorch without torch.distributed, as for AMD on Windows, has none of it
    from torch.distributed.fsdp import FSDPModule


class Loss(nn.Module):
    """The model's loss as a module, which is what DDP wraps."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats per token, a scalar. idx, targets: (B, T)."""
        return self.model.loss(idx, targets)


def distributed_loss(model: GPT, world: World, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """The model's loss; with several processes, its backward pass averages their gradients (DDP).

    Gradients travel while the backward pass goes on (Li et al., "PyTorch Distributed", 2020).
    """
    if world.size == 1 or is_sharded(model):
        return model.loss
    ids = [device] if kind_of(device).is_async else None
    return DistributedDataParallel(
        Loss(model),
        device_ids=ids,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # they are constants
    )


def keeps_gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether gradients have a place, DDP's buckets, beside which new ones would take another."""
    return isinstance(uncompiled(loss), DistributedDataParallel)


def is_compiled(loss: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether it went through torch.compile."""
    return uncompiled(loss) is not loss


def uncompiled(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """What torch.compile has wrapped, or the loss itself."""
    return getattr(loss, "_orig_mod", loss)


def shard(model: GPT, device: torch.device, dtype: torch.dtype) -> None:
    """Leave each process a part of every weight, gradient and moment (FSDP2: Zhao et al., 2023).

    A block's weights are put together for as long as it computes, in `dtype`; gradients are averaged in
    float32. Those outside of the blocks stay together until the backward pass, if there will be one.
    model: on the meta device; its parts are made on `device`, without content. Errors: as check_sharding.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    check_sharding(dtype)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    lower = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32 if lower else None)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=None if is_trained(model) else True)
    register_fsdp_forward_method(model, "loss")
    model.to_empty(device=device)
    model.make_buffers(device)


@torch.no_grad()
def initialize_shards(model: GPT, seed: int) -> None:
    """Give a sharded model the weights that GPT(config) has after torch.manual_seed(seed).

    One whole matrix at a time is made on the CPU, and this process's part of it kept: no process has to have
    room for the whole model.
    """
    torch.manual_seed(seed)
    for module in meta_model(
        model.config
    ).modules():  # building the model on the CPU draws this, too, and in this order
        if isinstance(module, (nn.Linear, nn.Embedding)):
            deepcopy(module).to_empty(device="cpu").reset_parameters()
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape)
        model.initialize_parameter(name, whole)
        parameter.copy_(shard_like(whole, parameter))


def check_sharding(dtype: torch.dtype) -> None:
    """Errors: UserError for float16, whose scaler would have to see all parts of a gradient."""
    require(dtype != torch.float16, "--parallel fsdp does not scale float16: give --dtype bfloat16")


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds parts of the weights only."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # no model is sharded before that is imported
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


@contextmanager
def unsharded(model: GPT) -> Generator[None]:
    """Leave a sharded model together between one forward pass and the next, where it has room.

    Else each of the many passes of a sample would send all weights around anew.
    """
    if not is_sharded(model) or not has_room_for(model):
        yield
        return
    parts = cast("list[FSDPModule]", [module for module in model.modules() if is_sharded(module)])
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            is_block = part is not parts[0]
            part.set_reshard_after_forward(is_block or not is_trained(model), recurse=False)


def has_room_for(model: nn.Module) -> bool:
    """Whether every process has room for a whole copy of the model, with as much again to work in."""
    parameter = next(model.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    lacks = torch.tensor(int(2 * size > kind_of(parameter.device).free_memory(parameter.device)))
    dist.all_reduce(lacks, dist.ReduceOp.MAX)
    return not lacks


def is_trained(model: nn.Module) -> bool:
    """Whether the model has weights that gradients are computed for."""
    return any(parameter.requires_grad for parameter in model.parameters())


def without_sync(loss: Callable[[Tensor, Tensor], Tensor], *, last: bool) -> AbstractContextManager[Any]:
    """Keep DDP's gradients local, in a backward pass that is not the last of an update.

    FSDP's are averaged in each: whole gradients would take the memory that it saves.
    """
    module = uncompiled(loss)
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return cast(AbstractContextManager[Any], module.no_sync())


def checkpoint_activations(model: GPT, mode: GradCheckpoint) -> None:
    """Trade time for memory: compute again in the backward pass what the forward pass would keep.

    blocks: each block keeps its input alone. selective: it also keeps the results of its matrix products,
    which take most of the time. The numbers stay the same, dropout included.
    The last block keeps its activations, since the backward pass begins with it. With a large vocabulary it
    does not: the loss comes between, and needs much memory for a moment.
    """
    if mode == "off":
        return
    keep_last = model.config.vocab_size < CHUNKED_LOSS_MIN_VOCAB
    for number in range(len(model.blocks) - keep_last):
        model.blocks[number] = Recomputed(model.blocks[number], selective=mode == "selective")


def check_batch(batch_size: int, world: World) -> None:
    """Errors: UserError if there are more processes than sequences in a batch."""
    require(
        batch_size >= world.size,
        f"--batch_size {batch_size} is too small for {world.size} processes: give at least {world.size}",
    )
