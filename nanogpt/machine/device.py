"""Devices (CPU, CUDA, ROCm, MPS) and their capabilities; no other file asks for a device's type.

Example: device = pick_device("auto"); kind = kind_of(device); kind.describe(device); kind.is_async
A kind of device (device_kind.py) is a class with a row in KINDS; another accelerator is another row (the
tests register one of their own). precision.py chooses a dtype by its speed. Prints nothing, reads no files.
"""

import re
import sys
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, cast

import psutil
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanogpt.errors import UserError, require
from nanogpt.machine.device_kind import DeviceKind, Event
from nanogpt.machine.graphs import CudaGraphs
from nanogpt.machine.malloc import keep_freed_memory
from nanogpt.units import GIB, plural

WINDOWS_MEMORY_FRACTION = 0.95
"""Fraction of a GPU's memory for PyTorch on Windows, whose driver spills the rest to main memory."""

ROCM_BF16_ARCHITECTURES = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
"""AMD architectures with bfloat16 in hardware: CDNA, and RDNA from its third generation on."""


class CPU(DeviceKind):
    """The CPU."""

    type = "cpu"
    shares_memory = True
    explicit_attention_max_length = 512
    slow_random_numbers = True
    composes_rms_norm = True
    sparse_gradients = True

    def is_available(self) -> bool:
        """Always True."""
        return True

    def set_up(self, device: torch.device, dtype: torch.dtype) -> None:
        """Keep freed memory for the next update."""
        super().set_up(device, dtype)
        keep_freed_memory()

    def describe(self, device: torch.device) -> list[str]:
        """Name and number of threads."""
        name = str(cpu_capabilities().get("cpu_name") or "unnamed").strip()
        threads = torch.get_num_threads()
        return [f"Using CPU ({name}, {plural(threads, 'thread')})"]

    def free_memory(self, device: torch.device) -> float:
        """Free main memory in bytes; a container may allow less (training/memory_estimate.py)."""
        return psutil.virtual_memory().available


class CUDA(DeviceKind):
    """An NVIDIA GPU, or an AMD GPU with a ROCm build of PyTorch."""

    type = "cuda"
    is_async = True
    uses_pinned_memory = True
    compiles_by_default = sys.platform == "linux"
    logits_per_chunk = 2**27
    vocab_multiple = 128
    graphs = CudaGraphs() if torch.version.hip is None else None
    distributed_backend = "nccl"

    def __init__(self) -> None:
        self.driver_warning = ""
        """PyTorch's warning about a driver that it cannot use, which it gives only once."""

    def is_available(self) -> bool:
        """Whether PyTorch finds one."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            there = torch.cuda.is_available()
        for warning in caught:
            said = str(warning.message).removeprefix("CUDA initialization: ")
            self.driver_warning = said.splitlines()[0].split(". ")[0]
        return there

    def count(self) -> int:
        """Number of GPUs."""
        return torch.cuda.device_count() if self.is_available() else 0

    def find(self, device: torch.device) -> torch.device:
        """The device with its index, which torch.cuda.set_device needs. Raises: UserError."""
        count = self.count()
        because = f" ({self.driver_warning})" if self.driver_warning else ""
        require(
            (device.index or 0) < count,
            f"--device {device}: PyTorch sees {count} CUDA or ROCm devices here{because}: use --device cpu, "
            "or install a GPU build of PyTorch that fits the driver",
        )
        found = torch.device(self.type, device.index or 0)
        no_kernels = self.no_kernels_reason(found)
        require(
            not no_kernels, f"--device {device}: {no_kernels}: use --device cpu, or install another build"
        )
        return found

    def unusable_reason(self) -> str:
        """Reason not to use the first GPU: an old driver, or no kernels for it in this build of PyTorch."""
        return (
            self.no_kernels_reason(torch.device(self.type, 0)) if self.is_available() else self.driver_warning
        )

    def no_kernels_reason(self, device: torch.device) -> str:
        """The message if this build of PyTorch has no kernels for a GPU; "" if it has."""
        served = torch.cuda.get_arch_list()
        if not served:  # unknown
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
        """Name and memory."""
        rocm = torch.version.hip is not None
        name = torch.cuda.get_device_name(device)
        memory = cast(int, torch.cuda.get_device_properties(device).total_memory) / GIB
        kind, maker = ("ROCm", "AMD") if rocm else ("CUDA", "NVIDIA")
        return [f"{kind} available: Using {maker} GPU ({name})", f"GPU Memory: {memory:.2f} GB"]

    def set_up(self, device: torch.device, dtype: torch.dtype) -> None:
        """Use TF32 for the products that autocast leaves in float32, unless dtype is float32."""
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")
        if sys.platform == "win32":
            torch.cuda.set_per_process_memory_fraction(WINDOWS_MEMORY_FRACTION, device)

    def free_memory(self, device: torch.device) -> float:
        """Free memory in bytes, from the driver."""
        return torch.cuda.mem_get_info(device)[0]

    def release_memory(self) -> None:
        """Empty the cache of the allocator."""
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
    """The GPU of Apple Silicon. It uses main memory, which swaps before it runs out."""

    type = "mps"
    trains_float16 = False

    def is_available(self) -> bool:
        """Whether PyTorch finds one."""
        return torch.mps.is_available()

    def find(self, device: torch.device) -> torch.device:
        """The device, of which there is at most one. Raises: UserError."""
        require(self.is_available(), f"--device {device}: no Apple GPU here: use --device cpu")
        return device

    def describe(self, device: torch.device) -> list[str]:
        """The memory that Apple recommends to use."""
        memory = torch.mps.recommended_max_memory() / GIB
        return ["MPS available: Using Apple Silicon GPU", f"GPU Memory: {memory:.2f} GB"]

    def free_memory(self, device: torch.device) -> float:
        """Free bytes of the recommended memory."""
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()

    def release_memory(self) -> None:
        """Empty the cache of the allocator."""
        torch.mps.empty_cache()

    def synchronize(self, device: torch.device) -> None:
        """Wait for all command buffers."""
        torch.mps.synchronize()


KINDS: dict[str, DeviceKind] = {kind.type: kind for kind in (CUDA(), MPS(), CPU())}
"""Kinds of device by type, in the order in which "auto" tries them."""


def rocm_architecture(device: torch.device) -> str:
    """ROCm's name for the architecture of a GPU, such as gfx1100; "" without ROCm."""
    if torch.version.hip is None:
        return ""
    properties = cast(object, torch.cuda.get_device_properties(device))
    return str(getattr(properties, "gcnArchName", "")).partition(":")[0]


SIMULATED: ContextVar["DeviceKind | None"] = ContextVar("SIMULATED", default=None)


@contextmanager
def simulated(kind: DeviceKind) -> Generator[None]:
    """Let every device count as one of this kind, to predict on a CPU what a GPU would allocate."""
    token = SIMULATED.set(kind)
    try:
        yield
    finally:
        SIMULATED.reset(token)


def kind_of(device: torch.device) -> DeviceKind:
    """What a device can do."""
    if not torch.compiler.is_compiling() and (kind := SIMULATED.get()):
        return kind
    return KINDS[device.type]


def pick_device(name: str) -> torch.device:
    """The torch.device called `name`; "auto": the first usable one of CUDA (or ROCm), MPS, CPU.

    Raises: UserError if this machine has no such device.
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
    """Lines for the user about the device, and about faster ones that cannot be used."""
    better = list(KINDS.values())[: list(KINDS).index(device.type)]
    passed_over = [kind.unusable_reason() for kind in better]
    return [f"No GPU: {line}" for line in passed_over if line] + kind_of(device).describe(device)


def cpu_capabilities() -> dict[str, Any]:
    """PyTorch's information about this CPU; empty in versions that have none."""
    query = getattr(torch.cpu, "get_capabilities", None)
    return cast(dict[str, Any], query()) if query else {}


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype: float32, bfloat16 or float16."""
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
    """Disable torch.compile and cuDNN attention for the block.

    For evaluation and sampling, whose shapes change: compiling again, or planning a cuDNN kernel, for every
    length takes longer than it saves.
    """
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    compiled = "torch._dynamo" in sys.modules  # importing it takes a second
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), sdpa_kernel(kernels):
        yield


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory: of PyTorch, GPU libraries, oneDNN, Python or NumPy."""
    if isinstance(error, MemoryError):
        return True
    said = (
        "out of memory|can't allocate memory|not enough memory|could not create a (primitive|memory)"
        "|_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|(hip|cuda)ErrorOutOfMemory|bad_alloc"
    )
    return isinstance(error, RuntimeError) and bool(re.search(said, str(error)))


@contextmanager
def explain_out_of_memory() -> Generator[None]:
    """Turn an out-of-memory error in the block into a UserError with advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory: give --device cpu if this is a GPU, or end other programs that use its memory"
        ) from error


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Measure how many seconds an action takes on a device."""
    kind = kind_of(device)
    kind.synchronize(device)
    start = time.perf_counter()
    action()
    kind.synchronize(device)
    return time.perf_counter() - start
