"""Which device, and what it can do: the one place that asks for a device's type.

Use:    device = pick_device("auto"); kind = kind_of(device); kind.describe(device); kind.is_async
A kind of device is a class below, with a row in KINDS; another accelerator is another row (the tests register
one of their own there). Which dtype a device multiplies fast: precision.py.
Returns its findings as values; it prints nothing and reads no files.
"""

import re
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, cast

import psutil
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanogpt.config import Switch
from nanogpt.console import GIB, plural
from nanogpt.errors import UserError, require

MIN_COMPILE_OPERATIONS = 1e15
"""Operations of a training from which the minute that torch.compile takes comes back."""

WINDOWS_MEMORY_FRACTION = 0.95
"""Share of a GPU's memory that PyTorch may take there: beyond it the driver spills to main memory unasked."""

ROCM_BF16_ARCHITECTURES = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
"""AMD's architectures with units for bfloat16: CDNA, and RDNA from its third generation on."""

UNLIMITED = float("inf")


class Event(Protocol):
    """A point in the work that a device was given."""

    def synchronize(self) -> None:
        """Wait until the device has come there."""
        ...


class DeviceKind(ABC):
    """What a kind of device can do. The attributes are those of a plain accelerator."""

    type: str
    """What PyTorch calls it."""
    is_async = False
    """Whether it takes work without being waited for: then no step may ask for a number."""
    uses_pinned_memory = False
    """Whether what is copied to it in the background has to lie in pinned memory."""
    compiles_by_default = False
    """Whether torch.compile pays in a long training."""
    shares_memory = False
    """Whether its memory is the machine's: running out of it ends the process and cannot be caught."""
    tailored = False
    """Whether attention and dropout go ways of their own there, which are faster."""
    chunk_logits = 2**25
    """Logits of a large vocabulary held at a time: enough to keep its matrix products busy."""
    trains_float16 = True
    """Whether float16, whose gradients have to be scaled, trains there."""
    distributed_backend = "gloo"
    """The library that connects processes which compute on it."""

    @abstractmethod
    def is_available(self) -> bool:
        """Whether there is one that this PyTorch can use."""

    @abstractmethod
    def describe(self, device: torch.device) -> list[str]:
        """What it is, a line each, for the user."""

    def native_dtype(self, device: torch.device) -> tuple[torch.dtype, str] | None:
        """The dtype that it has units for, and what tells so; None if that has to be measured."""
        return None

    def find(self, device: torch.device) -> torch.device:
        """The device, by its number if it has one. Errors: UserError if it is not there."""
        require(self.is_available(), f"--device {device}: there is none here: use --device cpu")
        return device

    def unusable_reason(self) -> str:
        """Why "auto" passes it over although it is there, in a line; "" if it does not."""
        return ""

    def set_up(self, device: torch.device, dtype: torch.dtype) -> None:
        """Set PyTorch up to compute on it, with products in `dtype`."""
        torch.set_float32_matmul_precision("highest")

    def free_memory(self, device: torch.device) -> float:
        """Bytes that are free on it, as far as it tells."""
        return UNLIMITED

    def release_memory(self) -> None:
        """Give back what PyTorch keeps of its memory without using it."""
        return

    def synchronize(self, device: torch.device) -> None:
        """Wait until it has done all it was given, so that clocks tell the truth."""
        return

    def record_event(self, device: torch.device) -> Event | None:
        """The point that its work has come to; None if it does not run ahead."""
        return None

    def generator(self, device: torch.device, seed: int) -> torch.Generator:
        """A source of random numbers on it."""
        return torch.Generator(device).manual_seed(seed)

    def pin_memory(self, values: Tensor) -> Tensor:
        """The values in main memory that the device can read by itself."""
        return values.pin_memory() if self.uses_pinned_memory else values


class CPU(DeviceKind):
    """The processor."""

    type = "cpu"
    shares_memory = True
    tailored = True

    def is_available(self) -> bool:
        """There always is one."""
        return True

    def describe(self, device: torch.device) -> list[str]:
        """Its name and the threads in use."""
        name = str(cpu_capabilities().get("cpu_name") or "unnamed").strip()
        threads = torch.get_num_threads()
        return [f"Using CPU ({name}, {plural(threads, 'thread')})"]

    def free_memory(self, device: torch.device) -> float:
        """Bytes of main memory; a container may allow less (training/memory_estimate.py)."""
        return psutil.virtual_memory().available


class CUDA(DeviceKind):
    """A GPU of NVIDIA's, or of AMD's with a ROCm build of PyTorch."""

    type = "cuda"
    is_async = True
    uses_pinned_memory = True
    compiles_by_default = sys.platform == "linux"
    chunk_logits = 2**27
    distributed_backend = "nccl"

    def __init__(self) -> None:
        self.driver_warning = ""
        """What PyTorch says of a driver that it cannot use: a warning, and once."""

    def is_available(self) -> bool:
        """Whether PyTorch sees one."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            there = torch.cuda.is_available()
        for warning in caught:
            said = str(warning.message).removeprefix("CUDA initialization: ")
            self.driver_warning = said.splitlines()[0].split(". ")[0]
        return there

    def count(self) -> int:
        """How many there are."""
        return torch.cuda.device_count() if self.is_available() else 0

    def find(self, device: torch.device) -> torch.device:
        """With its number: torch.cuda.set_device refuses a device without. Errors: UserError."""
        count = self.count()
        because = f" ({self.driver_warning})" if self.driver_warning else ""
        require(
            (device.index or 0) < count,
            f"--device {device}: PyTorch sees {count} CUDA or ROCm devices here{because}: use --device cpu, "
            "or install a GPU build of PyTorch that fits the driver",
        )
        found = torch.device(self.type, device.index or 0)
        unserved = self.no_kernels_reason(found)
        require(not unserved, f"--device {device}: {unserved}: use --device cpu, or install another build")
        return found

    def unusable_reason(self) -> str:
        """The driver is too old, or the first card is older than any that this build has code for."""
        return (
            self.no_kernels_reason(torch.device(self.type, 0)) if self.is_available() else self.driver_warning
        )

    def no_kernels_reason(self, device: torch.device) -> str:
        """What is wrong if this build of PyTorch has no code for a card; "" if it has."""
        served = torch.cuda.get_arch_list()
        if not served:  # it does not tell
            return ""
        name, gfx = torch.cuda.get_device_name(device), rocm_architecture(device)
        if gfx:
            missing = any(arch.startswith("gfx") for arch in served) and gfx not in served
            return f"this build of PyTorch has no code for {name} ({gfx})" if missing else ""
        cards = [
            (match[1], int(match[2]), int(match[3]))
            for arch in served
            if (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch))
        ]
        major, minor = torch.cuda.get_device_capability(device)
        runs = any(
            (major == m and minor >= n) if code == "sm" else (major, minor) >= (m, n) for code, m, n in cards
        )
        if runs or not cards:
            return ""
        return f"this build of PyTorch has no code for {name} (compute capability {major}.{minor})"

    def native_dtype(self, device: torch.device) -> tuple[torch.dtype, str] | None:
        """bfloat16 from compute capability 8.0 on (no emulation), float16 where that is fast, or float32."""
        gfx, (major, minor) = rocm_architecture(device), torch.cuda.get_device_capability(device)
        if torch.version.hip is not None:
            has = gfx.startswith(ROCM_BF16_ARCHITECTURES) if gfx else major >= 11
            return torch.bfloat16 if has else torch.float16, f"native to {gfx or 'this card'}"
        why = f"native to compute capability {major}.{minor}"
        if major >= 8:
            return torch.bfloat16, why
        if major == 7 or (major, minor) in ((5, 3), (6, 0), (6, 2)):
            return torch.float16, why
        return torch.float32, why  # these cards compute float16 at a sixty-fourth of its speed

    def describe(self, device: torch.device) -> list[str]:
        """Its name and its memory."""
        rocm = torch.version.hip is not None
        name = torch.cuda.get_device_name(device)
        memory = cast(int, torch.cuda.get_device_properties(device).total_memory) / GIB
        kind, maker = ("ROCm", "AMD") if rocm else ("CUDA", "NVIDIA")
        return [f"{kind} available: Using {maker} GPU ({name})", f"GPU Memory: {memory:.2f} GB"]

    def set_up(self, device: torch.device, dtype: torch.dtype) -> None:
        """TF32 for the few products that autocast leaves alone, unless float32 was asked for."""
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")
        if sys.platform == "win32":
            torch.cuda.set_per_process_memory_fraction(WINDOWS_MEMORY_FRACTION, device)

    def free_memory(self, device: torch.device) -> float:
        """Bytes, as the driver counts them."""
        return torch.cuda.mem_get_info(device)[0]

    def release_memory(self) -> None:
        """Empty the allocator's cache."""
        torch.cuda.empty_cache()

    def synchronize(self, device: torch.device) -> None:
        """Wait for all streams."""
        torch.cuda.synchronize(device)

    def record_event(self, device: torch.device) -> Event | None:
        """An event in the current stream."""
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(device))
        return ready


class MPS(DeviceKind):
    """The GPU of an Apple Silicon machine. It shares main memory, and swaps before it is out of it."""

    type = "mps"
    trains_float16 = False

    def is_available(self) -> bool:
        """Whether PyTorch sees one."""
        return torch.mps.is_available()

    def find(self, device: torch.device) -> torch.device:
        """There is one and no more. Errors: UserError."""
        require(self.is_available(), f"--device {device}: no Apple GPU here: use --device cpu")
        return device

    def describe(self, device: torch.device) -> list[str]:
        """How much memory Apple recommends to use."""
        memory = torch.mps.recommended_max_memory() / GIB
        return ["MPS available: Using Apple Silicon GPU", f"GPU Memory: {memory:.2f} GB"]

    def free_memory(self, device: torch.device) -> float:
        """Bytes that are left of what is recommended."""
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()

    def release_memory(self) -> None:
        """Empty the allocator's cache."""
        torch.mps.empty_cache()

    def synchronize(self, device: torch.device) -> None:
        """Wait for all command buffers."""
        torch.mps.synchronize()


KINDS: dict[str, DeviceKind] = {kind.type: kind for kind in (CUDA(), MPS(), CPU())}
"""In the order in which "auto" takes them."""


def rocm_architecture(device: torch.device) -> str:
    """What ROCm calls the architecture of a card, gfx1100 for example; "" without ROCm."""
    if torch.version.hip is None:
        return ""
    properties = cast(object, torch.cuda.get_device_properties(device))
    return str(getattr(properties, "gcnArchName", "")).partition(":")[0]


def kind_of(device: torch.device) -> DeviceKind:
    """What a device can do."""
    return KINDS[device.type]


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first of CUDA (or ROCm), MPS, CPU that can be used.

    Errors: UserError if there is no such device on this machine.
    """
    if name == "auto":
        name = next(
            kind.type for kind in KINDS.values() if kind.is_available() and not kind.unusable_reason()
        )
    unknown = f"--device {name} is unknown: use auto, cpu, cuda, cuda:1 or mps"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(unknown) from error
    require(device.type in KINDS, unknown)
    return kind_of(device).find(device)


def describe(device: torch.device) -> list[str]:
    """What the device is, a line each, for the user; and which better one cannot be used."""
    better = list(KINDS.values())[: list(KINDS).index(device.type)]
    passed_over = [kind.unusable_reason() for kind in better]
    return [f"No GPU: {line}" for line in passed_over if line] + kind_of(device).describe(device)


def cpu_capabilities() -> dict[str, Any]:
    """What PyTorch knows of this processor; empty in versions that do not tell."""
    query = getattr(torch.cpu, "get_capabilities", None)
    return cast(dict[str, Any], query()) if query else {}


def name_of(dtype: torch.dtype) -> str:
    """float32, bfloat16 or float16."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype called float32, bfloat16 or float16: the inverse of name_of."""
    return cast(torch.dtype, getattr(torch, name))


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """The context in which matrix products run in `dtype`."""
    if dtype == torch.float32:
        return nullcontext()
    return cast(AbstractContextManager[None], torch.autocast(device.type, dtype=dtype))


@contextmanager
def eager_mode() -> Generator[None]:
    """Run what is compiled uncompiled, with kernels that need no plan for each new length.

    For evaluation and sampling, whose shapes change: compiling for them, or a plan of cuDNN's for each length
    of a text that grows, takes longer than it saves.
    """
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    compiled = "torch._dynamo" in sys.modules  # which takes a second to import for nothing
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), sdpa_kernel(kernels):
        yield


def pick_compile(switch: Switch, device: torch.device, work: float) -> bool:
    """Whether to use torch.compile: as told, or by default on Linux with CUDA, if it pays.

    work: floating-point operations of the whole training.
    """
    if switch == "auto":
        return kind_of(device).compiles_by_default and work >= MIN_COMPILE_OPERATIONS
    return switch == "on"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so: PyTorch's own, of a GPU's libraries, oneDNN's, Python's or NumPy's."""
    if isinstance(error, MemoryError):
        return True
    said = (
        "out of memory|can't allocate memory|not enough memory|could not create a (primitive|memory)"
        "|_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|(hip|cuda)ErrorOutOfMemory|bad_alloc"
    )
    return isinstance(error, RuntimeError) and bool(re.search(said, str(error)))
