"""The table of many runs: which settings differ, the loss of each, and its mean and spread over seeds.

Example: runs = find_runs(Path("sweep")); names = differing(runs); groups(runs, names)
It is read from the checkpoints, of which no weights are read. Losses are nats per token.
"""

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nanogpt.checkpoint.format import Progress, open_checkpoint
from nanogpt.checkpoint.run_dir import PER_COMMAND_SETTINGS, RunFolder
from nanogpt.config import TrainConfig
from nanogpt.errors import UserError
from nanogpt.storage.files import atomic_write
from nanogpt.terminal.console import new_figure, warn
from nanogpt.training.decisions import end_of
from nanogpt.training.metrics import read_rows
from nanogpt.training.plot import points

SEED = "seed"
"""The setting over which results are averaged."""

NO_RESULT = (
    *PER_COMMAND_SETTINGS,
    "fixed",
    "preset",
    "save_seconds",
    "log_interval",
    "log_to",
    "tensorboard",
)
"""Settings that have no influence on a result, or say nothing that others do not say."""

COLORS = ("#d94801", "#2171b5", "#238b45", "#6a51a3", "#525252", "#c51b8a", "#8c6d31", "#00868b")

MAX_TICKS = 8
"""Most values of a setting that are written under their places."""


@dataclass(frozen=True)
class RunSummary:
    """What a table says of a run."""

    path: Path
    settings: dict[str, Any]
    """Those that influence its result; dtype and device are those in use, not "auto". And threads, torch."""
    step: int
    best_val_loss: float
    """Infinite before the first evaluation."""
    elapsed_s: float
    is_done: bool
    """Whether it has reached its end, and is evaluated there."""
    fingerprint: str
    """Of its data."""

    def values(self, names: Sequence[str]) -> tuple[Any, ...]:
        """The values of these settings."""
        return tuple(self.settings[name] for name in names)

    def to_json(self) -> dict[str, Any]:
        """The run, as JSON has it."""
        loss = self.best_val_loss if math.isfinite(self.best_val_loss) else None
        result = {"best_val_loss": loss, "elapsed_s": self.elapsed_s, "done": self.is_done}
        return {"run": str(self.path), "step": self.step, **result, "settings": self.settings}


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone. One without a finite loss makes the mean infinite."""

    values: tuple[Any, ...]
    """Of the settings that differ between groups."""
    runs: list[RunSummary]

    @property
    def mean(self) -> float:
        """Mean of the best validation losses."""
        return statistics.fmean(run.best_val_loss for run in self.runs)

    @property
    def deviation(self) -> float:
        """Standard deviation of a run, estimated from these (n - 1); NaN for one run."""
        losses = [run.best_val_loss for run in self.runs]
        return statistics.stdev(losses) if len(losses) > 1 and math.isfinite(self.mean) else math.nan


def find_runs(folder: Path) -> list[RunSummary]:
    """The run folders in `folder`, or `folder` itself, without their earlier runs. Damaged ones are named."""
    found: list[RunSummary] = []
    for path, folders, _ in os.walk(folder):
        try:
            run = read_run(Path(path))
        except UserError as error:
            warn(f"left out: {error}")
            run = None
        if run is not None:
            found.append(run)
        is_run = RunFolder(Path(path)).last.is_file()
        folders[:] = [] if is_run else sorted(name for name in folders if not name.startswith("."))
    return found


def read_run(path: Path) -> RunSummary | None:
    """The run in a folder; None if there is none. Raises: UserError if its checkpoint is damaged."""
    folder = RunFolder(path)
    file = next((file for file in (folder.last, folder.best) if file.is_file()), None)
    if file is None:
        return None
    saved = open_checkpoint(file)
    config, progress = saved.train_config, saved.progress
    names = [field.name for field in fields(TrainConfig) if field.name not in NO_RESULT]
    settings = {name: getattr(config, name) for name in names}
    in_use = ("dtype", "device", "threads", "torch")  # the last two are not in earlier checkpoints
    settings |= {name: saved.precision.get(name) for name in in_use}
    return RunSummary(
        path,
        settings,
        int(progress["step"]),
        float(progress["best_val_loss"]),
        float(progress["elapsed_s"]),
        is_done(config, progress),
        str(saved.fingerprint),
    )


def is_done(config: TrainConfig, progress: Mapping[str, Any]) -> bool:
    """Whether a run has reached its end, and is evaluated there: resumed, it would end at once."""
    reached = Progress(**progress)
    return end_of(config, reached) is not None and reached.evaluated_at == reached.step


def differing(runs: Sequence[RunSummary]) -> list[str]:
    """The settings in which the runs differ."""
    return (
        [name for name in runs[0].settings if len({run.settings[name] for run in runs}) > 1] if runs else []
    )


def groups(runs: Sequence[RunSummary], names: Sequence[str]) -> list[Group]:
    """The runs by the values of all settings in `names` but the seed, the lowest mean loss first."""
    others = [name for name in names if name != SEED]
    found: dict[tuple[Any, ...], list[RunSummary]] = {}
    for run in runs:
        found.setdefault(run.values(others), []).append(run)
    return sorted((Group(*item) for item in found.items()), key=lambda group: group.mean)


def draw(runs: Sequence[RunSummary], picture: Path) -> None:
    """Draw the validation curves, a color for each group, and beside them the losses against a setting.

    That is the first number that differs, if one does. Raises: UserError if the picture cannot be written.
    """
    names = [name for name in differing(runs) if name != SEED]
    found = groups(runs, names)
    number = next((name for name in names if all(type(r.settings[name]) in (int, float) for r in runs)), None)
    figure = new_figure(10 if number else 6, 4.5)
    curves, *rest = figure.subplots(1, 2 if number else 1, squeeze=False)[0]
    for index, group in enumerate(found):
        label = ", ".join(f"{name} {value}" for name, value in zip(names, group.values, strict=True))
        for run in group.runs:
            metrics = RunFolder(run.path).metrics
            rows = [row for _, row in read_rows(metrics) if row] if metrics.is_file() else []
            steps, losses = [*zip(*points(rows, "val_loss"), strict=True)] or ((), ())
            curves.plot(steps, losses, color=COLORS[index % len(COLORS)], linewidth=1, label=label)
            label = ""
    curves.set_xlabel("step")
    curves.set_ylabel("validation loss, nats per token")
    if names and len(found) <= len(COLORS):
        curves.legend(fontsize="small")
    for axes in rest:
        draw_losses(axes, runs, names, names.index(number or ""))
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=120)


def draw_losses(axes: Any, runs: Sequence[RunSummary], names: Sequence[str], place: int) -> None:
    """Draw the best loss of each run against the setting names[place], with a line through the means."""
    lines: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups(runs, names):
        lines.setdefault(group.values[:place] + group.values[place + 1 :], []).append(group)
    for index, line in enumerate(lines.values()):
        line.sort(key=lambda group: group.values[place])
        color = COLORS[index % len(COLORS)] if len(lines) > 1 else "#888888"
        axes.plot([group.values[place] for group in line], [group.mean for group in line], color=color)
        for group in line:
            losses = [run.best_val_loss for run in group.runs]
            axes.plot([group.values[place]] * len(losses), losses, "o", color=color, markersize=4)
    values = [run.settings[names[place]] for run in runs]
    if min(values) > 0 and max(values) >= 8 * min(values):
        axes.set_xscale("log")
    ticks = sorted(set(values))
    if len(ticks) <= MAX_TICKS:  # the values themselves
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel(names[place])
    axes.set_ylabel("best validation loss")
