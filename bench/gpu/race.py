"""Seconds of training on a GPU to nanoGPT's published 1.4697 on Tiny Shakespeare.

Run:    python data.py; python bench/gpu/race.py --seeds 1 2 3
Trains a preset with train.fit, as the command does (compiled; compiling is not counted), and reports
every evaluation's time and the loss at the end. Writes bench/gpu-race.json.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import torch
from rich.console import Console
from rich.table import Table

from nanogpt import presets
from nanogpt.train import fit


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="shakespeare")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--target", type=float, default=1.4697)
    parser.add_argument("--max_iters", type=int)
    parser.add_argument("--eval_interval", type=int, default=100)
    parser.add_argument("--data_dir", default=str(common.FOLDER.parent / "data"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu needs a CUDA GPU")
    config = presets.get(options.preset)
    config = replace(config, data_dir=options.data_dir, eval_interval=options.eval_interval)
    if options.max_iters:
        config = replace(config, max_iters=options.max_iters)
    table = Table("seed", "steps", "loss at the end", "seconds", f"seconds to {options.target}")
    results = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as out:
            fit(replace(config, seed=seed, out_dir=out))
            lines = (Path(out) / "metrics.jsonl").read_text("utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if "val_loss" in row]
        reached = next((row["elapsed_s"] for row in rows if row["val_loss"] <= options.target), None)
        results.append({"seed": seed, "evaluations": rows, "seconds_to_target": reached})
        end = rows[-1]
        shown = "not reached" if reached is None else f"{reached:.2f}"
        table.add_row(
            str(seed), f"{end['step']:,}", f"{end['val_loss']:.4f}", f"{end['elapsed_s']:.2f}", shown
        )
    Console().print(table)
    losses = [result["evaluations"][-1]["val_loss"] for result in results]
    print(f"Median loss at the end: {median(losses):.4f}")
    common.write_json("gpu-race", {"preset": options.preset, "target": options.target, "runs": results})


if __name__ == "__main__":
    main()
