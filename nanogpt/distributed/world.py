"""Several processes, one training: who does what, and how they agree.

Run:    torchrun --nproc_per_node=2 train.py --preset cpu
Use:    with distributed_world() as world: ...; world.max_over_ranks(flag); world.all_gather(losses)
The engine is PyTorch's: torchrun starts the processes (one a device) and says through the environment
who is who; torch.distributed connects them. Every process goes through the same steps; the first one alone
writes files. How they share a model: distributed/parallelize.py. Does not know the training loop.

# B batch_size, R processes ("ranks")
"""

import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from nanogpt import streams
from nanogpt.console import one_line
from nanogpt.device import KINDS
from nanogpt.errors import UserError, require

if TYPE_CHECKING:  # a PyTorch without torch.distributed, as for AMD on Windows, has none of it
    from torch.distributed.distributed_c10d import PrefixStore

Item = TypeVar("Item")

EXIT_BUG, EXIT_ERROR = 1, 2

SHUTDOWN_TIMEOUT = timedelta(seconds=60)
"""How long finished processes wait for one another."""

FOREIGN_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
"""Variables in which other launchers say how many processes they have started."""


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

    def local_share(self, items: NDArray[Any]) -> NDArray[Any]:
        """The process's own share of a batch: the shares follow one another, and differ by one at most."""
        return np.array_split(items, self.size)[self.rank]

    def max_over_ranks(self, *votes: int) -> list[int]:
        """The highest vote of any process, for each question. All processes must ask at the same place."""
        if self.size == 1:
            return list(votes)
        ballot = torch.tensor(votes, dtype=torch.int64)
        dist.all_reduce(ballot, dist.ReduceOp.MAX)
        return cast(list[int], ballot.tolist())

    def all_gather(self, values: Sequence[Item]) -> list[Item]:
        """The values of all processes, one process after the other."""
        if self.size == 1:
            return list(values)
        lists: list[Any] = [None] * self.size
        dist.all_gather_object(lists, list(values))
        return [value for part in lists for value in part]

    @contextmanager
    def raise_on_all(self) -> Generator[None]:
        """What one process cannot do, none has done. Errors: UserError on all, if one has that or OSError."""
        problem: list[str] = []
        try:
            yield
        except (UserError, OSError) as error:
            problem = [str(error)]
        problems = self.all_gather(problem)
        require(not problems, "".join(problems[:1]))

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def broadcast_bool(self, choose: Callable[[], bool]) -> bool:
        """What the first process chooses; the others need not see what it sees."""
        return bool(self.max_over_ranks(int(self.is_first and choose()))[0])


ALONE = World()


def launched() -> bool:
    """Whether this process is one of several that torchrun, or a launcher that speaks like it, has started.

    Errors: UserError if another launcher has, which does not say who is who.
    """
    if not dist.is_available():
        return False
    if dist.is_torchelastic_launched() or number_of("WORLD_SIZE") > 1:
        return True
    for variable, launcher in FOREIGN_LAUNCHERS.items():
        require(
            number_of(variable) <= 1,
            f"{launcher} has started {os.environ.get(variable)} processes that do not know of one another: "
            "let torchrun start them (docs/scaling.md)",
        )
    return False


def number_of(variable: str, default: int = 1) -> int:
    """A number in the environment; the default if it is none."""
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else default


@contextmanager
def distributed_world(device: str = "auto") -> Generator[World]:
    """Meet the other processes that torchrun started; without torchrun, there are none.

    device: what config.device says. If one of them fails, all end: that one says why, the others are silent.
    Errors: UserError if a launcher is not understood.
    """
    if not launched():
        yield World()
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous  # pyright: ignore[reportUnknownVariableType]

    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    require(not missing, f"WORLD_SIZE is set, but not {', '.join(missing)}: start it with torchrun")
    store, rank, size = next(rendezvous("env://"))  # pyright: ignore[reportUnknownVariableType]
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    world = World(
        rank,
        size,
        number_of("LOCAL_RANK", 0),
        number_of("LOCAL_WORLD_SIZE"),
        job="" if job == "none" else job,
        restarted=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0",
    )
    store = PrefixStore(restart_prefix(world), store)
    failures = PrefixStore("nanogpt", store)
    try:
        connect(store, world, device)
        yield world
    except Exception as error:
        fail(error, world, first=failures.add("failures", 1) == 1)
    shutdown_barrier(world, failures)
    dist.destroy_process_group()


def connect(store: "PrefixStore", world: World, device: str) -> None:
    """Connect the processes. With its number, messages of NCCL name the GPU."""
    libraries = backend()
    own = local_device(device, world)
    named = own.startswith("cuda:") and "nccl" in libraries and torch.cuda.device_count() > world.local_rank
    dist.init_process_group(
        libraries,
        store=store,
        rank=world.rank,
        world_size=world.size,
        device_id=torch.device(own) if named else None,
    )


def fail(error: Exception, world: World, *, first: bool) -> NoReturn:
    """Say what ends all processes, if it began here, and leave at once.

    Not by way of the other processes' ends of the connection: they may be gone, and NCCL would wait for them.
    """
    place = f"process {world.rank + 1} of {world.size}"
    code = EXIT_ERROR
    if first and is_lost_connection(error):
        print(f"{place}: another one is gone", file=sys.stderr)
    elif first and isinstance(error, UserError):
        print(f"error{'' if world.is_first else f' ({place})'}: {one_line(str(error))}", file=sys.stderr)
    elif first:
        traceback.print_exception(error)
        code = EXIT_BUG
    streams.show_cursor()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def restart_prefix(world: World) -> str:
    """A name for what these processes say to one another, that those before a restart did not use.

    Their addresses are still in the store, unless torchrun was told to make a new one
    (TORCH_DISABLE_SHARE_RDZV_TCP_STORE). For several machines it has to be: each counts its own restarts.
    """
    alone = world.size == world.local_size
    return f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if alone else "machines"


def is_lost_connection(error: Exception) -> bool:
    """Whether PyTorch says that another process has left. An error of NCCL's most likely means that."""
    gone = "gloo.*(onnection (closed|reset|refused)|roken pipe|pair closure)|NCCL error|remote process"
    return isinstance(error, RuntimeError) and bool(re.search(gone, str(error)))


def shutdown_barrier(world: World, store: "PrefixStore") -> None:
    """Wait until every process is through: one that left early could break off what another still reads.

    The first may be the one that keeps the store, so it leaves the store last.
    """
    arrived = store.add("through", 1)
    with suppress(RuntimeError):  # somebody died: torchrun sees that, nothing here needs him any more
        if not world.is_first:
            store.wait(["all through"], SHUTDOWN_TIMEOUT)
            return
        end = time.monotonic() + SHUTDOWN_TIMEOUT.total_seconds()
        while arrived < world.size and time.monotonic() < end:
            time.sleep(0.01)
            arrived = store.add("through", 0)
        store.set("all through", "")


def hard_exit(code: int) -> None:
    """End a process of torchrun's now; without torchrun, do nothing.

    The threads of a connection can outlive it for a moment, and one that frees a tensor while the interpreter
    is being taken down aborts the process: torchrun would report a finished training as failed.
    """
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def backend() -> str:
    """Which libraries connect the processes: for main memory gloo, and for GPUs NCCL where it is built in.

    On Windows and some Jetson builds it is not: gloo adds up CUDA tensors too.
    """
    connections = {"cpu": "gloo"}
    for kind in KINDS.values():
        if kind.distributed_backend == "nccl" and kind.is_available() and dist.is_nccl_available():
            connections[kind.type] = "nccl"
    return (
        ",".join(f"{kind}:{library}" for kind, library in connections.items())
        if len(connections) > 1
        else "gloo"
    )


def local_device(name: str, world: World) -> str:
    """The device of this process: with several, each takes the GPU of its own number, or the CPU.

    Errors: UserError for several processes on an Apple GPU, or on one CUDA GPU.
    """
    if world.size == 1:
        return name
    require(name != "mps", "--device mps takes one process: give --device cpu, or start it without torchrun")
    require(
        world.local_size == 1 or name in ("auto", "cuda", "cpu"),
        f"--device {name} is for one process, here are {world.local_size}: give --device cuda, and each "
        "takes the GPU of its own number",
    )
    if name == "cuda" or (
        name == "auto" and KINDS["cuda"].is_available() and not KINDS["cuda"].unusable_reason()
    ):
        return f"cuda:{world.local_rank}"
    return "cpu" if name == "auto" else name


def check_same_start(world: World, start: Mapping[str, object]) -> None:
    """See that all processes begin with the same of everything: else they would average strangers' gradients.

    start: what a run begins with, by name. Errors: UserError, on all, naming what differs between whom.
    """
    first, *others = world.all_gather([dict(start)])
    for number, theirs in enumerate(others, 2):
        for name, value in first.items():
            require(
                theirs[name] == value,
                f"the processes do not start from the same {name}: {value} in process 1, {theirs[name]} in "
                f"process {number}: see that all have the same disk and the same command",
            )
