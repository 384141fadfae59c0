"""Metric sinks that `--log_to` chooses: metrics.jsonl, TensorBoard, wandb.

Example: sinks = create_sinks(("jsonl", "tensorboard"), RunFolder(Path("out")), {"n_layer": 6})
A sink is a class with the methods of metrics.Sink and a row in SINKS; config.SINK_NAMES has the names for
the flag. The console (metrics.py) is also a sink, and always in use. Knows nothing of the model.
"""

import html
import os
import secrets
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.errors import UserError
from nanogpt.storage.files import atomic_write, make_folder
from nanogpt.terminal.console import warn
from nanogpt.training.metrics import JsonLinesSink, Row, Sink

CHART_NAMES = {
    "train_loss": "loss/train",
    "val_loss": "loss/val",
    "val_bits_per_byte": "bits_per_byte/val",
    "lr": "learning_rate",
    "grad_norm": "gradient_norm",
    "tokens_per_s": "tokens_per_s",
}
"""Fields of a row by the names of their charts."""


class FailSafe:
    """Base of an optional sink, whose failures do not end the run: the first one warns, others are silent."""

    def __init__(self, title: str) -> None:
        self.title, self.failed = title, False

    @contextmanager
    def attempt(self) -> Generator[None]:
        """Run the block, and turn an exception in it into a warning."""
        try:
            yield
        except Exception as error:
            if not self.failed:
                warn(f"{self.title} stops: {error}")
            self.failed = True


class TensorBoardSink(FailSafe):
    """Event files for `tensorboard --logdir out/runs`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        super().__init__("TensorBoard")
        self.folder, self.settings = folder, settings
        self.writer: Any = None
        self.default_excepthook: Callable[[threading.ExceptHookArgs], object] = threading.excepthook

    def rewind(self, step: int, evaluated_at: int) -> None:
        """Begin a new event file, which makes TensorBoard hide the numbers of later steps in earlier files.

        It hides neither samples nor an evaluation of `step` itself, which then has two equal points.
        """
        with self.attempt():
            from torch.utils.tensorboard.writer import SummaryWriter

            if self.writer is not None:  # a roll-back
                self.writer.close()
                self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)
                return
            threading.excepthook = self.hide_writer_traceback
            self.writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None)
            table = "".join(f"| {name} | {value} |\n" for name, value in self.settings.items())
            self.writer.add_text("settings", f"| setting | value |\n|---|---|\n{table}", step)

    def hide_writer_traceback(self, failure: threading.ExceptHookArgs) -> None:
        """Print no traceback of the thread that writes events: the next call raises its error again."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self.default_excepthook(failure)

    def write(self, row: Row) -> None:
        """Add the numbers and the sample of the row."""
        step = row["step"]
        with self.attempt():
            for key, name in CHART_NAMES.items():
                if key in row:
                    self.writer.add_scalar(name, row[key], step)
            if "sample" in row:
                preformatted = "    " + row["sample"].replace("\n", "\n    ")  # as Markdown has it
                self.writer.add_text("sample", preformatted, step)

    def flush(self) -> None:
        """Write the events so far to the file."""
        with self.attempt():
            self.writer.flush()

    def close(self) -> None:
        """Write the events so far and close the file."""
        with self.attempt():
            self.writer.close()
        threading.excepthook = self.default_excepthook


class WandbSink(FailSafe):
    """A run of Weights & Biases (wandb.ai), or with WANDB_MODE=offline a folder for `wandb sync`.

    The run's id is kept in the folder, so that a resumed training continues the same run. wandb cannot
    forget: after a resume or a roll-back the abandoned rows stay, and the rows of the repeated steps follow.
    Raises: UserError if wandb is not installed.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        super().__init__("wandb")
        self.folder, self.settings = folder, settings
        self.run: Any = None
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise UserError(
                "--log_to wandb needs the package wandb, which is not installed: pip install nanogpt[wandb]"
            ) from error
        self.wandb: Any = wandb

    def rewind(self, step: int, evaluated_at: int) -> None:
        """Start or continue the run; after a roll-back, go on in it."""
        if self.run is not None:
            return
        with self.attempt():
            make_folder(self.folder)
            self.run = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", "nanogpt"),
                dir=str(self.folder),
                config=dict(self.settings),
                id=self.run_id(),
                resume="allow",
                settings=self.wandb.Settings(console="off"),  # do not capture standard output
            )
            self.run.define_metric("*", step_metric="step")  # wandb's own counter cannot go back

    def run_id(self) -> str:
        """The id of the wandb run: the one saved in the folder, or a new one, which is saved there."""
        path = self.folder / "wandb_id.txt"
        if not path.is_file():
            with atomic_write(path) as file:
                file.write(secrets.token_hex(4).encode())
        return path.read_text("utf-8").strip()

    def write(self, row: Row) -> None:
        """Log the numbers and the sample of the row."""
        with self.attempt():
            values = {name: row[key] for key, name in CHART_NAMES.items() if key in row}
            if "sample" in row:
                values["sample"] = self.wandb.Html(f"<pre>{html.escape(row['sample'])}</pre>")
            self.run.log({"step": row["step"], **values})

    def flush(self) -> None:
        """Do nothing: wandb sends rows in its own process."""

    def close(self) -> None:
        """Wait until everything is sent, and end the run."""
        with self.attempt():
            self.run.finish()


SINKS: dict[str, Callable[[RunFolder, Mapping[str, Any]], Sink]] = {
    "jsonl": lambda folder, _settings: JsonLinesSink(folder.metrics),
    "tensorboard": lambda folder, settings: TensorBoardSink(folder.runs, settings),
    "wandb": lambda folder, settings: WandbSink(folder.runs, settings),
}
"""Every metric sink by its name in `--log_to`. Files below folder.runs move with an earlier run."""


def create_sinks(names: Iterable[str], folder: RunFolder, settings: Mapping[str, Any]) -> list[Sink]:
    """The sinks of these names, which write nothing before their first rewind.

    Raises: UserError if a package is missing.
    """
    return [SINKS[name](folder, settings) for name in names]
