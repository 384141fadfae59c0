"""loss.png: training and validation loss against steps, from metrics.jsonl.

Example: plot_losses(Path("out/metrics.jsonl"), Path("out/loss.png"))
"""

from pathlib import Path
from typing import Any

from nanogpt.storage.files import atomic_write
from nanogpt.terminal.console import new_figure
from nanogpt.training.metrics import read_rows


def plot_losses(metrics: Path, picture: Path) -> None:
    """Draw training and validation loss, with the best evaluation marked (matplotlib).

    Raises: UserError if the metrics cannot be read, or the picture cannot be written.
    """
    table = [row for _, row in read_rows(metrics) if row is not None]
    train, val = points(table, "train_loss"), points(table, "val_loss")
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#9ecae1", linewidth=1, label="training")
    if val:
        axes.plot(*zip(*val, strict=True), color="#d94801", marker="o", markersize=3, label="validation")
        step, loss = min(val, key=lambda point: point[1])
        axes.annotate(
            f"best {loss:.4f} at step {step:,}",
            (step, loss),
            xytext=(0, 24),
            textcoords="offset points",
            ha="right",
            arrowprops={"arrowstyle": "-", "color": "#888888"},
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    if train or val:
        axes.legend()
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=120)


def points(table: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Step and value of every row that has the number `name`."""
    return [(row["step"], row[name]) for row in table if type(row.get(name)) in (int, float)]
