"""What a checkpoint costs a training: the wait for it, and the slower steps beside which it is written.

Run:    python data.py && python bench/saving.py --n_layer 12 --n_embd 768
now: written while the training waits, as where memory has no room for a copy. thread: a copy is written by a
thread. Both in one process, in turn. ddp and fsdp: two processes (on GPUs with one each); with fsdp each
writes its part. best: a best evaluation, after which ckpt.pt and last.pt are one file. twice: both written
while the training waits. Medians; "costs" is all that the training loses, slower steps included.
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
from typing import Any

import common
import torch
from rich.console import Console
from rich.table import Table

from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.config import TrainConfig
from nanogpt.distributed.world import distributed_world
from nanogpt.machine.device import kind_of
from nanogpt.training import snapshot
from nanogpt.training.results import read_result
from nanogpt.training.run import Run
from nanogpt.training.setup import set_up
from nanogpt.training.trainer import train_step

KINDS = {"now": 1, "thread": 1, "ddp": 2, "fsdp": 2}
"""Ways of saving -> the number of processes."""


def step(run: Run) -> float:
    """Seconds of an update, on the process that takes longest."""
    start = time.perf_counter()
    read_result(run, train_step(run))
    kind_of(run.device).synchronize(run.device)
    return max(run.world.all_gather([time.perf_counter() - start]))


def save(run: Run, *, best: bool, twice: bool = False) -> dict[str, float]:
    """Save once, and train until it is there. Returns seconds."""
    plain = statistics.median(step(run) for _ in range(3))
    start = time.perf_counter()
    if twice:
        for path in (run.folder.best, run.folder.last):
            run.checkpointer.begin_file(run, path).result()
    else:
        run.checkpointer.begin_save(run, best=best)
    held_up = max(run.world.all_gather([time.perf_counter() - start]))
    beside: list[float] = []
    while run.world.max_over_ranks(int(run.checkpointer.is_writing))[0]:
        beside.append(step(run))
    run.checkpointer.finish_save()
    there = time.perf_counter() - start
    return {
        "plain": plain, "held up": held_up, "until it is there": there,
        "costs": there - plain * len(beside), **({"beside": statistics.mean(beside)} if beside else {}),
    }  # fmt: skip


def measure(options: argparse.Namespace) -> None:
    """Train and save in turn, as one of the processes; the first one prints medians."""
    if KINDS[options.kind] > 1:
        torch.set_num_threads(1)
    config = TrainConfig(
        data_dir=options.data_dir, out_dir=options.out_dir, n_layer=options.n_layer, n_embd=options.n_embd,
        n_head=options.n_embd // 64, block_size=128, batch_size=4, dropout=0.0,
        parallel="fsdp" if options.kind == "fsdp" else "ddp", dtype="float32",
    )  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {}
    with distributed_world() as world:
        run = set_up(config, RunFolder(Path(options.out_dir)), world)
        step(run)
        run.checkpointer.save(run)
        ways = ("now", "thread") if KINDS[options.kind] == 1 else (options.kind,)
        for _ in range(options.rounds):
            for way in ways:
                if len(ways) > 1:
                    snapshot.fits_in_main_memory = (lambda _: True) if way == "thread" else (lambda _: False)
                found.setdefault(way, []).append(save(run, best=False))
                found.setdefault(f"{way}, best", []).append(save(run, best=True))
                if way == "now":
                    found.setdefault("now, best, twice", []).append(save(run, best=True, twice=True))
        run.checkpointer.close()
        run.metrics.close()
        files = [run.folder.last, *run.folder.shards.rglob("*")]
        size = sum(path.stat().st_size for path in files if path.is_file())
        if world.is_first:
            print(
                json.dumps({"mib": size / 2**20, "ways": {way: medians(rows) for way, rows in found.items()}})
            )


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """The median of each column."""
    return {key: statistics.median(row[key] for row in rows if key in row) for key in rows[0] | rows[-1]}


def main() -> None:
    """Measure all kinds and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in {"n_layer": 12, "n_embd": 768, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--out_dir", default="", help="where to write; by default a temporary folder")
    parser.add_argument(
        "--kinds", nargs="+", default=["thread", "ddp", "fsdp"], help="thread measures now too"
    )
    parser.add_argument("--kind", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        measure(options)
        return
    title = f"{options.n_layer} layers of {options.n_embd}"
    columns = {
        "plain": "a step, s", "held up": "a save holds up, s", "beside": "a step beside it, s",
        "until it is there": "until it is there, s", "costs": "a save costs, s",
    }  # fmt: skip
    table = Table("", "MiB", *columns.values(), title=title)
    rows: dict[str, Any] = {}
    for kind in options.kinds:
        with tempfile.TemporaryDirectory(dir=options.out_dir or None) as place:
            words = [sys.executable]
            if KINDS[kind] > 1:
                words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={KINDS[kind]}"]
            words += [__file__, *sys.argv[1:], "--kind", kind, "--out_dir", place]
            done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ)
        if done.returncode:
            sys.exit(done.stderr)
        result = json.loads(done.stdout.splitlines()[-1])
        for way, row in result["ways"].items():
            rows[way] = row
            cells = [f"{row[key]:.2f}" if key in row else "" for key in columns]
            table.add_row(way, f"{result['mib']:,.0f}", *cells)
    Console(width=110).print(table)
    common.write_json("saving", {"shape": title, "kinds": rows})


if __name__ == "__main__":
    main()
