"""How fast a text becomes token files, and in how much memory.

Run:    python bench/prepare.py --megabytes 500 --rounds 3
        python bench/prepare.py --megabytes 2000 --rounds 1 --no_plain --kill
Times `nanogpt data` as a whole process (start, reading, vocabulary, encoding, writing, syncing) with each
tokenizer, and beside it the plain way for characters: sorted(set(text)) and a dictionary look-up for every
character, as a whole process with the same imports. --kill: each preparation once more, killed three times
on its way, which must end in the same bytes. --folder says where the corpus and the token files lie (a
folder in memory, as /dev/shm, leaves the disk out). Prints a table of medians, writes bench/prepare.json.
The text is this machine's Python sources, as often as needed.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import common
import sources
from rich.console import Console
from rich.table import Table

PLAIN = """
import sys, numpy as np, torch
text = open(sys.argv[1], encoding="utf-8", newline="").read().replace("\\r\\n", "\\n")
ids = {char: i for i, char in enumerate(sorted(set(text)))}
tokens = np.array([ids[char] for char in text], dtype=np.uint16)
split = int(0.9 * len(tokens))
torch.save(torch.from_numpy(tokens[:split]), sys.argv[2] + "/train.pt")
torch.save(torch.from_numpy(tokens[split:]), sys.argv[2] + "/val.pt")
"""

WAYS = {"char": ["char"], "byte": ["byte"], "bpe": ["bpe", "--vocab_size", "4096"]}

KILLS = 3


def command(path: Path, way: str, folder: Path) -> list[str]:
    """What prepares the corpus at `path`."""
    words = [sys.executable, "-m", "nanogpt", "data", "--input_file", str(path)]
    return [*words, "--data_dir", str(folder), "--tokenizer", *WAYS[way]]


def measure(words: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MiB of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # it is reaped: Popen need not wait again
    if process.returncode:
        sys.exit(f"failed: {' '.join(words)}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def kill_and_compare(path: Path, way: str, whole: Path, seconds: float) -> None:
    """Prepare again, killed KILLS times at random moments, and compare the files with those in `whole`."""
    folder, kills = whole.with_name(f"{whole.name}-killed"), 0
    moments = random.Random(way)
    for _ in range(KILLS):
        process = subprocess.Popen(command(path, way, folder), stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=moments.uniform(0.3, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
    measure(command(path, way, folder))
    for name in ("train.pt", "val.pt", "vocab.pt"):
        if any(a != b for a, b in zip(blocks(whole / name), blocks(folder / name), strict=True)):
            sys.exit(f"{way}: {name} differs after {kills} kills")
    Console().print(f"{way}: killed {kills} times and taken up again: the same bytes in all three files")


def blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, a few MiB at a time."""
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            yield block


def main() -> None:
    """Measure all ways in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--folder", default=None)
    parser.add_argument("--no_plain", action="store_true")
    parser.add_argument("--kill", action="store_true")
    options = parser.parse_args()
    results: dict[str, list[tuple[float, float]]] = {way: [] for way in options.ways}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        path = Path(place) / "text.txt"
        sources.write(path, options.megabytes * 10**6)
        for number in range(options.rounds):
            for way in options.ways:
                results[way].append(measure(command(path, way, Path(place, f"{way}-{number}"))))
            if not options.no_plain:
                (Path(place) / "plain").mkdir(exist_ok=True)
                words = [sys.executable, "-c", PLAIN, str(path), f"{place}/plain"]
                results.setdefault("dictionary loop", []).append(measure(words))
        if options.kill:
            for way in options.ways:
                kill_and_compare(path, way, Path(place, f"{way}-0"), results[way][0][0])
    report(results, options.megabytes)


def report(results: dict[str, list[tuple[float, float]]], megabytes: int) -> None:
    """Print the medians and write them as JSON."""
    table = Table("way", "seconds", "MB/s", "peak MiB", title=f"{megabytes} MB of text to token files")
    rows: dict[str, dict[str, float]] = {}
    for way, runs in results.items():
        seconds, memory = (statistics.median(column) for column in zip(*runs, strict=True))
        rows[way] = {"seconds": seconds, "mb_per_s": megabytes / seconds, "peak_mib": memory}
        table.add_row(way, f"{seconds:.2f}", f"{megabytes / seconds:.1f}", f"{memory:.0f}")
    Console().print(table)
    common.write_json("prepare", {"megabytes": megabytes, "results": rows})


if __name__ == "__main__":
    main()
