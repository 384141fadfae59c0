"""The ladder of --minutes: whether what it chooses is better than its neighbors.

Run:    python bench/minutes.py                     hours: three corpora x 0.2, 1 and 5 minutes x 9 runs
        python bench/minutes.py --corpora python --minutes 0.2
        python bench/minutes.py --picture                  only draw what has been measured
For each corpus and time: the choice, then half and twice its width, depth, batch and rates, each for the same
time. Every run is a process of its own; its row is added to bench/minutes.jsonl as soon as it ends, and a run
that has a row is not made again. Corpora: Tiny Shakespeare by characters (data/, as `python data.py` makes
it); 10 MB of Python's sources by bytes; 100 MB of the sources of installed packages by byte-pair tokens.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common
import sources
from rich.console import Console
from rich.table import Table

from nanogpt.checkpoint.format import load_model
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.config import TrainConfig
from nanogpt.data.dataset import load_dataset
from nanogpt.scoring import score

ROOT = Path(__file__).resolve().parent.parent
ROWS = common.FOLDER / "minutes.jsonl"
PICTURE = common.FOLDER / "minutes.png"

CORPORA = {
    "shakespeare": [],
    "python": ["--tokenizer", "byte"],
    "packages": ["--tokenizer", "bpe", "--vocab_size", "4096"],
}
"""Flags of data.py for each corpus."""

SCORED_TOKENS = 1_000_000
"""Tokens of the validation split that a training is judged by."""

MEGABYTES = {"python": 10, "packages": 100}


def neighbors(chosen: TrainConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Half and twice each of the choices, by name, as settings. Everything else stays as chosen."""
    for name, factor in (
        (name, factor) for name in ("width", "depth", "batch", "rate") for factor in (0.5, 2)
    ):
        label = f"{'half' if factor < 1 else 'twice'} the {name}"
        if name == "width":
            changed: dict[str, Any] = {"n_embd": int(chosen.n_embd * factor)}
            if chosen.mlp_width:
                changed["mlp_width"] = int(chosen.mlp_width * factor)
        elif name == "depth":
            changed = {"n_layer": max(1, int(chosen.n_layer * factor))}
        elif name == "batch":
            changed = {"batch_size": max(1, int(chosen.batch_size * factor))}
        else:
            changed = {"learning_rate": chosen.learning_rate * factor, "muon_lr": chosen.muon_lr * factor}
        if all(getattr(chosen, field) == value for field, value in changed.items()):
            continue  # half of one layer
        yield label, changed


def prepare(corpus: str, folder: Path) -> Path:
    """The data folder of a corpus, prepared if it is not there."""
    data = folder / corpus
    if corpus == "shakespeare" or (data / "vocab.pt").is_file():
        return ROOT / "data" if corpus == "shakespeare" else data
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / f"{corpus}.txt"
    sources.write(text, MEGABYTES[corpus] * 1_000_000)
    call(["data.py", "--input_file", str(text), "--data_dir", str(data), *CORPORA[corpus]])
    return data


def call(words: list[str]) -> str:
    """Run a command of ours. Returns what it prints."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stderr}")
    return done.stdout


def train(
    data: Path, minutes: float, seed: int, settings: dict[str, Any]
) -> tuple[dict[str, Any], TrainConfig]:
    """Train for so many minutes. Returns loss, seconds and updates, and the settings of the run."""
    flags = [word for name, value in settings.items() for word in flag(name, value)]
    with TemporaryDirectory() as out:
        common_flags = [
            "--data_dir",
            str(data),
            "--out_dir",
            out,
            "--minutes",
            str(minutes),
            "--seed",
            str(seed),
        ]
        start = time.perf_counter()
        call(["train.py", *common_flags, *flags])
        seconds = time.perf_counter() - start
        config = RunFolder(Path(out)).saved_config()
        # Always the same tokens: in a short training an evaluation sees a part that depends on the batch.
        model, _ = load_model(Path(out) / "ckpt.pt")
        loss = float(score(model, load_dataset(data).val[:SCORED_TOKENS]).mean())
    assert config is not None
    return {"loss": loss, "seconds": round(seconds, 1), "updates": config.max_iters}, config


def flag(name: str, value: Any) -> list[str]:
    """A setting as a flag."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


CHOSEN = (
    "n_layer", "n_head", "n_embd", "mlp_width", "block_size", "batch_size", "dropout", "weight_decay",
    "ema_decay", "ngram_vocab", "learning_rate", "muon_lr", "cooldown", "warmup_iters", "beta1", "beta2",
)  # fmt: skip
"""Settings that the neighbors keep, but for the one that they change."""


def measure(corpus: str, minutes: float, seed: int, folder: Path) -> None:
    """Measure the choice and its neighbors, as far as they have no row yet."""
    done = {(row["corpus"], row["minutes"], row["seed"], row["what"]): row for row in read_rows()}
    data = prepare(corpus, folder)
    key = (corpus, minutes, seed)
    choice = (*key, "choice")
    if choice not in done:
        found, config = train(data, minutes, seed, {})
        shape = {name: getattr(config, name) for name in CHOSEN}
        write_row(*key, "choice", found | {"settings": shape})
        done[choice] = {"settings": shape}
    chosen = replace(TrainConfig(), **done[choice]["settings"])
    kept = {name: value for name in CHOSEN if (value := getattr(chosen, name)) is not None}
    for what, changed in neighbors(chosen):
        if (*key, what) not in done:
            found, _ = train(data, minutes, seed, kept | changed)
            write_row(*key, what, found)


def read_rows() -> list[dict[str, Any]]:
    """The rows so far."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.is_file() else []


def write_row(corpus: str, minutes: float, seed: int, what: str, found: dict[str, Any]) -> None:
    """Add a row."""
    row = {"corpus": corpus, "minutes": minutes, "seed": seed, "what": what, **found}
    with open(ROWS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{corpus}, {minutes:g} min, {what}: {found['loss']}, {found['seconds']} s", flush=True)


def show() -> None:
    """Print a table, losses over that of the choice, and draw loss against minutes."""
    rows = [row for row in read_rows() if row["loss"] is not None]
    groups = sorted({(row["corpus"], row["minutes"]) for row in rows})
    table = Table(
        "corpus", "minutes", "seconds", "choice", "loss", "best neighbor", "its loss", "choice / best"
    )
    for corpus, minutes in groups:
        own = [row for row in rows if (row["corpus"], row["minutes"]) == (corpus, minutes)]
        choice = next((row for row in own if row["what"] == "choice"), None)
        others = [row for row in own if row["what"] != "choice"]
        if choice is None:
            continue
        best = min(others, key=lambda row: row["loss"], default=choice)
        s = choice["settings"]
        shape = f"{s['n_layer']} x {s['n_embd']}, {s['batch_size']} x {s['block_size']}"
        ratio = choice["loss"] / min(best["loss"], choice["loss"])
        table.add_row(
            corpus, f"{minutes:g}", f"{choice['seconds']}", shape, f"{choice['loss']:.4f}", best["what"],
            f"{best['loss']:.4f}", f"{ratio:.3f}",
        )  # fmt: skip
    Console().print(table)
    draw(rows)


def draw(rows: list[dict[str, Any]]) -> None:
    """Loss against minutes: a panel for each corpus, its choices as a line, their neighbors as points."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    corpora = [name for name in CORPORA if any(row["corpus"] == name for row in rows)]
    figure, axes = plt.subplots(1, len(corpora), figsize=(4.5 * len(corpora), 3.6), squeeze=False)
    for axis, corpus in zip(axes[0], corpora, strict=True):
        own = [row for row in rows if row["corpus"] == corpus]
        others = [row for row in own if row["what"] != "choice"]
        axis.plot(
            [row["minutes"] for row in others], [row["loss"] for row in others], "_", color="gray",
            label="half or twice a choice",
        )  # fmt: skip
        choices = sorted((row["minutes"], row["loss"]) for row in own if row["what"] == "choice")
        axis.plot(*zip(*choices, strict=True), "o-", color="tab:blue", label="--minutes")
        axis.set(xscale="log", xlabel="minutes", ylabel="validation loss, nats per token", title=corpus)
        axis.set_xticks([minutes for minutes, _ in choices], [f"{minutes:g}" for minutes, _ in choices])
        axis.minorticks_off()
        axis.legend()
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=120)
    print(PICTURE)


def main() -> None:
    """Measure what is missing, and show all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=list(CORPORA))
    parser.add_argument("--minutes", nargs="+", type=float, default=[0.2, 1.0, 5.0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=common.FOLDER / "corpora", help="for texts and data")
    parser.add_argument("--picture", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.picture:
        for minutes in options.minutes:
            for corpus in options.corpora:
                measure(corpus, minutes, options.seed, options.folder)
    show()


if __name__ == "__main__":
    main()
