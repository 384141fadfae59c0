"""The `runs` command: a table of the runs in a folder: the settings in which they differ, and their losses.

Run:    nanogpt runs sweep
"""

import csv
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nanogpt.cli.config import RunsConfig
from nanogpt.errors import require
from nanogpt.sweep.table import SEED, RunSummary, differing, draw, find_runs, groups
from nanogpt.terminal.console import say, warn
from nanogpt.units import duration


def main(config: RunsConfig) -> int:
    """Print the table of the runs in a folder. Returns the exit code.

    Raises: UserError if there is none, or the picture exists.
    """
    picture = None if config.picture is None else Path(config.picture)
    require(picture is None or not picture.exists(), f"--picture {picture} exists already: give another name")
    runs = print_table(config)
    require(
        bool(runs), f"{config.path} holds no runs: give a folder in which there are run folders (--out_dir)"
    )
    if picture is not None:
        draw(runs, picture)
        (warn if config.json or config.csv else say)(f"Picture: {picture}")
    return 0


def print_table(config: RunsConfig) -> list[RunSummary]:
    """Print the runs in a folder, the lowest loss first. Returns them."""
    runs = sorted(find_runs(Path(config.path)), key=lambda run: run.best_val_loss)
    names = differing(runs)
    if len({run.fingerprint for run in runs}) > 1:
        warn("These runs have different data: their losses cannot be compared")
    if config.json:
        print(json.dumps(as_json(runs, names), allow_nan=False))
    elif config.csv:
        rows = [{**{name: run.settings[name] for name in names}, **run.to_json()} for run in runs]
        columns = ["run", *names, "step", "best_val_loss", "elapsed_s", "done"]
        writer = csv.DictWriter(sys.stdout, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    elif runs:
        show(["run", *names, "step", "loss", "time"], (run_cells(run, names, config) for run in runs))
        if SEED in names:
            say()
            others = [name for name in names if name != SEED]
            show([*others, "runs", "mean loss", "deviation", "best"], group_cells(runs, names))
    return runs


def as_json(runs: Sequence[RunSummary], names: Sequence[str]) -> dict[str, Any]:
    """The table, as JSON has it."""
    others = [name for name in names if name != SEED]
    found = [
        {
            "settings": dict(zip(others, group.values, strict=True)),
            "runs": [str(run.path) for run in group.runs],
            "mean": group.mean if math.isfinite(group.mean) else None,
            "deviation": group.deviation if math.isfinite(group.deviation) else None,
        }
        for group in groups(runs, names)
    ]
    return {"differing": list(names), "runs": [run.to_json() for run in runs], "groups": found}


def run_cells(run: RunSummary, names: Sequence[str], config: RunsConfig) -> list[str]:
    """The cells of a run."""
    inside = run.path.relative_to(config.path)
    return [
        str(inside if inside.parts else run.path),
        *map(str, run.values(names)),
        f"{run.step:,}" + ("" if run.is_done else f" of {run.settings['max_iters']:,}"),
        f"{run.best_val_loss:.4f}",
        duration(run.elapsed_s),
    ]


def group_cells(runs: Sequence[RunSummary], names: Sequence[str]) -> Iterator[list[str]]:
    """The cells of each group."""
    for group in groups(runs, names):
        deviation = "-" if math.isnan(group.deviation) else f"{group.deviation:.4f}"
        best = min(run.best_val_loss for run in group.runs)
        left = sum(not run.is_done for run in group.runs)
        count = f"{len(group.runs)}" + (f" ({left} not done)" if left else "")
        yield [*map(str, group.values), count, f"{group.mean:.4f}", deviation, f"{best:.4f}"]


def show(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table, of which no terminal is too narrow to show every digit."""
    lines = [columns, *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for number, line in enumerate(lines):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        say("  ".join(cells).rstrip(), style=None if number else "bold")
