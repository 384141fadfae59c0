"""The curve of a run: its evaluations, read from metrics.jsonl, and the same as a line of characters.

Example: points = evaluations(Path("out/metrics.jsonl"), saved.progress)
         sparkline([point.loss for point in points], width=60)
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanogpt.errors import UserError
from nanogpt.export.source import Evaluation
from nanogpt.training.metrics import read_rows

BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
"""Characters of a sparkline, lowest first; and those for a terminal that shows ASCII alone."""


def evaluations(path: Path, progress: Mapping[str, Any]) -> list[Evaluation]:
    """The evaluations in a metrics.jsonl up to a checkpoint; none if it is missing, or of another run.

    progress: of the checkpoint.
    """
    try:
        rows = [row for _, row in read_rows(path) if row is not None] if path.is_file() else []
    except UserError:
        return []
    found = [
        Evaluation(row["step"], row["val_loss"], bits if isinstance(bits, float) else None)
        for row in rows
        for loss, bits in [(row.get("val_loss"), row.get("val_bits_per_byte"))]
        if isinstance(loss, float) and math.isfinite(loss)
        if isinstance(row["step"], int) and row["step"] <= progress["step"]
    ]
    best = min((point.loss for point in found), default=None)
    last = max((point.step for point in found), default=None)
    same_run = best == progress.get("best_val_loss") and last == progress.get("evaluated_at")
    return found if same_run else []


def sparkline(values: Sequence[float], width: int, bars: str = BARS) -> str:
    """Numbers as a line of at most `width` bars. More numbers than that are averaged in groups."""
    count = min(len(values), width)
    edges = [round(i * len(values) / count) for i in range(count + 1)] if count else []
    means = [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((value - low) * scale)] for value in means)
