"""Choice of the dtype of matrix products: for training, for Muon, for sampling.

Example: choice = pick_dtype("auto", device, width=384); choice.dtype, choice.reason
On a CPU or an Apple GPU, products are timed for a few milliseconds: without bfloat16 units, or a library that
uses them, bfloat16 is emulated at a twentieth of float32's speed. On an NVIDIA or AMD GPU, the architecture
decides (device.py).
"""

import functools
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from nanogpt.config import Dtype
from nanogpt.errors import require
from nanogpt.machine.device import autocast, dtype_of, kind_of, name_of

MATMUL_SIZES = (128, 512)
"""Sizes of the timed matrices: small ones quickly rule out slow dtypes, large ones find the fastest."""

MATMUL_REPEATS, HOPELESS_SLOWDOWN = 3, 3.0
"""Timings of each product (the shortest counts); slowdown beyond which a dtype is not timed any further."""

MIN_SPEEDUP = 1.15
"""Speedup over float32 from which a dtype of lower precision is used."""

MLP_ROWS, MLP_REPEATS = 1024, 4
"""Rows and repeats of the timed MLP that decides about bfloat16 on a CPU: about 0.2 s."""


@dataclass(frozen=True)
class DtypeChoice:
    """A dtype and the reason for it, in a few words."""

    dtype: torch.dtype
    reason: str


def pick_dtype(name: Dtype, device: torch.device, width: int) -> DtypeChoice:
    """The dtype of the matrix products in training a model of this width; its weights stay float32.

    "auto": on a GPU the one that its architecture supports in hardware, on a CPU the fastest in a trial.
    Raises: UserError for float16 on an Apple GPU.
    """
    kind = kind_of(device)
    require(
        name != "float16" or kind.trains_float16,
        "--dtype float16 does not train on Apple GPUs: use float32 or bfloat16",
    )
    if name != "auto":
        return DtypeChoice(dtype_of(name), "as --dtype says")
    native = kind.native_dtype(device)
    if native:
        return DtypeChoice(*native)
    if not kind.shares_memory:
        return DtypeChoice(torch.float32, "the one that every version of it trains in")
    if not is_faster_than_float32(torch.bfloat16, device):
        return DtypeChoice(torch.float32, describe_speedup(device))
    faster = is_bfloat16_faster(width)
    return DtypeChoice(
        torch.bfloat16 if faster else torch.float32, f"faster in layers of width {width}, by a trial"
    )


def pick_muon_dtype(name: Dtype, device: torch.device) -> DtypeChoice:
    """The dtype of Muon's Newton-Schulz iteration, whose result need not be exact (Jordan et al., 2024).

    Its values are at most 1, so float16 serves where bfloat16 is slow.
    """
    if name != "auto":
        return DtypeChoice(dtype_of(name), "as --dtype says")
    native = kind_of(device).native_dtype(device)
    if native:
        return DtypeChoice(*native)
    rates = matmul_rates(device)
    narrow = max((torch.bfloat16, torch.float16), key=rates.__getitem__)
    return DtypeChoice(
        narrow if is_faster_than_float32(narrow, device) else torch.float32, describe_speedup(device, narrow)
    )


def pick_sampling_dtype(name: Dtype, device: torch.device, trained_in: str) -> torch.dtype:
    """The dtype of the matrix products in sampling. "auto": that of the training if it is fast here."""
    if name != "auto":
        return dtype_of(name)
    dtype = dtype_of(trained_in)
    native = kind_of(device).native_dtype(device)
    fast = not is_slow(dtype, device) if native else is_faster_than_float32(dtype, device)
    return dtype if fast else torch.float32


def is_faster_than_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products in `dtype` are at least MIN_SPEEDUP times as fast as in float32."""
    rates = matmul_rates(device)
    return rates[dtype] > MIN_SPEEDUP * rates[torch.float32]


def is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `dtype` is emulated or missing on this device."""
    native = kind_of(device).native_dtype(device)
    if native is None:
        rates = matmul_rates(device)
        return rates[dtype] * HOPELESS_SLOWDOWN < rates[torch.float32]
    generation = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # each includes the earlier ones
    return generation[dtype] > generation[native[0]]


def describe_speedup(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """Speed of products in a dtype relative to float32, in words."""
    rates = matmul_rates(device)
    ratio = rates[dtype] / rates[torch.float32]
    if not ratio:
        return f"products in {name_of(dtype)} do not run here"
    faster, times = ratio > 1, max(ratio, 1 / ratio)
    digits = f"{times:.1f}" if times < 10 else f"{times:.0f}"
    return f"products in {name_of(dtype)} are {digits} x {'faster' if faster else 'slower'} here"


@functools.cache
def matmul_rates(device: torch.device) -> dict[torch.dtype, float]:
    """FLOP/s of batched matrix products in each dtype, 0 for a dtype that does not run.

    Takes milliseconds: a dtype that is far too slow in small products is not timed in large ones.
    """
    rates = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 0.0)
    left = list(rates)
    for size in MATMUL_SIZES:
        for dtype in left:
            with suppress(RuntimeError, TypeError, NotImplementedError):
                rates[dtype] = matmul_rate(dtype, device, size)
        left = [dtype for dtype in left if rates[dtype] * HOPELESS_SLOWDOWN >= max(rates.values())]
    return rates


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """FLOP/s of two square matrix products of this size."""
    x = torch.full((2, size, size), 1 / size, dtype=dtype, device=device)
    best = float("inf")
    with trial_clock(device) as clock:
        for _ in range(1 + MATMUL_REPEATS):  # the first one initializes the library
            start = clock()
            torch.bmm(x, x)
            best = min(best, clock() - start)
    return 2 * 2 * size**3 / max(best, 1e-9)


@contextmanager
def trial_clock(device: torch.device) -> Generator[Callable[[], float]]:
    """A clock for timing products that is hardly disturbed by other programs.

    On a CPU: PyTorch runs in one thread, and the clock is that thread's CPU time. On a GPU: wall time, after
    waiting for the device.
    """

    def synchronized() -> float:
        """Wall time in seconds, once the device is idle."""
        kind_of(device).synchronize(device)
        return time.perf_counter()

    if device.type != "cpu":
        yield synchronized
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        is_windows = sys.platform == "win32"  # where thread_time is too coarse
        yield time.perf_counter if is_windows else time.thread_time
    finally:
        torch.set_num_threads(threads)


def is_bfloat16_faster(width: int) -> bool:
    """Whether this CPU trains an MLP of this width faster in bfloat16 than in float32."""
    layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    x, cpu = torch.zeros(MLP_ROWS, width), torch.device("cpu")
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    with trial_clock(cpu) as clock:
        for _ in range(MLP_REPEATS):  # alternating, so that a busy machine slows down both
            for dtype in best:
                start = clock()
                with autocast(cpu, dtype):
                    y = cast(torch.Tensor, layers(x)).sum()
                y.backward()
                best[dtype] = min(best[dtype], clock() - start)
    return best[torch.bfloat16] < best[torch.float32]
