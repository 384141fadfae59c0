"""One stream of numbers, several readers: the console, metrics.jsonl, TensorBoard.

Use:    metrics = Metrics([ConsoleReader(...), JsonLines(path, step)]); metrics.write(record)
A record is a flat dict with a "step" and numbers; "sample" may hold generated text. Readers take
what they show and leave the rest. Knows nothing of the model.
"""

import json
import math
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from nanogpt.console import progress_bar, say, warn

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


class Reader(Protocol):
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

    def __init__(self, readers: Sequence[Reader]) -> None:
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


class JsonLines:
    """metrics.jsonl: a JSON object a line, appended.

    Opening it at a step drops what a killed run wrote after that step (and a line cut in half),
    since those steps are done again. A full disk costs no line: it waits for the next flush.
    """

    def __init__(self, path: Path, step: int, evaluated_at: int) -> None:
        self.path = path
        self.waiting: list[str] = []
        forget_after(path, step, evaluated_at)

    def write(self, record: Record) -> None:
        """Append the record."""
        row = {key: record[key] for key in JSON_FIELDS if key in record and math.isfinite(record[key])}
        self.waiting.append(json.dumps(row) + "\n")
        self.flush(sync=False)

    def flush(self, *, sync: bool = True) -> None:
        """Write the lines that wait; with sync, through to the disk."""
        try:
            with open(self.path, "ab", buffering=0) as file:
                size, left = file.seek(0, os.SEEK_END), "".join(self.waiting).encode()
                try:
                    while left:
                        left = left[file.write(left) :]
                except OSError:
                    file.truncate(size)  # no half line
                    raise
                self.waiting.clear()
                if sync:
                    os.fsync(file.fileno())
        except OSError as error:
            warn(f"cannot write {self.path}: {error.strerror}: will try again")

    def close(self) -> None:
        """Write what waits."""
        self.flush()


def forget_after(path: Path, step: int, evaluated_at: int) -> None:
    """Cut the JSON lines at `path` from the first one that is ahead of the run.

    step, evaluated_at: where the run stands, and when it was last evaluated.
    """
    if not path.exists():
        return
    keep = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
                if not line.endswith(b"\n") or row["step"] > (evaluated_at if "val_loss" in row else step):
                    break
            except (ValueError, KeyError, TypeError):
                break
            keep += len(line)
    os.truncate(path, keep)


TENSORBOARD_NAMES = {
    "train_loss": "loss/train",
    "val_loss": "loss/val",
    "val_bits_per_byte": "bits_per_byte/val",
    "lr": "learning_rate",
    "grad_norm": "gradient_norm",
    "tokens_per_s": "tokens_per_s",
}


class TensorBoard:
    """Events for `tensorboard --logdir out/runs`. What cannot be written is reported once and left out."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        self.broken = False
        rows = "".join(f"| {name} | {value} |\n" for name, value in settings.items())
        with self.attempt():
            from torch.utils.tensorboard.writer import SummaryWriter

            # purge_step hides what a killed run wrote about steps that are done again.
            self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
            self.writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", step)

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


class ConsoleReader:
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


def duration(seconds: float) -> str:
    """A length of time for a person: 48 s, 2 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
