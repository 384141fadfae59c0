"""How fast a text becomes token files, and in how much memory.

Run:    python bench/prepare.py --megabytes 100 --rounds 3
Times `nanogpt data` as a whole process (start, reading, vocabulary, encoding, writing, syncing)
and beside it the plain way: sorted(set(text)) and a dictionary look-up for every character, also
as a whole process with the same imports. Prints a table of medians, writes bench/prepare.json.
The text is Tiny Shakespeare over and over (data/input.txt; run `python data.py` first).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent

PLAIN = """
import sys, numpy as np, torch
text = open(sys.argv[1], encoding="utf-8").read()
ids = {char: i for i, char in enumerate(sorted(set(text)))}
tokens = np.array([ids[char] for char in text], dtype=np.uint8)
split = int(0.9 * len(tokens))
torch.save(torch.from_numpy(tokens[:split]), sys.argv[2] + "/train.pt")
torch.save(torch.from_numpy(tokens[split:]), sys.argv[2] + "/val.pt")
"""


def measure(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MiB of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # it is reaped: Popen need not wait again
    if process.returncode:
        sys.exit(f"failed: {' '.join(command)}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    """Measure both ways in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    shakespeare = ROOT / "data" / "input.txt"
    if not shakespeare.exists():
        sys.exit("data/input.txt is missing: run python data.py first")
    results: dict[str, list[tuple[float, float]]] = {"nanogpt data": [], "dictionary loop": []}
    with tempfile.TemporaryDirectory() as folder:
        text = shakespeare.read_bytes()
        size = arguments.megabytes * 10**6
        path = Path(folder) / "text.txt"
        path.write_bytes((text * (size // len(text) + 1))[:size])
        ours = [sys.executable, "-m", "nanogpt.cli", "data", "--overwrite", "--input_file", str(path)]
        plain = [sys.executable, "-c", PLAIN, str(path), folder]
        for round_number in range(arguments.rounds):
            results["nanogpt data"].append(measure([*ours, "--data_dir", f"{folder}/{round_number}"]))
            results["dictionary loop"].append(measure(plain))
    report(results, arguments.megabytes)


def report(results: dict[str, list[tuple[float, float]]], megabytes: int) -> None:
    """Print the medians and write them as JSON."""
    table = Table("way", "seconds", "MB/s", "peak MiB", title=f"{megabytes} MB of text to token files")
    rows: dict[str, dict[str, float]] = {}
    for way, runs in results.items():
        seconds, memory = (statistics.median(column) for column in zip(*runs, strict=True))
        rows[way] = {"seconds": seconds, "mb_per_s": megabytes / seconds, "peak_mib": memory}
        table.add_row(way, f"{seconds:.2f}", f"{megabytes / seconds:.1f}", f"{memory:.0f}")
    Console().print(table)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    record = {"machine": machine, "torch": torch.__version__, "megabytes": megabytes, "results": rows}
    (ROOT / "bench" / "prepare.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
