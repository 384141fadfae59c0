"""Several processes, one training: who does what, and how they agree.

Run:    torchrun --nproc_per_node=2 train.py --preset cpu
Use:    with joined() as world: ...; world.agree(flag); world.mine(starts); world.gather(losses)
The engine is PyTorch's: torchrun starts the processes (one a device) and says through the environment
who is who; torch.distributed connects them; DDP adds up their gradients. Every process goes through the
same steps; the first one alone writes files. Here is also activation checkpointing, which like DDP wraps
the model from outside. Does not know the training loop.

# B batch_size, R processes ("ranks")
"""

import functools
import os
import re
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.rendezvous import rendezvous  # pyright: ignore[reportUnknownVariableType]
from torch.nn.parallel import DistributedDataParallel
from torch.utils import checkpoint as checkpointing

from nanogpt.config import GradCheckpoint, UserError, require
from nanogpt.model import GPT, LARGE_VOCAB

Item = TypeVar("Item")

EXIT_ERROR = 2

PARTING = timedelta(seconds=60)
"""How long finished processes wait for one another."""

EXPENSIVE = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
"""What selective checkpointing keeps: products. All else is computed again in the backward pass."""


@dataclass(frozen=True)
class World:
    """The processes of a training, and which of them this one is. Alone, every method is the identity."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of this process on its machine, and of the GPU that it uses."""
    local_size: int = 1
    """How many processes are on its machine."""
    job: str = ""
    """What torchrun calls the job (--rdzv_id), if it has a name."""
    restarted: bool = False
    """Whether torchrun has started these processes again, after one of them died."""

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def mine(self, items: NDArray[Any]) -> NDArray[Any]:
        """The process's own share of a batch: the shares follow one another, and differ by one at most."""
        return np.array_split(items, self.size)[self.rank]

    def agree(self, *votes: int) -> list[int]:
        """The highest vote of any process, for each question. All processes must ask at the same place."""
        if self.size == 1:
            return list(votes)
        ballot = torch.tensor(votes, dtype=torch.int64)
        dist.all_reduce(ballot, dist.ReduceOp.MAX)
        return cast(list[int], ballot.tolist())

    def gather(self, values: Sequence[Item]) -> list[Item]:
        """The values of all processes, one process after the other."""
        if self.size == 1:
            return list(values)
        lists: list[Any] = [None] * self.size
        dist.all_gather_object(lists, list(values))
        return [value for part in lists for value in part]

    @contextmanager
    def together(self) -> Generator[None]:
        """What one process cannot do, none has done. Errors: UserError on all, if one has that or OSError."""
        problem: list[str] = []
        try:
            yield
        except (UserError, OSError) as error:
            problem = [str(error)]
        problems = self.gather(problem)
        require(not problems, "".join(problems[:1]))

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def decide(self, choose: Callable[[], bool]) -> bool:
        """What the first process chooses; the others need not see what it sees."""
        return bool(self.agree(int(self.is_first and choose()))[0])


ALONE = World()


@contextmanager
def joined() -> Generator[World]:
    """Meet the other processes that torchrun started; without torchrun, there are none.

    If one of them fails, all end: that one says why, the others are silent.
    """
    if not dist.is_torchelastic_launched():
        yield World()
        return
    store, rank, size = next(rendezvous("env://"))  # pyright: ignore[reportUnknownVariableType]
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    world = World(
        rank,
        size,
        int(os.environ["LOCAL_RANK"]),
        int(os.environ["LOCAL_WORLD_SIZE"]),
        job="" if job == "none" else job,
        restarted=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0",
    )
    store = PrefixStore(of_this_life(world), store)
    failures = PrefixStore("nanogpt", store)
    dist.init_process_group(backend(), store=store, rank=rank, world_size=size)
    try:
        yield world
    except Exception as error:
        first = failures.add("failures", 1) == 1
        lost = is_lost_connection(error)
        if first and lost:
            print(f"process {rank + 1} of {size}: another one is gone", file=sys.stderr, flush=True)
        elif first and isinstance(error, UserError) and not world.is_first:
            print(f"error (process {rank + 1} of {size}): {error}", file=sys.stderr, flush=True)
        if first and not lost and (world.is_first or not isinstance(error, UserError)):
            raise
        sys.stderr.flush()
        os._exit(EXIT_ERROR)  # not by way of the other processes' ends of the connection: they may be gone
    part(world, failures)
    dist.destroy_process_group()


def of_this_life(world: World) -> str:
    """A name for what these processes say to one another, that those before a restart did not use.

    Their addresses are still in the store, unless torchrun was told to make a new one
    (TORCH_DISABLE_SHARE_RDZV_TCP_STORE). For several machines it has to be: each counts its own restarts.
    """
    alone = world.size == world.local_size
    return f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if alone else "machines"


def is_lost_connection(error: Exception) -> bool:
    """Whether PyTorch says that another process has left."""
    gone = "gloo.*(onnection (closed|reset|refused)|roken pipe|pair closure)"
    return isinstance(error, RuntimeError) and bool(re.search(gone, str(error)))


def part(world: World, store: PrefixStore) -> None:
    """Wait until every process is through: one that left early could break off what another still reads.

    The first may be the one that keeps the store, so it leaves the store last.
    """
    arrived = store.add("through", 1)
    with suppress(RuntimeError):  # somebody died: torchrun sees that, nothing here needs him any more
        if not world.is_first:
            store.wait(["all through"], PARTING)
            return
        end = time.monotonic() + PARTING.total_seconds()
        while arrived < world.size and time.monotonic() < end:
            time.sleep(0.01)
            arrived = store.add("through", 0)
        store.set("all through", "")


def leave(code: int) -> None:
    """End a process of torchrun's now; without torchrun, do nothing.

    The threads of a connection can outlive it for a moment, and one that frees a tensor while the interpreter
    is being taken down aborts the process: torchrun would report a finished training as failed.
    """
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def backend() -> str:
    """Which libraries connect the processes: NCCL between GPUs, gloo for what lies in main memory."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def local_device(name: str, world: World) -> str:
    """The device of this process: with several, each takes the GPU of its own number, or the CPU.

    Errors: UserError for several processes on an Apple GPU.
    """
    if world.size == 1:
        return name
    require(name != "mps", "--device mps takes one process: give --device cpu, or start it without torchrun")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return f"cuda:{world.local_rank}"
    return "cpu" if name == "auto" else name


class Loss(nn.Module):
    """The model's loss as a module, which is what DDP wraps."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats per token, a scalar. idx, targets: (B, T)."""
        return self.model.loss(idx, targets)


def shared_loss(model: GPT, world: World, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """The model's loss; with several processes, its backward pass averages their gradients (DDP).

    Gradients travel while the backward pass goes on (Li et al., "PyTorch Distributed", 2020).
    """
    if world.size == 1 or isinstance(model, FSDPModule):
        return model.loss
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(
        Loss(model),
        device_ids=ids,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # they are constants
    )


def keeps_gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether gradients have a place, DDP's buckets, beside which new ones would take another."""
    return isinstance(uncompiled(loss), DistributedDataParallel)


def uncompiled(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """What torch.compile has wrapped, or the loss itself."""
    return getattr(loss, "_orig_mod", loss)


def shard(model: GPT, device: torch.device, dtype: torch.dtype) -> None:
    """Leave each process a part of every weight, gradient and moment (FSDP2: Zhao et al., 2023).

    A block's weights are put together for as long as it computes, in `dtype`; gradients are averaged in
    float32. Those outside of the blocks stay together until the backward pass, if there will be one.
    The model may be on the CPU: it comes to the device in parts. Errors: as check_sharding.
    """
    check_sharding(dtype)
    trained = any(parameter.requires_grad for parameter in model.parameters())
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    lower = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32 if lower else None)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=None if trained else True)
    register_fsdp_forward_method(model, "loss")


def check_sharding(dtype: torch.dtype) -> None:
    """Errors: UserError for float16, whose scaler would have to see all parts of a gradient."""
    require(dtype != torch.float16, "--parallel fsdp does not scale float16: give --dtype bfloat16")


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds parts of the weights only."""
    return isinstance(model, FSDPModule)


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

    blocks: of each block only what goes in is kept (Chen et al., 2016). selective: and what its products
    give, which are most of the time. The numbers stay the same, dropout included.
    The last block keeps its activations, which are wanted at once; not so if the loss of a large vocabulary,
    which takes much memory for a moment, comes between.
    """
    if mode == "off":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        settings["context_fn"] = functools.partial(
            checkpointing.create_selective_checkpoint_contexts, list(EXPENSIVE)
        )
    for block in model.blocks if model.config.vocab_size >= LARGE_VOCAB else model.blocks[:-1]:
        block.forward = functools.partial(checkpointing.checkpoint, block.forward, **settings)


def check_batch(batch_size: int, world: World) -> None:
    """Errors: UserError if there are more processes than sequences in a batch."""
    require(
        batch_size >= world.size,
        f"--batch_size {batch_size} is too small for {world.size} processes: give at least {world.size}",
    )
