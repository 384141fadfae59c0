"""What the measurements share: clocks, the ceiling of the machine, one training step of ours, JSON.

Knows nothing of what is compared with what.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SAMPLING = {"decode.py", "llama.py", "runtimes.py"}
"""Measurements of what `sample` and `serve` do."""

SPINS = "10000" if Path(sys.argv[0]).name in SAMPLING else "1000"
os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # as the commands do, before PyTorch is imported

import torch
from torch import Tensor

from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.distributed.parallelize import checkpoint_activations
from nanogpt.model.gpt import GPT
from nanogpt.training.optimizer import build_optimizers

try:
    from nanogpt.machine import device as devices
    from nanogpt.machine import precision
except ModuleNotFoundError:  # in an earlier checkout, with bench/step.py --against
    from nanogpt import device as devices
    from nanogpt import precision

FOLDER = Path(__file__).parent
CPU = torch.device("cpu")

EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Settings with which glibc gives back at once what is freed: then resident memory is memory in use."""

Step = Callable[[Tensor, Tensor], None]


def seconds(action: Callable[[], object], place: torch.device = CPU) -> float:
    """How long an action takes, until the device has done it.

    Not device.seconds_of, which earlier checkouts do not have: bench/step.py --against measures those too.
    """
    devices.kind_of(place).synchronize(place)
    start = time.perf_counter()
    action()
    devices.kind_of(place).synchronize(place)
    return time.perf_counter() - start


def in_turn(
    actions: dict[str, Callable[[], object]], rounds: int, place: torch.device = CPU
) -> dict[str, Any]:
    """Seconds of each action in each round: one after the other, so that a busy moment slows all."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            times[name].append(seconds(action, place))
    return times


def ceiling(dtype: torch.dtype, place: torch.device = CPU, size: int | None = None) -> float:
    """Floating-point operations a second of a large square matrix product, median of 9."""
    size = size or (8192 if place.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, dtype=dtype, device=place) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * size**3 / statistics.median(seconds(lambda: a @ b, place) for _ in range(9))


def our_step(  # noqa: PLR0917
    config: GPTConfig,
    dtype: torch.dtype,
    place: torch.device = CPU,
    compiled: str = "",
    settings: TrainConfig | None = None,
    muon_dtype: torch.dtype | None = None,
) -> Step:
    """One update of ours as a function of a batch. compiled: a mode of torch.compile, or "" for none.

    muon_dtype: of Muon's Newton-Schulz iteration; None: what is fast on `place`.
    """
    model = GPT(config).to(place)
    settings = settings or TrainConfig()
    checkpoint_activations(model, settings.grad_checkpoint)
    optimizers = build_optimizers(
        model, settings, muon_dtype or precision.pick_muon_dtype("auto", place).dtype
    )
    loss_of = torch.compile(model.loss, mode=compiled) if compiled else model.loss

    def step(x: Tensor, y: Tensor) -> None:
        with devices.autocast(place, dtype):
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

    return step


def peak_memory(place: torch.device = CPU) -> float:
    """Most memory of the device that this process has held so far, in MiB; NaN where nobody tells.

    Of a GPU that is what PyTorch's allocator gave out, of a CPU resident memory.
    """
    if place.type == "cuda":
        return torch.cuda.max_memory_allocated(place) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def write_json(name: str, results: object) -> None:
    """Leave the results in bench/NAME.json, with the machine they belong to."""
    cuda = torch.cuda.is_available()
    record = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": " ".join(sys.argv),
        "results": results,
    }
    (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
