"""How long each command takes as a whole process, from the shell and back.

Run:    python bench/start.py
        python bench/start.py --against ../other_checkout --rounds 3
Each command in turn, in every round, beside `python -c "import torch"`; medians. --against: the same commands
of another checkout of the project, each right after ours. The text is Tiny Shakespeare if data/input.txt is
there, else as many bytes of this machine's Python sources; nothing is downloaded. Prints a table, writes
bench/start.json.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import sources
from rich.console import Console
from rich.table import Table

OURS = Path(__file__).resolve().parent.parent

SHAKESPEARE_BYTES = 1_115_394

SPEEDRUN = ["--preset", "speedrun", "--data_dir", "{work}/data"]

COMMANDS: dict[str, list[str]] = {
    'python -c "import torch"': ["-c", "import torch"],
    "train.py --help": ["train.py", "--help"],
    "data.py --help": ["data.py", "--help"],
    "data.py": ["data.py", "--input_file", "{work}/text.txt", "--data_dir", "{work}/new"],
    "train.py --preset speedrun": ["train.py", *SPEEDRUN, "--out_dir", "{work}/out"],
    "sample.py --num_tokens 10": ["sample.py", "--checkpoint", "{work}/out/ckpt.pt", "--num_tokens", "10"],
    "model.py": ["model.py"],
    "nanogpt plan": ["-m", "nanogpt", "plan", *SPEEDRUN],
}


def run(checkout: Path, arguments: list[str], work: Path) -> float:
    """Seconds of a command of a checkout, as a process in the folder of the checkout."""
    shutil.rmtree(work / "new", ignore_errors=True)
    if arguments[0] == "train.py":
        shutil.rmtree(work / "out", ignore_errors=True)
    command = [sys.executable, *(word.format(work=work) for word in arguments)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return seconds


def prepare(work: Path) -> None:
    """Put the text, and a data folder made from it, into the folder of all commands."""
    text = OURS / "data" / "input.txt"
    if text.exists():
        shutil.copy(text, work / "text.txt")
    else:
        sources.write(work / "text.txt", SHAKESPEARE_BYTES)
    run(OURS, COMMANDS["data.py"], work)
    (work / "new").rename(work / "data")


def main() -> None:
    """Time all commands in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, default=None)
    options = parser.parse_args()
    checkouts = {"here": OURS, **({"there": options.against.resolve()} if options.against else {})}
    times: dict[str, dict[str, list[float]]] = {name: {who: [] for who in checkouts} for name in COMMANDS}
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        prepare(work)
        for _ in range(options.rounds):
            for name, arguments in COMMANDS.items():
                for who, checkout in checkouts.items():
                    times[name][who].append(run(checkout, arguments, work))
    report(times, list(checkouts))


def report(times: dict[str, dict[str, list[float]]], checkouts: list[str]) -> None:
    """Print the medians and write them as JSON."""
    medians = {name: {who: statistics.median(times[name][who]) for who in checkouts} for name in times}
    compared = len(checkouts) > 1
    table = Table("command", *(f"seconds, {who}" for who in checkouts), *(["ratio"] if compared else []))
    for name, row in medians.items():
        ratio = [f"{row['here'] / row['there']:.2f}"] if compared else []
        table.add_row(name, *(f"{row[who]:.2f}" for who in checkouts), *ratio)
    Console().print(table)
    common.write_json("start", medians)


if __name__ == "__main__":
    main()
