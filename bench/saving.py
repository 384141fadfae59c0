"""What a checkpoint costs a training: the step that waits for it, and those beside which it is written.

Run:    python data.py && python bench/saving.py --n_layer 12 --n_embd 768
Two processes (on GPUs: with one each). ddp: the first one writes an ordinary file and the others wait. fsdp:
each copies its tensors, goes on, and writes its part in the background. A step of every kind, medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch
from rich.console import Console
from rich.table import Table

from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.config import TrainConfig
from nanogpt.distributed.world import distributed_world
from nanogpt.training.results import read_result
from nanogpt.training.setup import set_up
from nanogpt.training.trainer import train_step


def measure(options: argparse.Namespace) -> None:
    """Train and save in turn, as one of the processes; the first one prints seconds."""
    torch.set_num_threads(1)
    config = TrainConfig(
        data_dir=options.data_dir, out_dir=options.out_dir, n_layer=options.n_layer, n_embd=options.n_embd,
        n_head=options.n_embd // 64, block_size=128, batch_size=4, dropout=0.0, parallel=options.kind,
        dtype="float32",
    )  # fmt: skip
    found: dict[str, list[float]] = {"plain": [], "waiting": [], "beside": [], "until_there": []}

    def step() -> float:
        """Seconds of an update, on the process that takes longest."""
        start = time.perf_counter()
        read_result(run, train_step(run))
        return max(world.all_gather([time.perf_counter() - start]))

    with distributed_world() as world:
        run = set_up(config, RunFolder(Path(options.out_dir)), world)
        step()
        run.checkpointer.begin_save(run, run.folder.last)
        run.checkpointer.finish_save()
        for _ in range(options.rounds):
            found["plain"] += [step() for _ in range(3)]
            start = time.perf_counter()
            run.checkpointer.begin_save(run, run.folder.last)
            found["waiting"].append(max(world.all_gather([time.perf_counter() - start])))
            while world.max_over_ranks(int(run.checkpointer.is_writing))[0]:
                found["beside"].append(step())
            run.checkpointer.finish_save()
            found["until_there"].append(time.perf_counter() - start)
        run.metrics.close()
        if world.is_first:
            size = sum(path.stat().st_size for path in Path(options.out_dir).rglob("*") if path.is_file())
            medians = {name: statistics.median(times) if times else None for name, times in found.items()}
            print(json.dumps(medians | {"mib": size / 2**20}))


def main() -> None:
    """Measure both kinds and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in {"n_layer": 12, "n_embd": 768, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--out_dir", default="", help="where to write; by default a temporary folder")
    parser.add_argument("--kind", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        measure(options)
        return
    title = f"Two processes, {options.n_layer} layers of {options.n_embd}"
    columns = (
        "checkpoint, MiB",
        "a step, s",
        "a save holds up, s",
        "a step beside it, s",
        "until it is there, s",
    )
    table = Table("", *columns, title=title)
    rows: dict[str, dict[str, float | None]] = {}
    for kind in ("ddp", "fsdp"):
        with tempfile.TemporaryDirectory(dir=options.out_dir or None) as place:
            words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            words += [__file__, *sys.argv[1:], "--kind", kind, "--out_dir", place]
            done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ)
        if done.returncode:
            sys.exit(done.stderr)
        row = rows[kind] = json.loads(done.stdout.splitlines()[-1])
        keys = ("plain", "waiting", "beside", "until_there")
        seconds = ["" if row[key] is None else f"{row[key]:.2f}" for key in keys]
        table.add_row(kind, f"{row['mib']:,.0f}", *seconds)
    Console(width=110).print(table)
    common.write_json("saving", {"shape": title, "kinds": rows})


if __name__ == "__main__":
    main()
