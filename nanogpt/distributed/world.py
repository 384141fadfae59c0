"""The processes of a distributed training: rank, world size, collectives, start and shutdown.

Run:     torchrun --nproc_per_node=2 train.py --preset cpu
Example: with distributed_world() as world: ...; world.max_over_ranks(flag); world.all_gather(losses)
torchrun starts one process per device and sets environment variables (RANK, WORLD_SIZE, ...);
torch.distributed connects the processes. All processes execute the same steps; only rank 0 writes files and
prints. DDP and FSDP are in distributed/parallelize.py. Does not know the training loop.
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

from nanogpt.errors import UserError, require
from nanogpt.machine.device import KINDS
from nanogpt.terminal import streams
from nanogpt.terminal.console import one_line

if TYPE_CHECKING:  # does not exist in a PyTorch without torch.distributed, as for AMD on Windows
    from torch.distributed.distributed_c10d import PrefixStore

Item = TypeVar("Item")

EXIT_BUG, EXIT_ERROR = 1, 2

SHUTDOWN_TIMEOUT = timedelta(seconds=60)
"""How long finished processes wait for the others."""

FOREIGN_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
"""Environment variables with the number of processes -> the launcher that sets them."""


@dataclass(frozen=True)
class World:
    """Rank and world size of this process, and collectives over all processes.

    With one process, every collective returns its input. All processes call collectives in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank among the processes of this machine; also the index of the GPU that this process uses."""
    local_size: int = 1
    """Number of processes on this machine."""
    job: str = ""
    """Name of torchrun's job (--rdzv_id); empty if it has none."""
    restarted: bool = False
    """Whether torchrun restarted the processes because one of them died."""

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0, which writes files and prints."""
        return self.rank == 0

    def local_share(self, items: NDArray[Any]) -> NDArray[Any]:
        """The contiguous slice of a batch for this process. The lengths of slices differ by one at most."""
        return np.array_split(items, self.size)[self.rank]

    def max_over_ranks(self, *values: int) -> list[int]:
        """All-reduce: the maximum of each value over all processes."""
        if self.size == 1:
            return list(values)
        maxima = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
        return cast(list[int], maxima.tolist())

    def all_gather(self, values: Sequence[Item]) -> list[Item]:
        """All-gather: the values of all processes in one list, in the order of the ranks."""
        if self.size == 1:
            return list(values)
        lists: list[Any] = [None] * self.size
        dist.all_gather_object(lists, list(values))
        return [value for values_of_rank in lists for value in values_of_rank]

    @contextmanager
    def raise_on_all(self) -> Generator[None]:
        """Make a failure of one process a failure of all, so that none waits for it in a collective.

        Raises: UserError on all processes if the block raises UserError or OSError on one of them.
        """
        messages: list[str] = []
        try:
            yield
        except (UserError, OSError) as error:
            messages = [str(error)]
        messages = self.all_gather(messages)
        if messages:
            raise UserError(messages[0])

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """All-reduce: the sum of a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def broadcast_bool(self, choose: Callable[[], bool]) -> bool:
        """Broadcast a decision of rank 0, the only process that calls `choose`."""
        return bool(self.max_over_ranks(int(self.is_first and choose()))[0])


ALONE = World()


def launched() -> bool:
    """Whether torchrun, or a launcher that sets the same environment variables, started this process.

    Raises: UserError if a launcher that does not set them started several processes.
    """
    if not dist.is_available():
        return False
    if dist.is_torchelastic_launched() or int_from_environment("WORLD_SIZE") > 1:
        return True
    for variable, launcher in FOREIGN_LAUNCHERS.items():
        require(
            int_from_environment(variable) <= 1,
            f"{launcher} has started {os.environ.get(variable)} processes that do not know of one another: "
            "let torchrun start them (docs/scaling.md)",
        )
    return False


def int_from_environment(variable: str, default: int = 1) -> int:
    """The integer in an environment variable; the default if it is unset or not an integer."""
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else default


@contextmanager
def distributed_world(device: str = "auto") -> Generator[World]:
    """Connect to the other processes that torchrun started; without torchrun, a world of one process.

    If the block fails in one process, all processes exit; only the first to fail prints an error.
    device: config.device.
    Raises: UserError if the launcher sets too few environment variables.
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
        int_from_environment("LOCAL_RANK", 0),
        int_from_environment("LOCAL_WORLD_SIZE"),
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
    """Initialize torch.distributed's process group. NCCL gets the GPU's index for its messages."""
    libraries = backend()
    own = local_device(device, world)
    uses_nccl = own.startswith("cuda:") and "nccl" in libraries
    dist.init_process_group(
        libraries,
        store=store,
        rank=world.rank,
        world_size=world.size,
        device_id=torch.device(own) if uses_nccl and torch.cuda.device_count() > world.local_rank else None,
    )


def fail(error: Exception, world: World, *, first: bool) -> NoReturn:
    """Print the error, if this process is the first to fail, and exit immediately.

    It does not destroy the process group: NCCL would wait for processes that may be dead.
    """
    process = f"process {world.rank + 1} of {world.size}"
    code = EXIT_ERROR
    if first and is_lost_connection(error):
        print(f"{process}: lost the connection to another process", file=sys.stderr)
    elif first and isinstance(error, UserError):
        print(f"error{'' if world.is_first else f' ({process})'}: {one_line(str(error))}", file=sys.stderr)
    elif first:
        traceback.print_exception(error)
        code = EXIT_BUG
    streams.show_cursor()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def restart_prefix(world: World) -> str:
    """A prefix of the keys in torchrun's store that is new after each restart.

    After a restart the store still holds the addresses of the dead processes, unless torchrun creates a new
    store (TORCH_DISABLE_SHARE_RDZV_TCP_STORE). With several machines it must: each machine counts restarts on
    its own, so they would not agree on a prefix.
    """
    one_machine = world.size == world.local_size
    return f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if one_machine else "machines"


def is_lost_connection(error: Exception) -> bool:
    """Whether an error means that another process died; every NCCL error counts as such."""
    pattern = "gloo.*(onnection (closed|reset|refused)|roken pipe|pair closure)|NCCL error|remote process"
    return isinstance(error, RuntimeError) and bool(re.search(pattern, str(error)))


def shutdown_barrier(world: World, store: "PrefixStore") -> None:
    """Wait until all processes are finished: one that exits early closes connections that others still read.

    Rank 0 may host the store, so it leaves last.
    """
    finished = store.add("finished", 1)
    with suppress(RuntimeError):  # a process died: torchrun reports it, and nothing is lost here
        if not world.is_first:
            store.wait(["all finished"], SHUTDOWN_TIMEOUT)
            return
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT.total_seconds()
        while finished < world.size and time.monotonic() < deadline:
            time.sleep(0.01)
            finished = store.add("finished", 0)
        store.set("all finished", "")


def hard_exit(code: int) -> None:
    """Exit immediately if torchrun started this process; without torchrun, do nothing.

    Threads of torch.distributed can run for a moment after its shutdown. If one frees a tensor while the
    interpreter shuts down, the process aborts, and torchrun reports a finished training as failed.
    """
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def backend() -> str:
    """The backend of torch.distributed: gloo for CPU tensors, NCCL for GPUs where PyTorch has it.

    PyTorch has no NCCL on Windows and in some Jetson builds; there gloo reduces CUDA tensors too.
    """
    libraries = {"cpu": "gloo"}
    for kind in KINDS.values():
        if kind.distributed_backend == "nccl" and kind.is_available() and dist.is_nccl_available():
            libraries[kind.type] = "nccl"
    if len(libraries) == 1:
        return "gloo"
    return ",".join(f"{device}:{library}" for device, library in libraries.items())


def local_device(name: str, world: World) -> str:
    """The device of this process: with several processes, the GPU with its local rank as index, or the CPU.

    Raises: UserError for several processes on an Apple GPU, or on one CUDA GPU.
    """
    if world.size == 1:
        return name
    require(name != "mps", "--device mps takes one process: give --device cpu, or start it without torchrun")
    require(
        world.local_size == 1 or name in ("auto", "cuda", "cpu"),
        f"--device {name} is for one process, but there are {world.local_size}: give --device cuda, and each "
        "process takes a GPU of its own",
    )
    if name == "cuda" or (
        name == "auto" and KINDS["cuda"].is_available() and not KINDS["cuda"].unusable_reason()
    ):
        return f"cuda:{world.local_rank}"
    return "cpu" if name == "auto" else name


def check_same_start(world: World, start: Mapping[str, object]) -> None:
    """Check that all processes start equal; else they would average the gradients of different trainings.

    start: name -> value, such as the seed, the step and the fingerprint of the data.
    Raises: UserError on all processes, naming a value that differs and the process that has it.
    """
    first, *others = world.all_gather([dict(start)])
    for number, other in enumerate(others, 2):
        for name, value in first.items():
            require(
                other[name] == value,
                f"the processes do not start from the same {name}: {value} in process 1, {other[name]} in "
                f"process {number}: give all the same command and the same files",
            )
