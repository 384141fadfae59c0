"""A served model: the model of a checkpoint, its engine, and the way from its thread to an event loop.

Example: served = load(config, loop); text = Text(...); served.engine.submit([Request(..., listener=text)])
Tokens become text on the engine's thread, which knows at once when a text has ended. After every step the
event loop hears of all that is new, in one call. Knows nothing of HTTP.
"""

import asyncio
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanogpt.checkpoint.format import checkpoint_at, load_model
from nanogpt.errors import UserError
from nanogpt.inference.engine import Engine
from nanogpt.inference.prompts import device_of
from nanogpt.inference.scheduler import Scheduler
from nanogpt.inference.steps import copy_for_steps
from nanogpt.inference.text import FinishReason, TokenTexts
from nanogpt.inference.tokens import Token
from nanogpt.machine.device import autocast, eager_mode
from nanogpt.model.gpt import GPT
from nanogpt.server.config import ServeConfig
from nanogpt.tokenizer.base import Tokenizer


@dataclass
class Load:
    """What requests have asked for and not taken yet."""

    entries: int = 0
    """See jobs.MAX_ENTRIES."""


@dataclass(frozen=True)
class Served:
    """A model that is being served."""

    name: str
    path: Path
    stamp: tuple[int, int]
    """Size and time of change of the checkpoint, which tell another file."""
    model: GPT
    tokenizer: Tokenizer
    dtype: torch.dtype
    engine: Engine
    bridge: "Bridge"
    load: Load = field(default_factory=Load)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def context(self) -> int:
        """Number of tokens that the model sees at once."""
        return self.model.config.block_size


class Bridge:
    """What an engine's thread tells the event loop, collected until the step is over."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.news: list[Callable[[], None]] = []

    def put(self, action: Callable[[], None]) -> None:
        """Let the event loop do something after this step. The engine's thread calls it."""
        self.news.append(action)

    def flush(self) -> None:
        """Hand everything over. The engine's thread calls it."""
        if self.news and not self.loop.is_closed():
            news, self.news = self.news, []
            self.loop.call_soon_threadsafe(lambda: [action() for action in news])


@dataclass(frozen=True)
class Delta:
    """A part of a text, which stays as it is while the text grows."""

    text: "Text"
    first: int
    """Number of tokens of the text before it."""
    tokens: list[tuple[Token, str]]
    """Each with its part of the text."""
    finish_reason: FinishReason | None
    """Why the text ends with this part; None if it goes on."""

    @property
    def entries(self) -> int:
        """Number of tokens and alternatives, with those of the prompt in the first part."""
        tokens = [token for token, _ in self.tokens] + (self.text.prompt_tokens if self.first == 0 else [])
        return sum(1 + len(token.top) for token in tokens)


@dataclass(eq=False)
class Text:
    """A text while it is made: a Listener of the engine, and what the event loop knows of it."""

    texts: TokenTexts
    bridge: Bridge
    changed: asyncio.Event
    """Is set when there is news."""
    ends: frozenset[int] = frozenset()
    """Ids that end the text."""
    cancelled: bool = False
    seen: list[Token] = field(default_factory=list[Token])
    """All tokens so far, as the engine's thread knows them."""
    told: int = 0
    """How many of them the event loop has been told of."""
    parts: list[tuple[Token, str]] = field(default_factory=list[tuple[Token, str]])
    """The tokens that the event loop knows, each with its part of the text; "" if it belongs to the end."""
    times: list[float] = field(default_factory=list[float])
    """When the event loop heard of each of them."""
    prompt_tokens: list[Token] = field(default_factory=list[Token])
    """The tokens of the prompt but the first, if their log-probabilities were asked for."""
    finish_reason: FinishReason | None = None
    """Why the text has ended; None while it goes on."""
    error: str = ""
    """Why it could not be made."""

    # --- on the engine's thread ---

    def on_prompt(self, tokens: list[Token]) -> None:
        """See Listener."""
        self.bridge.put(lambda: self.prompt_tokens.extend(tokens))

    def on_token(self, token: Token) -> bool:
        """See Listener."""
        self.seen.append(token)
        parts = self.texts.add(token)
        if token.id in self.ends and self.texts.finish_reason is None:
            parts += self.texts.finish("stop")
        self.tell(parts)
        return self.texts.finish_reason is None

    def on_end(self, error: str) -> None:
        """See Listener."""
        if self.texts.finish_reason is None:
            self.tell(self.texts.finish(), error)

    def tell(self, parts: list[tuple[Token, str]], error: str = "") -> None:
        """Let the event loop know of parts; at the end also of tokens that add nothing to the text."""
        reason = self.texts.finish_reason
        if reason is not None:
            parts = [*parts, *((token, "") for token in self.seen[self.told + len(parts) :])]
        self.told += len(parts)
        self.bridge.put(lambda: self.hear(parts, reason, error))

    # --- on the event loop ---

    def hear(self, parts: list[tuple[Token, str]], reason: FinishReason | None, error: str) -> None:
        """Take what the engine's thread has told."""
        self.parts += parts
        self.times += [time.perf_counter()] * len(parts)
        self.finish_reason, self.error = reason, error
        if parts or reason is not None:
            self.changed.set()

    def since(self, first: int = 0) -> Delta:
        """What the event loop knows of the text from a token on."""
        return Delta(self, first, self.parts[first:], self.finish_reason)


def checkpoint_path(config: ServeConfig) -> Path:
    """The checkpoint to serve. Raises: UserError if it is in a folder that has none."""
    if config.run:
        return checkpoint_at(Path(config.run), "--run")
    return checkpoint_at(Path(config.checkpoint), "--checkpoint")


def run_folder(config: ServeConfig) -> Path:
    """The folder of the checkpoint."""
    path = Path(config.run or config.checkpoint).resolve()
    return path if config.run or path.is_dir() else path.parent


def model_name(config: ServeConfig) -> str:
    """Name of the served checkpoint in the API."""
    return config.name or run_folder(config).name or "nanogpt"


def load(config: ServeConfig, loop: asyncio.AbstractEventLoop) -> Served:
    """Load the checkpoint to serve, and start its engine. Raises: UserError as load_model."""
    return load_file(checkpoint_path(config), model_name(config), config, loop, config.rows)


def load_file(
    path: Path, name: str, config: ServeConfig, loop: asyncio.AbstractEventLoop, rows: int
) -> Served:
    """Load a checkpoint, and start its engine, for so many rows. Raises: UserError as load_model."""
    stamp = stamp_of(path)
    loaded = load_model(path, config.device)
    model, dtype = copy_for_steps(loaded.model, loaded.trained_in, config.dtype, config.quantize)
    bridge = Bridge(loop)

    @contextmanager
    def computing() -> Generator[None]:
        """The context in which tokens are computed."""
        with eager_mode(), autocast(device_of(model), dtype):
            yield

    engine = Engine(
        Scheduler(model, rows, dtype=dtype),
        config.max_queue,
        context=computing,
        after_step=bridge.flush,
        on_bug=traceback.print_exception,
    )
    return Served(name, path, stamp, model, loaded.tokenizer, dtype, engine, bridge)


def newest_stamp(config: ServeConfig) -> tuple[int, int]:
    """The stamp of the checkpoint to serve; zeros if there is none."""
    try:
        return stamp_of(checkpoint_path(config))
    except UserError:
        return 0, 0


def stamp_of(path: Path) -> tuple[int, int]:
    """What tells whether a file is still the same; zeros if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
