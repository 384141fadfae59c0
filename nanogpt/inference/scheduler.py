"""Scheduler for continuous batching: the texts of many requests grow together, one token each per step.

Example: scheduler = Scheduler(model); waiting = deque([Request(prompt, params, 100, 1, listener)])
         while waiting or scheduler.rows: scheduler.step(waiting)
A request waits until a row of the KV cache is free, is prefilled, and joins the others at the next step; its
row is free again as soon as its text ends (Orca, Yu et al., 2022). A text does not depend on the others:
`generate` makes the same one with the same seed. Knows nothing of threads or of text.

Shapes: R rows of a step, T tokens of a prompt, V vocab_size
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol, cast

import torch
from torch import Tensor

from nanogpt.inference.config import SamplingParams
from nanogpt.inference.generate import decode_one, feed, prefill
from nanogpt.inference.processors import NO_CHANCE, History, needs_history
from nanogpt.inference.prompts import MAX_ROWS, device_of, generators_for
from nanogpt.inference.sampling import sample
from nanogpt.inference.steps import fastest_steps
from nanogpt.inference.tokens import Token, with_logprobs
from nanogpt.machine.device import is_out_of_memory
from nanogpt.model.gpt import GPT
from nanogpt.model.kv_cache import KVCache, integers

PREFILL_TOKENS = 512
"""About how many prompt tokens a step prefills: with more, the running texts would stall."""

MIN_PREFIX = 16
"""Least number of tokens that are copied from another row: computing fewer is as fast."""


class Listener(Protocol):
    """Receives the tokens of a request. All texts wait until a method returns, so none may block."""

    cancelled: bool
    """Whether nobody wants the text any more. Any thread may set it."""

    def on_prompt(self, tokens: list[Token]) -> None:
        """Receive the tokens of the prompt but the first, with log-probabilities, if these are wanted."""
        ...

    def on_token(self, token: Token) -> bool:
        """Receive a new token. Returns whether the text goes on."""
        ...

    def on_end(self, error: str) -> None:
        """No more tokens will come. error: why the text is incomplete; "": it is complete."""
        ...


@dataclass(frozen=True, eq=False)
class Request:
    """A text to continue."""

    prompt: Tensor
    """(T,) int64."""
    params: SamplingParams
    num_tokens: int
    seed: int
    listener: Listener
    logprobs: int | None = None
    """As for generate_tokens."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt; None: on_prompt is not called."""
    min_tokens: int = 0
    """Number of new tokens before which none of `ends` is drawn."""
    ends: tuple[int, ...] = ()
    """Ids that end the text. The listener ends it when it sees one."""


@dataclass(eq=False)
class Row:
    """A running request, in a row of the cache."""

    request: Request
    slot: int
    """The row of the cache."""
    generator: torch.Generator
    history: History | None
    """The tokens so far, if a penalty needs them."""
    text: list[int]
    """Prompt and new tokens; the newest is not in the cache yet."""
    made: int = 0
    """Number of new tokens."""


RowLogits = tuple[list[Row], Tensor]
"""Some rows, and the logits after the newest token of each, (R, V)."""


@dataclass
class Counts:
    """Totals since the scheduler was created, for monitoring."""

    steps: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    reused_tokens: int = 0
    """Prompt tokens that were copied from another row instead of being computed."""

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that were computed."""
        return self.prompt_tokens - self.reused_tokens


class Scheduler:
    """The running requests in the rows of a KV cache, and the step that gives each of them a token."""

    def __init__(self, model: GPT, rows: int = MAX_ROWS, *, dtype: torch.dtype = torch.float32) -> None:
        """dtype: of the matrix products."""
        self.model, self.steps = model, fastest_steps(model)
        self.size, self.device = model.config.block_size, device_of(model)
        self.splits_exactly = dtype == torch.float32
        """Whether a prompt computed in two parts gives the same logits, up to the rounding of float32."""
        self.cache = KVCache(model.config, rows, self.size)
        self.rows: list[Row] = []
        self.free = deque(range(rows))
        self.contents: list[list[int]] = [[] for _ in range(rows)]
        """The tokens in each row of the cache; a free row keeps them until it is taken."""
        self.prompt_logits: list[tuple[int, Tensor] | None] = [None] * rows
        """For each row, the number of tokens in its prompt, and the logits after them, (1, V)."""
        self.counts = Counts()

    # --- prompts ---

    def admit(self, request: Request) -> RowLogits | None:
        """Give a request a row, and compute its prompt. Returns the row and the logits, (1, V).

        None: the request wanted only the log-probabilities of its prompt.
        """
        prompt, listener = request.prompt.to(self.device), request.listener
        seen = prompt[-self.size :]
        if request.prompt_logprobs is not None:
            logits, _ = self.model(seen[None])  # (1, T, V)
            listener.on_prompt(with_logprobs(logits[0, :-1], seen[1:], request.prompt_logprobs))
        if request.num_tokens == 0:
            self.counts.prompt_tokens += len(prompt)
            return None
        (generator,) = generators_for(self.model, [request.seed])
        history = None
        if needs_history(request.params):
            history = History.of([prompt], self.model.config.vocab_size)
        text = cast(list[int], prompt.tolist())
        slot, filled = self.take_slot(text[-self.size :])
        row = Row(request, slot, generator, history, text)
        computed = self.fill(slot, seen, filled)
        self.rows.append(row)
        self.counts.prompt_tokens += len(prompt)
        self.counts.reused_tokens += filled
        return [row], computed

    def take_slot(self, prompt: list[int]) -> tuple[int, int]:
        """Take a free row for a prompt, and copy the longest prefix that another row has.

        Returns the row, and the number of tokens copied: all of them, if another row had the same prompt.
        """
        common = [common_prefix(prompt, content) for content in self.contents]
        source = max(range(len(common)), key=common.__getitem__)
        same = next((slot for slot in range(len(common)) if self.has_prompt(slot, prompt)), None)
        if same is not None:
            source, length = same, len(prompt)
        else:
            length = min(common[source], len(prompt) - 1)  # the last one is computed, for its logits
        if same is None and (length < MIN_PREFIX or not self.splits_exactly):
            return self.free.popleft(), 0
        slot = source if source in self.free else self.free[0]
        self.free.remove(slot)
        self.cache.copy_prefix(source, slot, torch.tensor(prompt[:length]).to(self.device))
        self.contents[slot] = prompt[:length]
        self.prompt_logits[slot] = self.prompt_logits[source] if same is not None else None
        return slot, length

    def has_prompt(self, slot: int, prompt: list[int]) -> bool:
        """Whether a row was prefilled with exactly this prompt, and still has it."""
        known = self.prompt_logits[slot]
        return known is not None and known[0] == len(prompt) and self.contents[slot][: known[0]] == prompt

    def fill(self, slot: int, prompt: Tensor, filled: int = 0) -> Tensor:
        """Compute a prompt, (T,), of which the row has `filled` tokens. Returns the logits, (1, V)."""
        known = self.prompt_logits[slot]
        if filled == len(prompt) and known is not None:
            return known[1]
        if filled:
            logits = feed(self.steps, self.cache, [slot], prompt[None, filled:])
        else:
            logits = prefill(self.steps, self.cache, [slot], [prompt])
        self.contents[slot] = cast(list[int], prompt.tolist())
        self.prompt_logits[slot] = (len(prompt), logits)
        return logits

    # --- tokens ---

    @torch.no_grad()
    def step(self, waiting: "deque[Request]") -> None:
        """Admit requests while there is room, and add a token to every text.

        A request that cannot be computed ends with an error; the others go on.
        """
        self.counts.steps += 1
        logits = self.next_logits()
        enough = self.counts.computed_tokens + PREFILL_TOKENS
        while waiting and self.free and self.counts.computed_tokens < enough:
            request = waiting.popleft()
            if request.listener.cancelled:
                request.listener.on_end("cancelled")
                continue
            taken = list(self.free)
            try:
                admitted = self.admit(request)
            except (RuntimeError, MemoryError) as error:
                self.give_back(taken)
                request.listener.on_end(describe(error))
                continue
            if admitted is None:
                request.listener.on_end("")
            else:
                logits.append(admitted)
        if logits:
            self.choose(logits)

    def give_back(self, free: list[int]) -> None:
        """Free the rows that were free before a request failed."""
        for slot in free:
            if slot not in self.free:
                self.forget(slot)

    def forget(self, slot: int) -> None:
        """Free a row of the cache whose content is unknown."""
        self.contents[slot], self.prompt_logits[slot] = [], None
        self.free.append(slot)

    def next_logits(self) -> list[RowLogits]:
        """The logits after the newest token of every text."""
        for row in [row for row in self.rows if row.request.listener.cancelled]:
            self.end(row, "cancelled")
        lengths = self.cache.lengths
        rest = [row for row in self.rows if lengths[row.slot] < self.size]
        found: list[RowLogits] = []
        for row in [row for row in self.rows if lengths[row.slot] == self.size]:
            overlap = row.request.params.context_overlap or max(1, self.size // 2)
            end = torch.tensor(row.text[-overlap:]).to(self.device)
            found.append(([row], self.fill(row.slot, end)))
            self.prompt_logits[row.slot] = None
        if rest:
            tokens = integers([row.text[-1] for row in rest], self.device)
            found.append((rest, decode_one(self.steps, self.cache, [row.slot for row in rest], tokens)))
            for row in rest:
                self.contents[row.slot].append(row.text[-1])
        return found

    def choose(self, logits: Sequence[RowLogits]) -> None:
        """Sample a token for each row, for rows of the same settings at once, and pass it to the listener."""
        rows = [row for some, _ in logits for row in some]
        joined = torch.cat([own for _, own in logits])  # (R, V)
        groups: dict[object, list[int]] = {}
        for place, row in enumerate(rows):
            request = row.request
            alone = row if row.history is not None or row.made < request.min_tokens else None
            groups.setdefault((request.params, request.logprobs, alone), []).append(place)
        for places in groups.values():
            own = joined if len(groups) == 1 else joined[integers(places, joined.device)]
            self.choose_alike([rows[place] for place in places], own)

    def choose_alike(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Sample a token for each row from its logits, (R, V). All have the same settings."""
        request, history = rows[0].request, rows[0].history
        allowed = logits
        if rows[0].made < request.min_tokens and request.ends:
            allowed = logits.index_fill(1, integers(request.ends, logits.device), NO_CHANCE)
        tokens = sample(allowed, request.params, [row.generator for row in rows], history)  # (R,)
        if history is not None:
            history.add(tokens)
        if request.logprobs is None:
            made = [Token(token) for token in cast(list[int], tokens.tolist())]
        else:
            made = with_logprobs(logits, tokens, request.logprobs)
        for row, token in zip(rows, made, strict=True):
            self.tell(row, token)

    def tell(self, row: Row, token: Token) -> None:
        """Add a token to the text of a row, and pass it to the listener."""
        row.text.append(token.id)
        row.made += 1
        self.counts.new_tokens += 1
        goes_on = row.request.listener.on_token(token)
        if not goes_on or row.made == row.request.num_tokens:
            self.end(row)

    def end(self, row: Row, error: str = "") -> None:
        """End the text of a row, and free the row."""
        self.rows.remove(row)
        self.free.append(row.slot)
        row.request.listener.on_end(error)

    def end_all(self, error: str) -> None:
        """End all texts with an error, after which the content of the cache is unknown."""
        for row in self.rows:
            self.forget(row.slot)
            row.request.listener.on_end(error)
        self.rows.clear()


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix of two texts."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def describe(error: BaseException) -> str:
    """Why a text cannot be computed, in a line."""
    return "out of memory" if is_out_of_memory(error) else str(error).strip().partition("\n")[0]
