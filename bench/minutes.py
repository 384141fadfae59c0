"""The ladder of --minutes: whether what it chooses is better than its neighbors.

Run:    python bench/minutes.py --plan              minutes, on a machine that does nothing else
        python bench/minutes.py                     hours: three corpora x 0.2, 1 and 5 minutes x 9 trainings
        python bench/minutes.py --corpora python --minutes 20 --trainings choice "twice the depth"
        python bench/minutes.py --picture           only draw what has been measured
For each corpus and time: the choice, then half and twice its width, depth, batch and rates. First their
updates are timed, in turn, which gives each the number of updates that it makes in the time; then each is
trained for so many, whatever else the machine does meanwhile. Every training is a process of its own; its row
is added to bench/minutes.jsonl as soon as it ends, and one that has a row is not made again. So the trainings
of a plan can also be made elsewhere, and several at a time (--jobs): on a GPU, say, in a tenth of the time.
Corpora: Tiny Shakespeare by characters (data/, as `python data.py` makes it); 10 MB of Python's sources by
bytes; 100 MB of the sources of installed packages by byte-pair tokens.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
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
from nanogpt.training.autosize import Text, changed_settings, choose_settings, training_seconds
from nanogpt.training.setup import set_up
from nanogpt.training.trainer import train_step

ROOT = Path(__file__).resolve().parent.parent
ROWS, PLANS = common.FOLDER / "minutes.jsonl", common.FOLDER / "minutes-plans.jsonl"
PICTURE = common.FOLDER / "minutes.png"

CORPORA = {
    "shakespeare": [],
    "python": ["--tokenizer", "byte"],
    "packages": ["--tokenizer", "bpe", "--vocab_size", "4096"],
}
"""Flags of data.py for each corpus."""

SCORED_TOKENS = 1_000_000
"""Tokens of the validation split that a training is judged by."""

ROUNDS, UPDATES = 3, 4
"""Times that each training has its turn, and updates of a turn. The first of them finds the caches cold."""

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


def plan(data: Path, minutes: float) -> dict[str, Any]:
    """The choice for so many minutes, and how many updates it and its neighbors make in that time.

    They are timed in turn, in a process of their own: the machine must have nothing else to do.
    """
    return json.loads(call([__file__, "--plan_of", str(data), "--minutes", str(minutes)]).splitlines()[-1])


def print_plan(data: Path, minutes: float) -> None:
    """Print what `plan` returns."""
    with redirect_stdout(sys.stderr), TemporaryDirectory() as folder:
        config = TrainConfig(minutes=minutes, data_dir=str(data), out_dir=folder)
        config = choose_settings(config, Text.of(load_dataset(data)), common.CPU)
        settings = {name: getattr(config, name) for name in sorted(changed_settings(config) - NOT_KEPT)}
        trainings = {"choice": settings} | {
            what: settings | changed for what, changed in neighbors(replace(config, **settings))
        }
        actions: dict[str, Callable[[], object]] = {}
        for number, (what, changed) in enumerate(trainings.items()):
            if what.endswith("rate"):
                continue  # which takes the time of the choice
            folder_of_its_own = Path(folder) / str(number)
            own = replace(TrainConfig(), data_dir=str(data), out_dir=str(folder_of_its_own), **changed)
            folder_of_its_own.mkdir()
            actions[what] = partial(train_step, set_up(own, RunFolder(folder_of_its_own)))
        paces: dict[str, list[float]] = {what: [] for what in actions}
        for _ in range(ROUNDS):
            for what, action in actions.items():
                paces[what] += [common.seconds(action) for _ in range(UPDATES)][1:]
    seconds = training_seconds(minutes)
    updates = {what: max(2, round(seconds / median(pace))) for what, pace in paces.items()}
    print(json.dumps({what: (trainings[what], updates.get(what, updates["choice"])) for what in trainings}))


def train(data: Path, seed: int, settings: dict[str, Any], updates: int) -> dict[str, Any]:
    """Train for so many updates, the last of them with a falling rate. Returns loss, seconds and updates."""
    flags = [word for name, value in settings.items() for word in flag(name, value)]
    first = updates - round(settings["cooldown"] * updates)
    with TemporaryDirectory() as out:
        flags += ["--data_dir", str(data), "--out_dir", out, "--seed", str(seed)]
        flags += ["--max_iters", str(updates), "--eval_interval", str(updates), "--eval_iters", "1"]
        start = time.perf_counter()
        call(["train.py", *flags, "--schedule", "constant", "--decays", f"{first}:{updates}"])
        seconds = time.perf_counter() - start
        # Always the same tokens: in a short training an evaluation sees a part that depends on the batch.
        model, _ = load_model(Path(out) / "ckpt.pt")
        loss = float(score(model, load_dataset(data).val[:SCORED_TOKENS]).mean())
    return {"loss": loss, "seconds": round(seconds, 1), "updates": updates}


def flag(name: str, value: Any) -> list[str]:
    """A setting as a flag."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


NOT_KEPT = {
    "minutes", "data_dir", "out_dir", "max_iters", "schedule", "decays", "eval_interval", "eval_iters",
}  # fmt: skip
"""Settings of a choice that its trainings do not take over: where they are, when they end."""


def missing(corpus: str, minutes: float, options: argparse.Namespace) -> Iterator[Callable[[], None]]:
    """Plan the choice and its neighbors. Yields those trainings that have no row yet; each adds its own."""
    data = prepare(corpus, options.folder)
    plans, seed = planned(corpus, minutes, data), options.seed
    for what, (settings, updates) in plans.items():
        if options.plan or (options.trainings and what not in options.trainings):
            continue
        key = {"corpus": corpus, "minutes": minutes, "seed": seed, "what": what}
        if not any(key.items() <= row.items() for row in read_rows(ROWS)):
            yield partial(measure, key, data, seed, settings, updates)


def measure(key: dict[str, Any], data: Path, seed: int, settings: dict[str, Any], updates: int) -> None:
    """Train, and add a row."""
    add_row(ROWS, key | train(data, seed, settings, updates) | {"settings": settings})


def planned(corpus: str, minutes: float, data: Path) -> dict[str, tuple[dict[str, Any], int]]:
    """Settings and number of updates of the choice and its neighbors, measured once."""
    key = {"corpus": corpus, "minutes": minutes}
    for row in read_rows(PLANS):
        if key.items() <= row.items():
            return row["plan"]
    add_row(PLANS, key | {"plan": (found := plan(data, minutes))})
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print({name: value for name, value in row.items() if name not in {"plan", "settings"}}, flush=True)


def show() -> None:
    """Print a table, losses over that of the choice, and draw loss against minutes."""
    rows = [row for row in read_rows(ROWS) if row["loss"] is not None]
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
        config = replace(TrainConfig(), **choice["settings"])
        shape = f"{config.n_layer} x {config.n_embd}, {config.batch_size} x {config.block_size}"
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
            label="other settings, the same time",
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
    parser.add_argument("--plan", action="store_true", help="time updates, train nothing")
    parser.add_argument("--trainings", nargs="+", help='only these, such as choice "twice the depth"')
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--plan_of", type=Path, help="print the plan of a data folder")
    parser.add_argument("--picture", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if options.plan_of:
        print_plan(options.plan_of, options.minutes[0])
        return
    if not options.picture:
        trainings = [  # all plans first: they are timed
            training
            for minutes in options.minutes
            for corpus in options.corpora
            for training in missing(corpus, minutes, options)
        ]
        with ThreadPoolExecutor(options.jobs) as pool:
            for done in [pool.submit(training) for training in trainings]:
                done.result()
    if read_rows(ROWS):
        show()


if __name__ == "__main__":
    main()
