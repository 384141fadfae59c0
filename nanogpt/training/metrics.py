"""Metrics of a training run: one stream of rows to several sinks, such as the console and metrics.jsonl.

Example: metrics = Metrics([ConsoleSink(max_iters), JsonLinesSink(path)])
         metrics.rewind(0, 0); metrics.write({"step": 10, "train_loss": 2.5}); metrics.close()
A row is a flat dict with a "step" and numbers; "sample" may hold generated text. A sink takes the fields
that it shows and ignores the others. sinks.py has the other sinks. Knows nothing of the model.
"""

import json
import math
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from nanogpt.errors import UserError, require
from nanogpt.storage import files
from nanogpt.terminal.console import progress_bar, say, warn
from nanogpt.units import duration

Row = Mapping[str, Any]

JSON_FIELDS: tuple[str, ...] = (
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
    """A destination of metrics. Its constructor opens nothing: the first rewind does."""

    def rewind(self, step: int, evaluated_at: int) -> None:
        """Open the sink, or go back to `step`: forget the rows of later steps, which will be done again.

        evaluated_at: step of the last evaluation that counts; later ones are forgotten.
        """
        ...

    def write(self, row: Row) -> None:
        """Take one row."""
        ...

    def flush(self) -> None:
        """Make the rows so far durable."""
        ...

    def close(self) -> None:
        """Flush, and release files and connections."""
        ...


class Metrics:
    """The metrics of a run, written to every sink."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = sinks

    def rewind(self, step: int, evaluated_at: int) -> None:
        """Continue every sink after `step`: at the start, after a resume or a roll-back (see Sink)."""
        for sink in self.sinks:
            sink.rewind(step, evaluated_at)

    def write(self, row: Row) -> None:
        """Write a row to every sink."""
        for sink in self.sinks:
            sink.write(row)

    def flush(self) -> None:
        """Make the rows so far durable.

        Called before a checkpoint is saved: the metrics must have every step that a checkpoint has.
        """
        for sink in self.sinks:
            sink.flush()

    def close(self) -> None:
        """Close every sink."""
        for sink in self.sinks:
            sink.close()


class ConsoleSink:
    """A progress bar on a terminal, plain lines elsewhere; evaluations are lines in both cases."""

    def __init__(self, max_iters: int) -> None:
        self.bar = progress_bar("Training", lines=False)
        self.max_iters = max_iters
        self.task = self.bar.add_task("", total=max_iters, detail="")

    def rewind(self, step: int, evaluated_at: int) -> None:
        """Move the bar to `step`; the first update shows it. Printed lines stay."""
        self.bar.update(self.task, completed=step)

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self.bar.start()
        self.bar.update(self.task, completed=step)

    def set_total(self, max_iters: int) -> None:
        """Change the step at which the training ends."""
        if max_iters != self.max_iters:
            self.max_iters = max_iters
            self.bar.update(self.task, total=max_iters)

    @contextmanager
    def evaluating(self, batches: int) -> Generator[Callable[[], None]]:
        """Show a second bar while a split is evaluated. Yields a function to call after each batch."""
        self.bar.start()
        task = self.bar.add_task("", total=batches, detail="evaluating")
        try:
            yield lambda: self.bar.advance(task)
        finally:
            self.bar.remove_task(task)

    def write(self, row: Row) -> None:
        """Show the loss, learning rate and speed of an update, or an evaluation and its sample."""
        self.bar.start()
        if "train_loss" in row:
            detail = f"loss {row['train_loss']:.4f}  lr {row['lr']:.1e}  {row['tokens_per_s']:,.0f} tok/s"
            if self.bar.disable:
                left = duration(row["left_s"])
                say(f"step {row['step']}/{self.max_iters}  {detail}  left {left}")
            self.bar.update(self.task, completed=row["step"], detail=detail)
        if "val_loss" in row:
            mark = "  best so far" if row["best"] else ""
            bits = f", {row['val_bits_per_byte']:.4f} bits a byte" if "val_bits_per_byte" in row else ""
            say(f"step {row['step']}: validation loss {row['val_loss']:.4f}{bits}{mark}", style="bold")
            say("    " + row["sample"].strip("\n").replace("\n", "\n    "), style="dim")

    def flush(self) -> None:
        """Do nothing: lines are shown at once."""

    def close(self) -> None:
        """Remove the bar."""
        self.bar.stop()


class JsonLinesSink:
    """metrics.jsonl: one JSON object per line, appended. On a full disk, lines wait for the next flush."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unwritten: list[str] = []
        self.reported_error = ""

    def rewind(self, step: int, evaluated_at: int) -> None:
        """Drop the rows of later steps, which will be done again, and a last line cut in half.

        Raises: UserError if there is no regular file at the path, or it cannot be read or written.
        """
        forget_after(self.path, step, evaluated_at)
        self.unwritten = [
            line for line in self.unwritten if not is_ahead(parse_row(line.encode()), step, evaluated_at)
        ]

    def write(self, row: Row) -> None:
        """Append the finite numbers of the row."""
        numbers = {key: row[key] for key in JSON_FIELDS if key in row and math.isfinite(row[key])}
        self.unwritten.append(json.dumps(numbers) + "\n")
        self.flush(sync=False)

    def flush(self, *, sync: bool = True) -> None:
        """Append the unwritten lines. sync: force them to the disk."""
        try:
            require_file(self.path)
            with open(self.path, "ab", buffering=0) as file:
                size, left = file.seek(0, os.SEEK_END), "".join(self.unwritten).encode()
                try:
                    while left:
                        left = left[file.write(left) :]
                except OSError:
                    file.truncate(size)  # leave no half line
                    raise
                self.unwritten.clear()
                self.reported_error = ""
                if sync:
                    files.fsync(file.fileno(), self.path.parent)
        except (OSError, UserError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            if reason != self.reported_error:  # once, not at every line
                warn(f"cannot write {self.path}: {reason}: will try again")
            self.reported_error = reason

    def close(self) -> None:
        """Append the unwritten lines, or warn that they are lost."""
        self.flush()
        if self.unwritten:
            warn(f"{self.path} lacks the last {len(self.unwritten):,} lines: {self.reported_error}")
            self.unwritten.clear()


def require_file(path: Path) -> None:
    """Raise UserError for a folder, a pipe or a device: reading a pipe would wait for ever."""
    require(path.is_file() or not path.exists(), f"{path} is not a file: move it away")


def read_rows(path: Path) -> Generator[tuple[bytes, dict[str, Any] | None]]:
    """Each line of a metrics.jsonl with its row, None for a line that is not ours or is cut in half.

    Raises: UserError if it is not a regular file, or cannot be read.
    """
    require_file(path)
    try:
        with open(path, "rb") as file:
            for line in file:
                yield line, parse_row(line)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The row in a line; None if it is not ours or is cut in half."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not line.endswith(b"\n"):
        return None
    row = cast(dict[str, Any], row)
    return row if type(row.get("step")) in (int, float) else None


def forget_after(path: Path, step: int, evaluated_at: int) -> None:
    """Delete the rows of a metrics.jsonl that are ahead of the run, and a last line cut in half.

    All other lines stay as they are.
    step, evaluated_at: the step of the run, and that of its last evaluation.
    Raises: UserError if it is not a regular file, or cannot be read or written.
    """
    require_file(path)
    if not path.exists():
        return
    first_dropped, position, all_at_end = -1, 0, True
    for line, row in read_rows(path):
        if must_drop(line, row, step, evaluated_at):
            first_dropped = position if first_dropped < 0 else first_dropped
        elif first_dropped >= 0:
            all_at_end = False
        position += len(line)
    if first_dropped < 0:
        return
    if all_at_end:  # the usual case; truncating works on a full disk too
        os.truncate(path, first_dropped)
        return
    with files.atomic_write(path) as file:
        for line, row in read_rows(path):
            if not must_drop(line, row, step, evaluated_at):
                file.write(line)


def must_drop(line: bytes, row: dict[str, Any] | None, step: int, evaluated_at: int) -> bool:
    """Whether a line is ahead of the run, or cut in half."""
    return is_ahead(row, step, evaluated_at) or not line.endswith(b"\n")


def is_ahead(row: dict[str, Any] | None, step: int, evaluated_at: int) -> bool:
    """Whether a row belongs to a later step than the run's (see forget_after)."""
    return row is not None and row["step"] > (evaluated_at if "val_loss" in row else step)
