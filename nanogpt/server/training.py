"""The training whose checkpoint is served: its settings, curve and kept checkpoints, and news while it runs.

Example: training = Training(config, models); await training.describe(); events = await training.events()
All is read from the run folder, in threads: the training knows nothing of the server. It runs as long as it
holds the lock of the folder.
"""

import asyncio
import json
import math
from collections.abc import AsyncGenerator
from dataclasses import dataclass, fields
from typing import Any, cast

from nanogpt.checkpoint.kept import kept_checkpoints
from nanogpt.checkpoint.run_dir import PER_COMMAND_SETTINGS, RunFolder
from nanogpt.config import TrainConfig
from nanogpt.server.config import ServeConfig
from nanogpt.server.models import Models
from nanogpt.server.protocol import ApiError, json_bytes
from nanogpt.storage.locking import is_locked

Row = dict[str, float]
"""A line of metrics.jsonl."""

LOOK_SECONDS = 0.5
"""Seconds between two looks at the folder."""

HEARTBEAT_SECONDS = 15.0
"""Seconds after which a stream without news says that it is still there."""

MAX_LISTENERS = 32
"""Most streams of news at the same time."""

MAX_ROWS = 20_000
"""Rows of a description, about: of a longer curve, every second or third update is left out."""

BLOCK, MAX_LINE = 1 << 20, 1 << 26
"""Bytes of metrics.jsonl that are read at a time, and most bytes of a line."""

NUMBER_LIMIT = 2.0**63


@dataclass(frozen=True)
class News:
    """What has changed in a run folder."""

    running: bool
    """Whether a training writes there. If not, nothing comes after these news."""
    restarted: bool
    """Whether earlier rows no longer count: then all rows and checkpoints that do are in these news."""
    rows: list[Row]
    checkpoints: list[dict[str, Any]]
    """Kept checkpoints: step, val_loss (None if it is not known), and name of the model."""


class Reader:
    """A run folder, read again and again. The first news are all that there is."""

    def __init__(self, folder: RunFolder, name: str) -> None:
        """name: that of the served model."""
        self.folder, self.name = folder, name
        self.position, self.last_line = 0, b""
        """The place in metrics.jsonl up to which it was read, and the line before it."""
        self.losses: dict[float, float] = {}
        """Validation losses by step."""
        self.known: set[int] = set()
        """Steps of the kept checkpoints."""

    def read(self) -> News:
        """The news since the last call."""
        running = is_locked(self.folder.path)  # first: what a training writes at its end is read below
        kept = list(kept_checkpoints(self.folder.kept))  # then: the row of each is there already
        rows = self.read_rows()
        restarted = rows is None
        if rows is None:
            self.position, self.last_line, self.losses, self.known = 0, b"", {}, set()
            rows = self.read_rows() or []
        self.losses |= {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
        new, self.known = [step for step in kept if step not in self.known], set(kept)
        checkpoints = [
            {"step": step, "val_loss": self.losses.get(step), "model": f"{self.name}@{step}"} for step in new
        ]
        return News(running, restarted, rows, checkpoints)

    def read_rows(self) -> list[Row] | None:
        """The new rows of metrics.jsonl; None if it is no longer the file that it was."""
        rows: list[Row] = []
        while True:
            raw = self.read_block()
            if not raw.startswith(self.last_line):
                return None
            lines = raw.splitlines(keepends=True)
            while lines and not lines[-1].endswith(b"\n"):  # it is still being written
                lines.pop()
            new = lines[1:] if self.last_line else lines
            if not new:
                return rows
            rows += [row for line in new if (row := parse_row(line)) is not None]
            self.position += sum(map(len, new))
            self.last_line = new[-1]

    def read_block(self) -> bytes:
        """The last line and about a block after it, in whole lines but for the end; b"" without a file."""
        path = self.folder.metrics
        try:
            if not path.is_file():  # opening a named pipe would block
                return b""
            with open(path, "rb") as file:
                file.seek(self.position - len(self.last_line))
                return file.read(len(self.last_line) + BLOCK) + file.readline(MAX_LINE)
        except OSError:
            return b""


def parse_row(line: bytes) -> Row | None:
    """The finite numbers in a line of metrics.jsonl; None if it is no row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    items = cast(dict[str, Any], row).items()
    numbers = {key: n for key, n in items if type(n) in (int, float) and abs(n) < NUMBER_LIMIT}
    return numbers if "step" in numbers else None


class Training:
    """The run of the served checkpoint."""

    def __init__(self, config: ServeConfig, models: Models) -> None:
        self.config, self.folder, self.name = config, models.folder, models.name
        self.listeners = 0
        self.closed = asyncio.Event()

    async def describe(self) -> bytes:
        """All about the run, in JSON. Raises: ApiError if there is none."""
        return await asyncio.to_thread(self.read_all)

    def read_all(self) -> bytes:
        """As describe."""
        self.require_run()
        news, settings = Reader(self.folder, self.name).read(), changed_settings(self.folder.saved_config())
        described = {
            "name": self.name,
            "settings": settings,
            "rows": thinned(news.rows),
            "running": news.running,
            "checkpoints": news.checkpoints,
        }
        return json_bytes(described)

    def require_run(self) -> None:
        """Raise ApiError if there is no run beside the checkpoint."""
        if not (self.config.run or self.folder.metrics.is_file() or self.folder.kept.is_dir()):
            raise ApiError(404, "the served checkpoint has no run folder beside it")

    async def events(self) -> AsyncGenerator[bytes, None] | None:
        """News from now on, as server-sent events, as long as a training runs. None if none does.

        Raises: ApiError if there is no run, or too many listen.
        """
        if self.listeners >= MAX_LISTENERS:
            raise ApiError(429, f"{MAX_LISTENERS} clients are listening already: try again in a moment")
        await asyncio.to_thread(self.require_run)
        reader = Reader(self.folder, self.name)
        news = await asyncio.to_thread(reader.read)
        return self.stream(reader) if news.running else None

    async def stream(self, reader: Reader) -> AsyncGenerator[bytes, None]:
        """The events, each as bytes."""
        self.listeners += 1
        try:
            quiet_s, running = 0.0, True
            while running and not self.closed.is_set():
                news = await asyncio.to_thread(reader.read)
                raw, running = encoded(news), news.running
                quiet_s = 0.0 if raw else quiet_s + LOOK_SECONDS
                if quiet_s >= HEARTBEAT_SECONDS:
                    raw, quiet_s = b": still there\n\n", 0.0
                if raw:
                    yield raw
                await self.pause()
        finally:
            self.listeners -= 1

    async def pause(self) -> None:
        """Wait for the next look, or until the server closes."""
        try:
            await asyncio.wait_for(self.closed.wait(), LOOK_SECONDS)
        except asyncio.TimeoutError:
            return

    def close(self) -> None:
        """End all streams."""
        self.closed.set()


def encoded(news: News) -> bytes:
    """News as server-sent events."""
    events: list[tuple[str, object]] = [("restart", {})] if news.restarted else []
    events += [("row", row) for row in news.rows]
    events += [("checkpoint", checkpoint) for checkpoint in news.checkpoints]
    events += [] if news.running else [("end", {})]
    return b"".join(b"event: %b\ndata: %b\n\n" % (kind.encode(), json_bytes(data)) for kind, data in events)


def changed_settings(config: TrainConfig | None) -> dict[str, Any]:
    """The settings of a training that are not the defaults; none if they are not known."""
    usual, names = TrainConfig(), [item.name for item in fields(TrainConfig)]
    if config is None:
        return {}
    values = {name: getattr(config, name) for name in names if name not in PER_COMMAND_SETTINGS}
    return {name: value for name, value in values.items() if value != getattr(usual, name)}


def thinned(rows: list[Row]) -> list[Row]:
    """All evaluations, and of the updates so many, evenly, that there are about MAX_ROWS."""
    every = math.ceil(len(rows) / MAX_ROWS)
    return [row for number, row in enumerate(rows) if number % every == 0 or "val_loss" in row]
