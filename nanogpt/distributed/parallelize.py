"""Data parallelism (DDP), sharding (FSDP2) and activation checkpointing, applied to a model from outside.

Example: loss = distributed_loss(model, world, device); shard(model, device, dtype)
         checkpoint_activations(model, "blocks")
With DDP every process has a full copy of the model, and the gradients are averaged. With FSDP every process
holds one shard of each weight. The processes themselves are in distributed/world.py. Does not know the
training loop.
"""

import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nanogpt.config import GradCheckpoint
from nanogpt.distributed.dtensor import shard_like
from nanogpt.distributed.world import World
from nanogpt.errors import require
from nanogpt.machine.device import kind_of
from nanogpt.model.gpt import GPT, rotation_table
from nanogpt.model.kernels import CHUNKED_LOSS_MIN_VOCAB, Recomputed
from nanogpt.model.size import meta_model

if TYPE_CHECKING:  # does not exist in a PyTorch without torch.distributed, as for AMD on Windows
    from torch.distributed.fsdp import FSDPModule


# PyTorch 2.13 has a new name for it, and warns of the old one.
RENAMED = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
NO_BUFFER_SYNC: Any = {"forward_sync_buffers" if RENAMED else "broadcast_buffers": False}


class Loss(nn.Module):
    """The model's loss as a module: DDP wraps modules only."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats per token, a scalar. idx, targets: (B, T)."""
        return self.model.loss(idx, targets)


def distributed_loss(model: GPT, world: World, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss function; with several processes, its backward pass averages their gradients (DDP).

    DDP sends gradients while the backward pass is running (Li et al., "PyTorch Distributed", 2020).
    """
    if world.size == 1 or is_sharded(model):
        return model.loss
    return DistributedDataParallel(
        Loss(model),
        device_ids=[device] if kind_of(device).is_async else None,
        gradient_as_bucket_view=True,
        **NO_BUFFER_SYNC,  # buffers are constants
    )


def zero_grad(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Delete the gradients. With DDP they are views of its buckets, which stay: they are set to zero."""
    model.zero_grad(set_to_none=not isinstance(uncompiled(loss), DistributedDataParallel))


def is_compiled(loss: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether a loss function is compiled by torch.compile."""
    return uncompiled(loss) is not loss


def uncompiled(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss function without torch.compile's wrapper."""
    return getattr(loss, "_orig_mod", loss)


def shard(model: GPT, device: torch.device, dtype: torch.dtype) -> None:
    """Shard every weight, gradient and moment over the processes (FSDP2: Zhao et al., 2023).

    FSDP all-gathers the weights of a block in `dtype` just before the block computes, and frees them
    afterwards; gradients are averaged in float32. In training, weights outside of the blocks (embeddings,
    final norm, head) stay gathered from the forward to the backward pass.
    model: on the meta device. Its shards are allocated on `device` and not initialized.
    Raises: UserError for float16.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    check_sharding(dtype)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    low_precision = None if dtype == torch.float32 else dtype
    reduce_dtype = torch.float32 if low_precision else None
    policy = MixedPrecisionPolicy(param_dtype=low_precision, reduce_dtype=reduce_dtype)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    reshard = None if is_trained(model) else True  # None: FSDP's default for a root, which stays gathered
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    register_fsdp_forward_method(model, "loss")  # it is called from outside, as forward is
    model.to_empty(device=device)
    if model.rotation is not None:  # to_empty leaves buffers without content
        model.rotation = rotation_table(model.config, device)


@torch.no_grad()
def initialize_shards(model: GPT, seed: int) -> None:
    """Initialize a sharded model with the weights that GPT(config) has after torch.manual_seed(seed).

    Every process draws one full matrix at a time on the CPU and copies its own shard from it, so no process
    needs memory for the full model.
    """
    torch.manual_seed(seed)
    # GPT's constructors draw random numbers first. Draw as many here, in the same order, and discard them.
    for module in meta_model(model.config).modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            deepcopy(module).to_empty(device="cpu").reset_parameters()
    for name, parameter in model.named_parameters():
        full = torch.empty(parameter.shape)
        model.initialize_parameter(name, full)
        parameter.copy_(shard_like(full, parameter))


def check_sharding(dtype: torch.dtype) -> None:
    """Check that FSDP supports a dtype.

    Raises: UserError for float16: a gradient scaler sees only the shards of its own process.
    """
    require(dtype != torch.float16, "--parallel fsdp does not support float16: give --dtype bfloat16")


def is_sharded(model: nn.Module) -> bool:
    """Whether a model is sharded with FSDP."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # no model is sharded before this is imported
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


@contextmanager
def unsharded(model: GPT) -> Generator[None]:
    """Leave the weights of a sharded model gathered after a forward pass, if they fit in memory.

    Without it, FSDP gathers all weights again for every token of a sample.
    """
    if not is_sharded(model) or not fits_unsharded(model):
        yield
        return
    modules = cast("list[FSDPModule]", [module for module in model.modules() if is_sharded(module)])
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            is_root = module is modules[0]
            module.set_reshard_after_forward(not (is_root and is_trained(model)), recurse=False)


def fits_unsharded(model: nn.Module) -> bool:
    """Whether the free memory of every process holds the full model twice: once for the computation."""
    device = next(model.parameters()).device
    # Of a sharded parameter, numel() is that of the full one.
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    too_large = torch.tensor(int(2 * size > kind_of(device).free_memory(device)))
    dist.all_reduce(too_large, dist.ReduceOp.MAX)
    return not too_large


def is_trained(model: nn.Module) -> bool:
    """Whether a model has weights that require gradients."""
    return any(parameter.requires_grad for parameter in model.parameters())


def sync_gradients(loss: Callable[[Tensor, Tensor], Tensor], *, when: bool) -> AbstractContextManager[Any]:
    """The context of a micro-batch, in which DDP all-reduces gradients only if `when`: in the last one.

    FSDP averages gradients in every micro-batch: full gradients would take the memory that FSDP saves.
    """
    module = uncompiled(loss)
    if when or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return cast(AbstractContextManager[Any], module.no_sync())


def checkpoint_activations(model: GPT, mode: GradCheckpoint) -> None:
    """Activation checkpointing: recompute activations in the backward pass, to save memory at a cost in time.

    blocks: store only the input of each block. selective: also store the results of its matrix products,
    which take most of the time. The results are the same, dropout included.
    The last block stores its activations, since the backward pass begins with it. With a large vocabulary it
    is recomputed too: the loss, computed in between, needs much memory for a moment.
    """
    if mode == "off":
        return
    skip_last = model.config.vocab_size < CHUNKED_LOSS_MIN_VOCAB
    for index in range(len(model.blocks) - skip_last):
        model.blocks[index] = Recomputed(model.blocks[index], selective=mode == "selective")


def check_batch(batch_size: int, world: World) -> None:
    """Check that a batch has a sequence for every process. Raises: UserError if it has too few."""
    require(
        batch_size >= world.size,
        f"--batch_size {batch_size} is too small for {world.size} processes: give at least {world.size}",
    )
