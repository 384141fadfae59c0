"""The same text, machine and minutes for the training programs of others and for ours: losses.

Run:    python bench/peers.py                                   two minutes, the Trainer of transformers
        python bench/peers.py --nanogpt ../nanoGPT --minutes 1  a checkout of nanoGPT too
        python bench/peers.py --text my.txt
The text, by characters, is Tiny Shakespeare unless one is given. Ours is what our README says first,
`--minutes`. nanoGPT has the configuration that its README gives for a laptop (4 layers of 128, context 64,
batch 12, AdamW), the Trainer transformers' GPT-2 of the same size, with the same rate, schedule and batch.
Neither knows of minutes: two short runs say how many updates fit, and their cosine ends with the last of
them. All are timed as whole processes, one after the other, data preparation apart. Then one program, ours,
computes all losses: nats a character over the whole validation split, each model with its own context.
Writes bench/peers.json. Let nothing else run. Needs `accelerate`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import common
import torch
from rich.console import Console
from rich.table import Table

from nanogpt.checkpoint.format import load_checkpoint
from nanogpt.data.dataset import Dataset, load_dataset
from nanogpt.initialize.registry import open_source
from nanogpt.model.gpt import GPT
from nanogpt.scoring import score

ROOT = Path(__file__).resolve().parent.parent
LAYERS, HEADS, WIDTH, CONTEXT, BATCH, RATE, WARM_UP = 4, 4, 128, 64, 12, 1e-3, 100
"""nanoGPT's configuration for a laptop."""

SHORT, LONG = 20, 120
"""Updates of the two runs that say how long one takes, and how long everything else."""


def ours(minutes: float, data: Path, out: Path) -> float:
    """Train with --minutes. Returns its seconds."""
    words = ["train.py", "--minutes", f"{minutes:g}", "--data_dir", str(data), "--out_dir", str(out)]
    return run([sys.executable, *words], ROOT)


def nanogpt(checkout: Path, updates: int, out: Path) -> float:
    """Train nanoGPT for so many updates. Returns its seconds."""
    settings = {
        "device": "cpu", "compile": False, "dtype": "float32", "dropout": 0.0, "out_dir": out,
        "n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": CONTEXT, "batch_size": BATCH,
        "max_iters": updates, "lr_decay_iters": updates, "warmup_iters": min(WARM_UP, updates // 2),
        "eval_interval": updates, "eval_iters": 20, "always_save_checkpoint": True,
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return run([sys.executable, "train.py", "config/train_shakespeare_char.py", *flags], checkout)


def trainer(data: Path, updates: int, out: Path) -> float:
    """Train transformers' GPT-2 with its Trainer for so many updates. Returns the seconds."""
    return run([sys.executable, __file__, "--trainer", str(data), str(updates), str(out)], ROOT)


def run(words: list[str], folder: Path) -> float:
    """Run a program in a folder. Returns its seconds."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    start = time.perf_counter()
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - start


def train_with_transformers(data: Path, updates: int, out: Path) -> None:
    """What `trainer` runs."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    dataset = load_dataset(data)
    tokens = torch.as_tensor(dataset.train[:]).long()
    windows = [{"input_ids": window, "labels": window} for window in tokens.split(CONTEXT)[:-1]]
    config = GPT2Config(
        vocab_size=dataset.tokenizer.vocab_size, n_positions=CONTEXT,
        n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=updates, per_device_train_batch_size=BATCH,
        learning_rate=RATE, lr_scheduler_type="cosine", warmup_steps=min(WARM_UP, updates // 2),
        weight_decay=0.1, adam_beta2=0.99, seed=1, use_cpu=True,
        logging_steps=100, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    Trainer(model=model, args=arguments, train_dataset=windows).train()
    model.save_pretrained(out)


def in_time(minutes: float, train: Callable[[int, Path], float], out: Path) -> tuple[float, int]:
    """Train for as many updates as fit. Returns the seconds and the updates."""
    short, long = (train(updates, out.with_name(f"{out.name}-{updates}")) for updates in (SHORT, LONG))
    update = (long - short) / (LONG - SHORT)
    updates = int((60 * minutes - (short - SHORT * update)) / update)
    return train(updates, out), updates


def prepare_nanogpt(checkout: Path, text: Path, folder: Path) -> Path:
    """A copy of a checkout, with its data made from a text."""
    copy = folder / "checkout"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git"))
    shutil.copy(text, copy / "data" / "shakespeare_char" / "input.txt")
    run([sys.executable, "data/shakespeare_char/prepare.py"], copy)
    return copy


def loss_of(path: Path, dataset: Dataset) -> float:
    """The loss of any program's model over the whole validation split, in nats a character."""
    source = open_source(str(path))
    weights = source.weights()
    if source.config.tied:
        weights["head.weight"] = weights["token_embedding.weight"]
    model = GPT(source.config).eval()
    model.load_state_dict(weights)
    return float(score(model, dataset.val).mean())


def compare(
    minutes: float, text: Path | None, checkout: Path | None, folder: Path
) -> dict[str, dict[str, float]]:
    """Train with all programs in a folder. Returns loss, seconds and updates of each."""
    data = folder / "data"
    run(
        [sys.executable, "data.py", "--data_dir", str(data), *(["--input_file", str(text)] if text else [])],
        ROOT,
    )
    dataset, rows = load_dataset(data), {}

    def add(program: str, path: Path, seconds: float, updates: int) -> None:
        """Score a model."""
        rows[program] = {"loss": loss_of(path, dataset), "seconds": round(seconds, 1), "updates": updates}
        print(program, rows[program], flush=True)

    last = folder / "ours" / "last.pt"
    seconds = ours(minutes, data, last.parent)
    add("nanogpt train --minutes", last, seconds, load_checkpoint(last).progress["step"])
    out = folder / "trainer"
    add("Trainer of transformers", out, *in_time(minutes, partial(trainer, data), out))
    if checkout is not None:
        copy, out = prepare_nanogpt(checkout, text or data / "input.txt", folder), folder / "theirs"
        seconds, updates = in_time(minutes, partial(nanogpt, copy), out)
        shutil.copy(copy / "data" / "shakespeare_char" / "meta.pkl", out)  # says which tokens are which
        add("nanoGPT", out / "ckpt.pt", seconds, updates)
    return rows


def main() -> None:
    """Train all, score all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--text", type=Path, help="UTF-8; Tiny Shakespeare unless given")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--trainer", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trainer:
        data, updates, out = options.trainer
        train_with_transformers(Path(data), int(updates), Path(out))
        return
    with TemporaryDirectory() as folder:
        rows = compare(options.minutes, options.text, options.nanogpt, Path(folder))
    table = Table("program", "loss", "seconds", "updates")
    for program, row in rows.items():
        table.add_row(program, f"{row['loss']:.4f}", f"{row['seconds']:.1f}", f"{row['updates']:,}")
    Console().print(table)
    common.write_json("peers", {"minutes": options.minutes, "programs": rows})


if __name__ == "__main__":
    main()
