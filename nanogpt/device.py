"""Which device, which arithmetic, compiled or not; what it is called and what it can do.

Use:    device = pick_device("auto"); describe(device); dtype = pick_dtype("auto", device, width=384)
Returns its findings as values; it prints nothing and reads no files.
"""

import re
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import nn

from nanogpt.config import Dtype, Switch, UserError, require

GIB = 1024**3

TRIAL_ROWS, TRIAL_ROUNDS = 2048, 4
"""Size of the measurement that decides whether bfloat16 pays on a CPU: about 0.2 s."""


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first of CUDA (or ROCm), MPS, CPU that is there.

    A CUDA device has its number: torch.cuda.set_device refuses one without.
    Errors: UserError if there is no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is unknown: use auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        require(
            (device.index or 0) < count,
            f"--device {name}: PyTorch sees {count} CUDA or ROCm devices here: use --device cpu, or "
            "install a GPU build of PyTorch",
        )
        return torch.device("cuda", device.index or 0)
    if device.type == "mps":
        require(torch.mps.is_available(), f"--device {name}: no Apple GPU here: use --device cpu")
    else:
        require(device.type == "cpu", f"--device {name} is unknown: use auto, cpu, cuda, cuda:1 or mps")
    return device


def describe(device: torch.device) -> list[str]:
    """What the device is, a line each, for the user."""
    if device.type == "cuda":
        rocm = torch.version.hip is not None
        name = torch.cuda.get_device_name(device)
        memory = cast(int, torch.cuda.get_device_properties(device).total_memory) / GIB
        kind, maker = ("ROCm", "AMD") if rocm else ("CUDA", "NVIDIA")
        return [f"{kind} available: Using {maker} GPU ({name})", f"GPU Memory: {memory:.2f} GB"]
    if device.type == "mps":
        memory = torch.mps.recommended_max_memory() / GIB
        return ["MPS available: Using Apple Silicon GPU", f"GPU Memory: {memory:.2f} GB"]
    name = str(cpu_capabilities().get("cpu_name") or "unnamed").strip()
    threads = torch.get_num_threads()
    return [f"Using CPU ({name}, {threads} thread{'s' * (threads > 1)})"]


def cpu_capabilities() -> dict[str, Any]:
    """What PyTorch knows of this processor; empty in versions that do not tell."""
    query = getattr(torch.cpu, "get_capabilities", None)
    return cast(dict[str, Any], query()) if query else {}


def pick_dtype(name: Dtype, device: torch.device, width: int) -> torch.dtype:
    """The dtype of the matrix products; weights stay float32.

    "auto" is bfloat16 where it is native (compute capability >= 8.0, not mere emulation; CPUs
    with bfloat16 instructions, if a trial at this `width` shows that it pays), float16 on older
    CUDA devices, else float32.
    """
    require(
        not (name == "float16" and device.type == "mps"),
        "--dtype float16 does not train on Apple GPUs: use float32 or bfloat16",
    )
    if name != "auto":
        return cast(torch.dtype, getattr(torch, name))
    if device.type == "cuda":
        native = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and any(cpu_capabilities().get(key) for key in ("avx512_bf16", "amx_bf16")):
        return torch.bfloat16 if bfloat16_pays(width) else torch.float32
    return torch.float32


def name_of(dtype: torch.dtype) -> str:
    """float32, bfloat16 or float16."""
    return str(dtype).removeprefix("torch.")


def bfloat16_pays(width: int) -> bool:
    """Time an MLP of this width, forward and backward, in both dtypes, and compare."""
    layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    x = torch.zeros(TRIAL_ROWS, width)
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    for _ in range(TRIAL_ROUNDS):  # in turn, so that a busy machine slows both
        for dtype in best:
            start = time.perf_counter()
            with autocast(torch.device("cpu"), dtype):
                y = cast(torch.Tensor, layers(x)).sum()
            y.backward()
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.bfloat16] < best[torch.float32]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """The context in which matrix products run in `dtype`."""
    if dtype == torch.float32:
        return nullcontext()
    return cast(AbstractContextManager[None], torch.autocast(device.type, dtype=dtype))


def pick_compile(switch: Switch, device: torch.device) -> bool:
    """Whether to use torch.compile: as told, or by default on Linux with CUDA."""
    if switch == "auto":
        return device.type == "cuda" and sys.platform == "linux"
    return switch == "on"


def runs_ahead(device: torch.device) -> bool:
    """Whether the device is given work without waiting for it: then no step may ask for a number."""
    return device.type == "cuda"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch says so: torch.OutOfMemoryError is a RuntimeError; MPS and CPU raise that itself."""
    return bool(re.search(r"out of memory|can't allocate memory|not enough memory", str(error)))


def release_memory(device: torch.device) -> None:
    """Give back what PyTorch keeps of the device's memory without using it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given, so that clocks tell the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
