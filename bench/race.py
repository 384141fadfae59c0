"""Seconds of training to a loss: our presets against nanoGPT's recipe in a plain loop.

Run:    python bench/race.py                              presets speedrun and classic, 3 seeds each
        python bench/race.py --presets cpu --seeds 1 --target 1.6
The plain recipe: transformers' GPT-2, 4 layers of 128, context 64, batch 12, float32, AdamW 1e-3
with warm-up and cosine over 2,000 updates, evaluated every 100. Each run of a preset is a process of its own,
one after the other. Losses are nats a character over the whole validation split; seconds are those
of the updates. Writes bench/race.json. Needs `python data.py` first.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import common
import torch
from rich.console import Console
from rich.table import Table
from step import SMALL, their_model, their_update
from transformers import GPT2LMHeadModel

from nanogpt.config import TrainConfig
from nanogpt.data.batches import BatchLoader, evaluation_batches
from nanogpt.data.dataset import Dataset, load_dataset
from nanogpt.training.optimizer import learning_rate

PLAIN = TrainConfig(learning_rate=1e-3, max_iters=2000, warmup_iters=100, block_size=64, batch_size=12)


def plain_run(seed: int, folder: Path) -> list[dict[str, float]]:
    """Train the plain recipe. Returns a row for each evaluation: elapsed_s, val_loss."""
    torch.manual_seed(seed)
    dataset = load_dataset(folder)
    model = their_model(replace(SMALL, vocab_size=dataset.tokenizer.vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    random, rows, elapsed = torch.Generator().manual_seed(seed), [], 0.0
    for step in range(PLAIN.max_iters):
        start = time.perf_counter()
        starts = torch.randint(len(dataset.train) - PLAIN.block_size, (PLAIN.batch_size,), generator=random)
        x, y = BatchLoader(dataset.train, torch.device("cpu"))(starts.numpy(), PLAIN.block_size)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, PLAIN)
        their_update(model, optimizer, x, y)
        elapsed += time.perf_counter() - start
        if (step + 1) % 100 == 0:
            rows.append({"elapsed_s": elapsed, "val_loss": plain_loss(model, dataset)})
    return rows


@torch.inference_mode()
def plain_loss(model: GPT2LMHeadModel, dataset: Dataset) -> float:
    """Mean loss over the validation split."""
    total = 0.0
    batches = evaluation_batches(dataset.val, block_size=PLAIN.block_size, batch_size=64)
    for starts, length in batches:
        x, y = BatchLoader(dataset.val, torch.device("cpu"))(starts, length)
        logits = model(x).logits
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / (len(dataset.val) - 1)


def preset_run(preset: str, seed: int, folder: Path) -> list[dict[str, float]]:
    """Train a preset. Returns a row for each evaluation."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "nanogpt", "train", "--preset", preset, "--seed", str(seed)]
        command += ["--data_dir", str(folder), "--out_dir", out]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(out) / "metrics.jsonl").read_text("utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "val_loss" in row]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--presets", nargs="*", default=["speedrun", "classic"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--target", type=float, default=1.88)
    parser.add_argument("--data_dir", type=Path, default=common.FOLDER.parent / "data")
    parser.add_argument("--no_plain", action="store_true", help="leave the plain recipe out")
    options = parser.parse_args()
    runs = {} if options.no_plain else {"plain recipe": [plain_run(options.seeds[0], options.data_dir)]}
    for preset in options.presets:
        runs[preset] = [preset_run(preset, seed, options.data_dir) for seed in options.seeds]

    table = Table("recipe", "runs", "loss at the end", "seconds in all", f"seconds to {options.target}")
    results = {}
    for name, histories in runs.items():
        losses = [rows[-1]["val_loss"] for rows in histories]
        totals = [rows[-1]["elapsed_s"] for rows in histories]
        reached = [
            next((row["elapsed_s"] for row in rows if row["val_loss"] <= options.target), None)
            for rows in histories
        ]
        results[name] = {"losses": losses, "seconds": totals, "seconds_to_target": reached}
        times = [moment for moment in reached if moment is not None]
        to_target = f"{median(times):.2f} ({len(times)} of {len(reached)})" if times else "not reached"
        shown = ", ".join(f"{loss:.4f}" for loss in losses)
        table.add_row(name, str(len(histories)), shown, f"{median(totals):.2f}", to_target)
    Console().print(table)
    common.write_json("race", {"target": options.target, "runs": results})


if __name__ == "__main__":
    main()
