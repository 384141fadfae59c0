"""Which kernels take the time of an update on a GPU, launch by launch and as a CUDA graph.

Run:    python bench/gpu/kernels.py                          the default model, two presets, GPT-2 124 M
        python bench/gpu/kernels.py --small --device cpu     tries the script
Prints the pace of updates and the kernels that take longest, from PyTorch's profiler. An update is
trainer.train_step, as in throughput.py. Writes gpu-kernels.jsonl. Needs torch, numpy, psutil, rich, filelock.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import common
import torch
from rows import Results, attempt, fresh, parser_of, place_of
from throughput import Case, Update, cases, train_update
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nanogpt import presets
from nanogpt.machine.device import kind_of

UPDATES = 20


def kernels(update: Update, place: torch.device, count: int) -> list[dict[str, Any]]:
    """Milliseconds and launches of each kernel in an update, the longest first. On a CPU: of operations."""
    on_cpu = place.type == "cpu"
    activities = [ProfilerActivity.CPU] if on_cpu else [ProfilerActivity.CUDA]
    kind_of(place).synchronize(place)
    with profile(activities=activities) as profiler:
        for _ in range(count):
            update()
        kind_of(place).synchronize(place)
    wanted = DeviceType.CPU if on_cpu else DeviceType.CUDA
    found = [
        {
            "ms": (event.self_cpu_time_total if on_cpu else event.self_device_time_total) / 1000 / count,
            "launches": event.count / count,
            "name": event.key,
        }
        for event in profiler.key_averages()
        if event.device_type == wanted and "#" not in event.key  # ranges of optimizers are no kernels
    ]
    return sorted(found, key=lambda row: -row["ms"])


def measure(case: Case, place: torch.device, folder: Path, *, captured: bool) -> dict[str, Any]:
    """Pace, and the kernels of an update."""
    fresh(place)
    update = train_update(case, "", place, torch.bfloat16, folder, captured)

    def many() -> None:
        for _ in range(UPDATES):
            update()

    many()
    pace = common.seconds(many, place) / UPDATES
    rows = kernels(update, place, 5)
    return {
        "ms": 1000 * pace,
        "in kernels, ms": sum(row["ms"] for row in rows),
        "launches": sum(row["launches"] for row in rows),
        "kernels": rows,
    }


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--gpt2_batch", type=int, default=32)
    parser.add_argument("--most", type=int, default=16, help="kernels shown of each update")
    parser.add_argument("--small", action="store_true", help="tiny models")
    options = parser.parse_args()
    place = place_of(options)
    wanted = cases(options)
    if not options.small:
        small = [Case(f"preset {name}", presets.get(name), 65) for name in ("speedrun", "best")]
        wanted = [small[0], small[1], *wanted[:-1]]  # without GPT-2's other vocabulary
    with Results("gpu-kernels", options) as results, tempfile.TemporaryDirectory() as folder:
        for case in wanted:
            for captured in (False, True) if kind_of(place).graphs else (False,):
                row = {"model": case.name, "optimizer": case.config.optimizer}
                row |= {"launched": "as a graph" if captured else "one by one"}
                row |= attempt(partial(measure, case, place, Path(folder), captured=captured))
                results.add(row)
                for kernel in row.get("kernels", [])[: options.most]:
                    print(f"  {kernel['ms']:8.3f} ms  {kernel['launches']:6.1f} x  {kernel['name'][:90]}")
        fresh(place)  # before its folder goes


if __name__ == "__main__":
    main()
