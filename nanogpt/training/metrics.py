"""One stream of numbers, several readers: the console, metrics.jsonl, TensorBoard.

Use:    metrics = Metrics([ConsoleSink(...), JsonLinesSink(path, step)]); metrics.write(record)
A record is a flat dict with a "step" and numbers; "sample" may hold generated text. Readers take
what they show and leave the rest. Knows nothing of the model.
"""

import json
import math
import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from nanogpt import files
from nanogpt.console import duration, progress_bar, say, warn
from nanogpt.errors import UserError, require

Record = Mapping[str, Any]

JSON_FIELDS = (
    "step",
    "train_loss",
    "val_loss",
    "val_bits_per_byte",
    "lr",
    "grad_norm",
    "tokens_per_s",
    "elapsed_s",
    "wall_s",
)


class Sink(Protocol):
    """Takes every record of a run."""

    def write(self, record: Record) -> None:
        """Take one record."""
        ...

    def flush(self) -> None:
        """Make what was taken durable."""
        ...

    def close(self) -> None:
        """Take no more."""
        ...


class Metrics:
    """Hands each record to every reader."""

    def __init__(self, readers: Sequence[Sink]) -> None:
        self.readers = readers

    def write(self, record: Record) -> None:
        """Take one record."""
        for reader in self.readers:
            reader.write(record)

    def flush(self) -> None:
        """Make everything durable.

        Called before a checkpoint is saved: a checkpoint must never know of a step that the
        metrics have forgotten.
        """
        for reader in self.readers:
            reader.flush()

    def close(self) -> None:
        """End the stream."""
        for reader in self.readers:
            reader.close()


class JsonLinesSink:
    """metrics.jsonl: a JSON object a line, appended.

    Opening it at a step drops what a killed run wrote after that step (and a line cut in half),
    since those steps are done again. A full disk costs no line: it waits for the next flush.
    Errors: UserError if it is no file, or cannot be read.
    """

    def __init__(self, path: Path, step: int, evaluated_at: int) -> None:
        self.path = path
        self.waiting: list[str] = []
        self.problem = ""
        forget_after(path, step, evaluated_at)

    def write(self, record: Record) -> None:
        """Append the record."""
        row = {key: record[key] for key in JSON_FIELDS if key in record and math.isfinite(record[key])}
        self.waiting.append(json.dumps(row) + "\n")
        self.flush(sync=False)

    def flush(self, *, sync: bool = True) -> None:
        """Write the lines that wait; with sync, through to the disk."""
        try:
            require_file(self.path)
            with open(self.path, "ab", buffering=0) as file:
                size, left = file.seek(0, os.SEEK_END), "".join(self.waiting).encode()
                try:
                    while left:
                        left = left[file.write(left) :]
                except OSError:
                    file.truncate(size)  # no half line
                    raise
                self.waiting.clear()
                self.problem = ""
                if sync:
                    files.sync(file.fileno(), self.path.parent)
        except (OSError, UserError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            if reason != self.problem:  # said once, not at every line
                warn(f"cannot write {self.path}: {reason}: will try again")
            self.problem = reason

    def close(self) -> None:
        """Write what waits, or say that it is lost."""
        self.flush()
        if self.waiting:
            warn(f"{self.path} lacks the last {len(self.waiting):,} lines: {self.problem}")
            self.waiting.clear()


def require_file(path: Path) -> None:
    """Errors: UserError if there is something at `path` that is no file: reading a pipe waits for ever."""
    require(path.is_file() or not path.exists(), f"{path} is not a file: move it away")


def rows(path: Path) -> Generator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a file of metrics, and what is in each: None if it is not ours, or cut in half.

    Errors: UserError if it is no file, or cannot be read.
    """
    require_file(path)
    try:
        with open(path, "rb") as file:
            for line in file:
                yield line, row_of(line)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def row_of(line: bytes) -> dict[str, Any] | None:
    """The record in a line, None if there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not line.endswith(b"\n"):
        return None
    row = cast(dict[str, Any], row)
    return row if type(row.get("step")) in (int, float) else None


def forget_after(path: Path, step: int, evaluated_at: int) -> None:
    """Drop the records at `path` that are ahead of the run, and a last line cut in half.

    Whatever else is there stays, in its place.
    step, evaluated_at: where the run stands, and when it was last evaluated.
    Errors: UserError if it is no file, or cannot be read or written.
    """
    require_file(path)
    if not path.exists():
        return
    first, position, tail = -1, 0, True
    for line, row in rows(path):
        if is_undone(line, row, step, evaluated_at):
            first = position if first < 0 else first
        elif first >= 0:
            tail = False
        position += len(line)
    if first < 0:
        return
    if tail:  # as most often: works on a full disk too
        os.truncate(path, first)
        return
    with files.replacing(path) as file:
        for line, row in rows(path):
            if not is_undone(line, row, step, evaluated_at):
                file.write(line)


def is_undone(line: bytes, row: dict[str, Any] | None, step: int, evaluated_at: int) -> bool:
    """Whether a line is ahead of a run (see forget_after), or cut in half."""
    ahead = row is not None and row["step"] > (evaluated_at if "val_loss" in row else step)
    return ahead or not line.endswith(b"\n")


TENSORBOARD_NAMES = {
    "train_loss": "loss/train",
    "val_loss": "loss/val",
    "val_bits_per_byte": "bits_per_byte/val",
    "lr": "learning_rate",
    "grad_norm": "gradient_norm",
    "tokens_per_s": "tokens_per_s",
}


class TensorBoardSink:
    """Events for `tensorboard --logdir out/runs`. What cannot be written is reported once and left out."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        self.broken = False
        self.excepthook = threading.excepthook
        threading.excepthook = self.quiet
        table = "".join(f"| {name} | {value} |\n" for name, value in settings.items())
        with self.attempt():
            from torch.utils.tensorboard.writer import SummaryWriter

            # purge_step hides what a killed run wrote about steps that are done again.
            self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
            self.writer.add_text("settings", f"| setting | value |\n|---|---|\n{table}", step)

    def quiet(self, failure: threading.ExceptHookArgs) -> None:
        """Print no traceback of the thread that writes events: its error is raised again by the next call."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self.excepthook(failure)

    @contextmanager
    def attempt(self) -> Generator[None]:
        """Run the block; a failure, on a full disk say, must not end the training."""
        try:
            yield
        except Exception as error:
            if not self.broken:
                warn(f"TensorBoard stops: {error}")
            self.broken = True

    def write(self, record: Record) -> None:
        """Add the record's numbers and text."""
        step = record["step"]
        with self.attempt():
            for key, name in TENSORBOARD_NAMES.items():
                if key in record:
                    self.writer.add_scalar(name, record[key], step)
            if "sample" in record:
                indented = "    " + record["sample"].replace("\n", "\n    ")  # Markdown for "as it is"
                self.writer.add_text("sample", indented, step)

    def flush(self) -> None:
        """Write through to the file."""
        with self.attempt():
            self.writer.flush()

    def close(self) -> None:
        """Write what waits and close the file."""
        with self.attempt():
            self.writer.close()
        threading.excepthook = self.excepthook


class ConsoleSink:
    """A progress bar on a terminal, plain lines elsewhere; evaluations are lines on both."""

    def __init__(self, step: int, max_iters: int) -> None:
        self.bar = progress_bar("Training")
        self.max_iters = max_iters
        self.task = self.bar.add_task("", completed=step, total=max_iters, detail="")

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self.bar.start()
        self.bar.update(self.task, completed=step)

    @contextmanager
    def evaluating(self, batches: int) -> Generator[Callable[[], None]]:
        """Show a second bar while a split is evaluated; call what is yielded after each batch."""
        self.bar.start()
        task = self.bar.add_task("", total=batches, detail="evaluating")
        try:
            yield lambda: self.bar.advance(task)
        finally:
            self.bar.remove_task(task)

    def write(self, record: Record) -> None:
        """Show the record."""
        self.bar.start()
        if "train_loss" in record:
            detail = (
                f"loss {record['train_loss']:.4f}  lr {record['lr']:.1e}  {record['tokens_per_s']:,.0f} tok/s"
            )
            if self.bar.disable:
                left = duration(record["left_s"])
                say(f"step {record['step']}/{self.max_iters}  {detail}  left {left}")
            self.bar.update(self.task, completed=record["step"], detail=detail)
        if "val_loss" in record:
            mark = "  best so far" if record["best"] else ""
            bits = f", {record['val_bits_per_byte']:.4f} bits a byte" if "val_bits_per_byte" in record else ""
            say(f"step {record['step']}: validation loss {record['val_loss']:.4f}{bits}{mark}", style="bold")
            say("    " + record["sample"].strip("\n").replace("\n", "\n    "), style="dim")

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Take the bar down."""
        self.bar.stop()
