"""What the GPU measurements share: the machine, rows that are written as they are measured, a table.

Use:    with Results("gpu-race", options) as results: results.add({"preset": "best", "seconds": 2.5})
Run:    python bench/gpu/rows.py                names the cards, the driver, PyTorch
        python bench/gpu/rows.py FOLDER         prints a table of each gpu-*.jsonl in it
The first line of such a file is the machine, every other one a row: what a time limit cuts off keeps
all that came before. Needs torch, numpy and psutil, as the measurements do; nothing is imported from
nanogpt but nanogpt.machine.device.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch
from typing_extensions import Self

from nanogpt.machine import device as devices

FOLDER = Path(__file__).parents[1]

HIDDEN = (list, dict)
"""Values that stand in the file and not in the table."""


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The flags that every measurement has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the rows (bench/)")
    parser.add_argument("--name", help="name of the file there, without .jsonl")
    parser.add_argument("--device", default="cuda", help="cpu tries the script where there is no GPU")
    return parser


def place_of(options: argparse.Namespace) -> torch.device:
    """The device to measure. Ends the program, in a line, where it is not there."""
    if options.device != "cpu" and not torch.cuda.is_available():
        sys.exit("error: bench/gpu needs a CUDA or ROCm GPU: --device cpu tries the script without one")
    place = torch.device(options.device)
    return place if place.type == "cpu" else torch.device("cuda", place.index or 0)


def machine() -> dict[str, object]:
    """What the numbers belong to."""
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cards": [f"{card.name}, {card.total_memory / 2**30:.1f} GiB" for card in cards],
        "driver": driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "command": " ".join(sys.argv),
    }


def driver() -> str | None:
    """Version of NVIDIA's driver, None where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


class Results:
    """A file of rows that grows, each also printed in a line."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        options.out.mkdir(parents=True, exist_ok=True)
        self.file = (options.out / f"{options.name or name}.jsonl").open("w", encoding="utf-8")
        self.write({"machine": machine()})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, record: dict[str, Any]) -> None:
        """One line, on the disk before anything else happens."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row and show it."""
        self.write(row)
        print("  ".join(f"{name}: {shown(value)}" for name, value in visible(row).items()), flush=True)


def visible(row: dict[str, Any]) -> dict[str, Any]:
    """The values that go into a table."""
    return {name: value for name, value in row.items() if not isinstance(value, HIDDEN)}


def shown(value: object) -> str:
    """A value in few letters: three or more digits of a number."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows in columns, one for each name that any row has."""
    names = list(dict.fromkeys(name for row in rows for name in visible(row)))
    cells = [names, *([shown(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is measured; or why it could not be, so that one row that fails leaves the others."""
    try:
        return measure()
    except Exception as error:
        if devices.is_out_of_memory(error):
            return {"error": "out of memory"}
        line = next(iter(str(error).splitlines()), "")
        return {"error": f"{type(error).__name__}: {line}"[:200]}


def fresh(place: torch.device) -> None:
    """Forget what was compiled and give its memory back: CUDA graphs hold on to a pool."""
    torch.compiler.reset()
    gc.collect()
    devices.kind_of(place).release_memory()


def reset_peak(place: torch.device) -> None:
    """Count the most memory from here on, where that can be asked for (of a CPU it is since the start)."""
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)


def main() -> None:
    """Name the machine, or print what is in a folder."""
    if len(sys.argv) == 1:
        for name, value in machine().items():
            if name != "command":
                print(f"{name}: {value}")
        return
    for path in sorted(Path(sys.argv[1]).glob("gpu-*.jsonl")):
        lines = path.read_text("utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if "machine" not in row]
        if rows:
            print(f"\n{path}\n{table(rows)}")


if __name__ == "__main__":
    main()
