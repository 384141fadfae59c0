"""Models: what the names in requests stand for, "out" for the served checkpoint, "out@200" for a kept one.

Example: models = Models(config, load(config, loop)); served = await models.get("out@200")
A kept checkpoint (checkpoint/kept.py) is loaded when it is first asked for. A few of them stay loaded, each
with an engine of its own; then the one that was used longest ago makes room, unless it is at work.
"""

import asyncio
import re
from pathlib import Path
from typing import Any

from nanogpt.checkpoint.kept import kept_checkpoints, kept_path
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.errors import UserError
from nanogpt.server.config import ServeConfig
from nanogpt.server.protocol import ApiError
from nanogpt.server.served import Served, load_file, model_name, run_folder, stamp_of
from nanogpt.terminal.console import warn

MAX_KEPT = 4
"""Most kept checkpoints that are loaded at the same time."""

KEPT_ROWS = 8
"""Most texts that grow at the same time with a kept checkpoint."""

NO_CHECKPOINT = "no checkpoint yet: the run has not saved one"

REPLACED = "the model was replaced"


def unknown_model(message: str) -> ApiError:
    """The error for a name that is no model's."""
    return ApiError(404, message, param="model", code="model_not_found")


class Models:
    """The served checkpoint and the kept ones of its run. All but `describe` is for the event loop."""

    def __init__(self, config: ServeConfig, current: Served | None) -> None:
        """current: the served checkpoint; None: its run has none yet."""
        self.config, self.current = config, current
        self.name = model_name(config)
        self.folder = RunFolder(run_folder(config))
        self.kept: dict[str, Served] = {}
        """The kept checkpoints that are loaded, by name, the one used longest ago first."""
        self.loading = asyncio.Lock()
        """Guards `kept` while one is loaded: one at a time."""
        self.closing = ""
        """Why no model can be had any more; "": they can."""

    @property
    def loaded(self) -> list[Served]:
        """All models that are loaded."""
        return [*([self.current] if self.current else []), *self.kept.values()]

    def checkpoint(self) -> Served:
        """The served checkpoint. Raises: ApiError if there is none yet."""
        if self.current is None:
            raise ApiError(503, NO_CHECKPOINT)
        return self.current

    async def get(self, name: str | None = None) -> Served:
        """The model of a name, open for requests; None: the served checkpoint. Raises: ApiError."""
        if not name or name == self.name:
            return self.checkpoint()
        path = self.path_of(name)
        stamp = await asyncio.to_thread(stamp_of, path)
        if stamp == (0, 0):
            raise unknown_model(
                f"the run has not kept the model {name!r}: GET /v1/models names those that it has"
            )
        if not self.has(name, stamp):
            async with self.loading:
                if not self.has(name, stamp):
                    await self.load_kept(name, path)
        self.kept[name] = self.kept.pop(name)
        return self.kept[name]

    def path_of(self, name: str) -> Path:
        """The file that a kept checkpoint of this name has. Raises: ApiError if it is no such name."""
        step = re.fullmatch(r"@(0|[1-9][0-9]{0,17})", name.removeprefix(self.name))
        if step is None or not name.startswith(self.name):
            raise unknown_model(f"the model {name!r} is not served here, but {self.name!r} is")
        return kept_path(self.folder.kept, int(step[1]))

    def has(self, name: str, stamp: tuple[int, int]) -> bool:
        """Whether the file with this stamp is loaded."""
        return name in self.kept and self.kept[name].stamp == stamp

    async def load_kept(self, name: str, path: Path) -> None:
        """Load a kept checkpoint. Raises: ApiError if it is damaged, or all that are loaded are at work."""
        self.drop(name)
        while len(self.kept) >= MAX_KEPT:
            idle = [other for other, served in self.kept.items() if not served.engine.is_busy()]
            if not idle:
                raise ApiError(429, f"{MAX_KEPT} kept checkpoints are at work: try again in a moment")
            self.drop(idle[0])
        loop, rows = asyncio.get_running_loop(), min(self.config.rows, KEPT_ROWS)
        try:
            served = await asyncio.to_thread(load_file, path, name, self.config, loop, rows)
        except (UserError, OSError) as error:
            warn(str(error))  # names a path of this machine, which is no business of clients
            raise ApiError(500, f"the checkpoint {name} is damaged: the server's log says how") from error
        self.kept[name] = served
        if self.closing:
            self.close(self.closing)

    def drop(self, name: str) -> None:
        """Let a kept checkpoint go, if it is loaded, once its texts have ended."""
        if name in self.kept:
            self.kept.pop(name).engine.close(REPLACED, finish=True)

    def replace(self, newer: Served) -> None:
        """Serve another checkpoint. The texts that are being made are finished by the earlier one."""
        earlier, self.current = self.current, newer
        if earlier:
            earlier.engine.close(REPLACED, finish=True)
        if self.closing:
            self.close(self.closing)

    def close(self, reason: str, *, finish: bool = False) -> None:
        """Take no more requests; see Engine.close."""
        self.closing = reason
        for served in self.loaded:
            served.engine.close(reason, finish=finish)

    def describe(self) -> list[dict[str, Any]]:
        """All models, those too that are not loaded, as GET /v1/models lists them."""
        current = self.current
        created = {self.name: current.created} if current else {}
        for step, path in kept_checkpoints(self.folder.kept).items():
            created[f"{self.name}@{step}"] = stamp_of(path)[1] // 10**9
        context = current.context if current else None
        return [
            {
                "id": name,
                "object": "model",
                "created": seconds,
                "owned_by": "nanogpt",
                "max_model_len": context,
            }
            for name, seconds in created.items()
        ]
