"""An accelerator for machines that have none: a device that is not the CPU, on which everything really runs.

Use:    with standing_in_for(CudaLike()): fit(replace(config, device="gpu"))
PyTorch lets Python add a device (PrivateUse1). Its tensors wrap a tensor of the CPU, and every operation on
them is done on what they wrap; so all of PyTorch above the kernels is real: autograd, modules, optimizers,
autocast, and each of its checks. What hardware would object to is an error here: a tensor of the CPU among
those of the device, a step that waits for the device while it is not to (`forbid_waiting`).
What it can do is registered where the product says what devices can do: nanogpt.machine.device.KINDS.

Does not show: what a kernel computes, what is fast, memory that runs out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from nanogpt.machine import device as devices
from nanogpt.machine.device_kind import DeviceKind

aten = torch.ops.aten

NAME = "gpu"
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
}
"""Operations whose result the processor needs: it waits until the device has come to them."""

COPIES = {aten._to_copy.default, aten.copy_.default}
"""Operations that may have tensors of both sides."""

FOLLOW = {aten.index.Tensor, aten.index_put_.default}
"""Operations that take indices of the processor too, at the price of waiting for a copy."""


class WaitedError(RuntimeError):
    """The processor had to wait for the device."""


class State:
    """waiting_is_forbidden: while a test says so. waits: how often it happened. tape: of a capture."""

    waiting_is_forbidden = False
    waits = 0
    tape: "Tape | None" = None


def waits(why: str) -> None:
    """The processor waits for the device."""
    State.waits += 1
    if State.tape is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {why}")
    if State.waiting_is_forbidden:
        raise WaitedError(f"the host waits for the device: {why}")


@contextmanager
def forbid_waiting() -> Iterator[None]:
    """Make waiting for the device an error."""
    State.waiting_is_forbidden = True
    try:
        yield
    finally:
        State.waiting_is_forbidden = False


class OnDevice(Tensor):
    """A tensor of the stand-in. held: the one of the CPU that holds its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> "OnDevice":  # noqa: PYI034
        made = torch.Tensor._make_wrapper_subclass(
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(),
            dtype=real.dtype, device=torch.device(NAME, 0), requires_grad=real.requires_grad,
        )  # fmt: skip
        made.held = real
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """So that modules swap tensors when they move, which keeps tied weights tied."""
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> "OnDevice":
        return OnDevice(inner["held"])

    def __repr__(self, **_: object) -> str:
        return f"OnDevice({self.held!r})"

    def __reduce_ex__(self, protocol: int) -> Any:
        """Saved as a plain tensor, after a copy for which the processor waits."""
        waits("pickle")
        return self.held.detach().__reduce_ex__(protocol)

    def tolist(self) -> Any:
        """Its numbers, for which the processor waits."""
        waits("tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return execute(function, args, kwargs or {})


class Factories(TorchDispatchMode):
    """Sees to operations that make a tensor on the device out of nothing."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = kwargs.get("device")
        if function.namespace == "c10d" or (place is not None and torch.device(place).type == NAME):
            return execute(function, args, kwargs)
        return function(*args, **kwargs)


def execute(function: Any, args: Any, kwargs: Any) -> Any:
    """Do an operation on what the tensors wrap."""
    flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    ours = any(isinstance(x, OnDevice) for x in flat)
    place = kwargs.get("device")
    target = torch.device(place).type if place is not None else None
    if function in WAITS:
        waits(str(function))
    check_sides(function, args, flat)
    if function in COPIES:
        check_copy(function, args, kwargs, target)
    to_device = target == NAME or (ours and target is None)
    if function is aten.copy_.default:
        to_device = isinstance(args[0], OnDevice)
    if target is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    real_args, real_kwargs = tree_map(lambda x: x.held if isinstance(x, OnDevice) else x, (args, kwargs))
    if function is aten._pin_memory.default or function is aten.is_pinned.default:
        raise AssertionError("only memory of the processor is pinned")
    result = (State.tape or Untaped).record(function, real_args, real_kwargs)
    if not function._schema.returns:
        return None
    if function.namespace == "c10d":
        return args[0], result[1]
    if function._schema.name.endswith("_"):  # in place
        return args[0]
    if function is aten._local_scalar_dense.default or not to_device:
        return result
    return tree_map(
        lambda x: OnDevice(x) if isinstance(x, Tensor) and not isinstance(x, OnDevice) else x, result
    )


def check_sides(function: Any, args: Any, flat: list[Tensor]) -> None:
    """Errors: RuntimeError, as of a GPU, if tensors of both sides meet; scalars of the CPU may."""
    if function in COPIES or not any(isinstance(x, OnDevice) for x in flat):
        return
    written = args[0] if function._schema.is_mutable else None
    strangers = [x for x in flat if not isinstance(x, OnDevice) and (x.dim() > 0 or x is written)]
    if function in FOLLOW and strangers and isinstance(args[0], OnDevice):
        waits(f"{function} with indices of the CPU")
        return
    if strangers:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{NAME}:0 and cpu! ({function})"
        )


def check_copy(function: Any, args: Any, kwargs: Any, target: str | None) -> None:
    """Count a copy from one side to the other for which the processor waits."""
    if function is aten.copy_.default:
        one_sided = isinstance(args[0], OnDevice) == isinstance(args[1], OnDevice)
        background = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    else:
        one_sided = target is None or isinstance(args[0], OnDevice) == (target == NAME)
        background = kwargs.get("non_blocking", False)
    if not one_sided and not background:
        waits("a copy that is not in the background")


class Borrowed:
    """A tensor in memory that a tape does not own: a replay finds what is there then, if it is there."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.dtype = tensor.dtype
        self.place = tensor.storage_offset(), tensor.size(), tensor.stride()

    def tensor(self) -> Tensor:
        """The tensor. Raises: AssertionError if nobody has kept its memory."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, "a replay reads memory that is no longer there"
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class Tape:
    """What a CUDA graph is: operations with their numbers, on the same memory in each replay.

    A capture leaves everything as it was. What the host decides or writes is not on the tape. The memory of
    results belongs to the tape, all other memory to whoever keeps it.
    """

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.made: dict[int, Any] = {}
        """Memory that belongs to the tape."""
        self.before: dict[int, tuple[Any, Any]] = {}
        """Memory of others that it writes to, and what was there before the capture."""

    def record(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Do an operation, and note it."""
        inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        if function._schema.is_mutable:
            for storage in (x.untyped_storage() for x in inputs):
                if storage.data_ptr() not in self.made | self.before:
                    self.before[storage.data_ptr()] = storage, storage.clone()
        result = function(*args, **kwargs)
        theirs = {x.untyped_storage().data_ptr() for x in inputs}
        outputs = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
        new = [x for x in outputs if x.untyped_storage().data_ptr() not in theirs]
        self.made |= {x.untyped_storage().data_ptr(): x.untyped_storage() for x in new}
        if new or function._schema.is_mutable:  # else it is a view
            self.operations.append((function, args, kwargs, new))
        return result

    def finish(self) -> None:
        """Undo what the capture has written, and let go of the memory of others."""
        for storage, before in self.before.values():
            storage.copy_(before)
        self.before.clear()

        def borrow(x: Any) -> Any:
            owned = not isinstance(x, Tensor) or x.untyped_storage().data_ptr() in self.made
            return x if owned else Borrowed(x)

        self.operations = [
            (function, *tree_map(borrow, (args, kwargs)), outputs)
            for function, args, kwargs, outputs in self.operations
        ]

    def replay(self) -> None:
        """Do all operations once more."""
        for function, *given, outputs in self.operations:
            args, kwargs = tree_map(lambda x: x.tensor() if isinstance(x, Borrowed) else x, given)
            results = [x for x in tree_flatten(function(*args, **kwargs))[0] if isinstance(x, Tensor)]
            for output, result in zip(outputs, results if outputs else [], strict=True):
                output.copy_(result)


class Untaped:
    """No capture is under way."""

    @staticmethod
    def record(function: Any, args: Any, kwargs: Any) -> Any:
        return function(*args, **kwargs)


class Recorder:
    """Captures work on a tape: nanogpt.machine.graphs.Graphs of the stand-in."""

    def warm_up(self, work: Any) -> Any:
        """Nothing of the stand-in needs it."""
        return work()

    def capture(self, work: Any) -> Any:
        """Record the work, and undo it."""
        tape, random = Tape(), torch.get_rng_state()
        State.tape = tape
        try:
            result = work()
        finally:
            State.tape = None
            torch.set_rng_state(random)
            tape.finish()
        return tape.replay, result


class Module:
    """What `torch.gpu` has to be for PyTorch's own checks."""

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """Random numbers are the CPU's, which torch.manual_seed has seeded."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class Ready:
    """The event of work that is done at once."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class CudaLike(devices.CUDA):
    """Treated as CUDA is. What hardware, driver and libraries would answer stands here, and no more."""

    type = NAME
    compiles_by_default = False
    logits_per_chunk = 2**10
    graphs = Recorder()

    def is_available(self) -> bool:
        return True

    def count(self) -> int:
        return 1

    def no_kernels_reason(self, device: torch.device) -> str:
        return ""

    def native_dtype(self, device: torch.device) -> tuple[torch.dtype, str]:
        return torch.bfloat16, "native to the stand-in"

    def describe(self, device: torch.device) -> list[str]:
        return [f"Stand-in available: Using {device}"]

    def set_up(self, device: torch.device, dtype: torch.dtype) -> None:
        """PyTorch's own check of a device that is to be the current one."""
        number = () if device.index is None else (device.index,)
        torch.cuda._utils._get_device_index(torch.device("cuda", *number))

    def free_memory(self, device: torch.device) -> float:
        return 2.0**30

    def release_memory(self) -> None:
        """Nothing is kept."""

    def synchronize(self, device: torch.device) -> None:
        waits("synchronize")

    def record_event(self, device: torch.device) -> Ready:
        return Ready()

    def generator(self, device: torch.device, seed: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(seed)

    def pin_memory(self, values: Tensor) -> Tensor:
        assert not isinstance(values, OnDevice), "only memory of the processor is pinned"
        return values

    def empty_on_host(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, device="cpu")


class MpsLike(DeviceKind):
    """Treated as MPS is: it is waited for once a step, and nothing is pinned."""

    type = NAME
    trains_float16 = False
    is_available = CudaLike.is_available
    describe = CudaLike.describe
    generator = CudaLike.generator
    synchronize = CudaLike.synchronize

    def native_dtype(self, device: torch.device) -> tuple[torch.dtype, str]:
        return torch.float32, "safe on the stand-in"


LOWERED = ("linear", "matmul", "mm", "bmm", "baddbmm", "addmm", "scaled_dot_product_attention")
"""What autocast does in its dtype."""

KEPT: list[Any] = []
"""What has to live as long as the process; not empty once the device is registered."""


def register() -> None:
    """Make PyTorch know the device: once in a process, and before its first backward pass."""
    if KEPT:
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    rest = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel)
    library = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for name in LOWERED:
        library.impl(name, lowered(getattr(torch.ops.aten, name)))
    KEPT.extend((rest, library))


def lowered(operation: Any) -> Any:
    """The operation on tensors in autocast's dtype."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value: Any, dtype: torch.dtype) -> Any:
        narrow = isinstance(value, Tensor) and value.is_floating_point() and value.device.type == NAME
        return value.to(dtype) if narrow else value

    def call(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operation(
                *(cast(x, dtype) for x in args), **{k: cast(x, dtype) for k, x in kwargs.items()}
            )

    return call


@contextmanager
def standing_in_for(kind: DeviceKind) -> Iterator[torch.device]:
    """A machine with an accelerator of this kind, called "gpu"."""
    register()
    devices.KINDS[NAME] = kind
    try:
        with Factories():
            yield torch.device(NAME, 0)
    finally:
        del devices.KINDS[NAME]
