"""Seconds of training on a GPU to nanoGPT's published 1.4697 on Tiny Shakespeare.

Run:    python bench/gpu/race.py --text input.txt
        python bench/gpu/race.py --preset best --seeds 1 --data_dir data
Trains presets with train.fit, as the command does (compiled; compiling is not counted), and reports
every evaluation's time and the loss at the end. The text is a file (--text, or data/input.txt, where
`python data.py` leaves it) or a folder that is prepared already (--data_dir): nothing is downloaded.
Writes gpu-race.jsonl row by row. Needs torch, numpy, rich, psutil and filelock.
"""

import argparse
import contextlib
import hashlib
import io
import json
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from rows import Results, attempt, parser_of, place_of

from nanogpt import presets
from nanogpt.config import TrainConfig
from nanogpt.data.config import PrepareConfig
from nanogpt.data.prepare import main as prepare
from nanogpt.text.tiny_shakespeare import SHAKESPEARE_SHA256
from nanogpt.training.fit import fit

INPUT = Path(__file__).parents[2] / "data" / "input.txt"


def data_folder(options: argparse.Namespace, scratch: Path) -> Path:
    """Where the tokens are: a folder that was given, or one made of the text. Without either: the end."""
    if options.data_dir:
        return options.data_dir
    text = options.text or INPUT
    if not text.is_file():
        sys.exit(f"error: {text} is not there: give --text FILE (Tiny Shakespeare) or --data_dir FOLDER")
    if hashlib.sha256(text.read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
        print(f"{text} is not Tiny Shakespeare: its losses do not compare with {options.target}")
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(PrepareConfig(input_file=(str(text),), data_dir=str(scratch)))
    return scratch


def race(config: TrainConfig, target: float) -> dict[str, Any]:
    """One training: its evaluations, and the seconds until the target is reached."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        fit(replace(config, out_dir=out))
        lines = (Path(out) / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "val_loss" in row]
    end = rows[-1]
    return {
        "steps": end["step"],
        "loss at the end": end["val_loss"],
        "best loss": min(row["val_loss"] for row in rows),
        "seconds": end["elapsed_s"],
        f"seconds to {target}": next((row["elapsed_s"] for row in rows if row["val_loss"] <= target), None),
        "with compiling, evaluating, saving": time.perf_counter() - began,
        "evaluations": rows,
    }


def main() -> None:
    """Run and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--preset", nargs="+", default=["best", "shakespeare"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--target", type=float, default=1.4697)
    parser.add_argument("--max_iters", type=int)
    parser.add_argument("--eval_interval", type=int, default=100)
    parser.add_argument("--text", type=Path, help="Tiny Shakespeare (data/input.txt)")
    parser.add_argument("--data_dir", type=Path, help="a prepared folder, in place of a text")
    options = parser.parse_args()
    place = place_of(options)
    with tempfile.TemporaryDirectory() as scratch, Results("gpu-race", options) as results:
        data = data_folder(options, Path(scratch))
        for seed in options.seeds:  # every preset once, before any is run again
            for name in options.preset:
                config = replace(
                    presets.get(name),
                    data_dir=str(data),
                    device=str(place),
                    eval_interval=options.eval_interval,
                    seed=seed,
                )
                if options.max_iters:
                    config = replace(config, max_iters=options.max_iters)
                row = {"preset": name, "seed": seed}
                results.add(row | attempt(partial(race, config, options.target)))


if __name__ == "__main__":
    main()
