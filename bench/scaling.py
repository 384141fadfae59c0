"""Weak scaling: as much work for each process, one process against several.

Run:    python data.py && python bench/scaling.py --processes 2
Each process is pinned to a core of its own (on GPUs: has one) and takes --per_process sequences of a batch.
One process and several are measured in turn; efficiency is the ratio of tokens a second of each process.
By default the 10.65 M model, AdamW, no dropout.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common
from rich.console import Console
from rich.table import Table

CHILD = """
import os, sys
import torch
if not torch.cuda.is_available() and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
torch.set_num_threads(1)
from nanogpt import cli
cli.run_script("train")
"""


def tokens_per_s(processes: int, options: argparse.Namespace, folder: Path) -> float:
    """The median pace of a training, after its first updates."""
    script = folder / "child.py"
    script.write_text(CHILD)
    out = folder / "out"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words += [
        str(script),
        "--data_dir",
        options.data_dir,
        "--out_dir",
        str(out),
        "--overwrite",
        "--dropout",
        "0",
    ]
    words += ["--batch_size", str(processes * options.per_process), "--max_iters", str(options.steps)]
    words += ["--eval_interval", "100000", "--eval_iters", "1", "--log_interval", "1"]
    words += ["--dtype", options.dtype, "--optimizer", options.optimizer, "--parallel", options.parallel]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([row["tokens_per_s"] for row in rows if "tokens_per_s" in row][3:])


def main() -> None:
    """Measure in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--per_process", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--parallel", default="ddp", choices=("ddp", "fsdp"))
    parser.add_argument("--data_dir", default="data")
    options = parser.parse_args()
    paces: dict[int, list[float]] = {1: [], options.processes: []}
    with tempfile.TemporaryDirectory() as place:
        for _ in range(options.rounds):
            for processes, values in paces.items():
                values.append(tokens_per_s(processes, options, Path(place)))
    one = statistics.median(paces[1])
    table = Table(
        "processes", "tokens/s", "each", "efficiency", title=f"{options.per_process} sequences each"
    )
    rows: dict[int, dict[str, float]] = {}
    for processes, values in paces.items():
        pace = statistics.median(values)
        rows[processes] = {"tokens_per_s": pace, "efficiency": pace / processes / one}
        efficiency = f"{rows[processes]['efficiency']:.0%}"
        table.add_row(str(processes), f"{pace:,.0f}", f"{pace / processes:,.0f}", efficiency)
    Console().print(table)
    common.write_json("scaling", {"per_process": options.per_process, "rows": rows})


if __name__ == "__main__":
    main()
