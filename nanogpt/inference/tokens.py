"""Tokens with their log-probabilities, and batches whose rows can be read one after the other.

Example: for step in generate_tokens(model, prompts, num_tokens=100, logprobs=5): step[0].top ...
Log-probabilities are the model's own, those of its logits before any sampling parameter changes them.

Shapes: R rows (texts), N alternatives, V vocab_size
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from nanogpt.inference.config import SamplingParams
from nanogpt.inference.generate import DEFAULT_PARAMS, generate
from nanogpt.inference.sampling import Randomness
from nanogpt.inference.speculation import NgramGuesses
from nanogpt.machine.device import is_out_of_memory
from nanogpt.model.gpt import GPT

SHORT_MEMORY = "Too little memory for all texts at once: they are made one after the other"
"""The warning when the rows of a batch have to be computed one by one."""


@dataclass(frozen=True)
class Token:
    """A new token of a text."""

    id: int
    logprob: float | None = None
    """Natural logarithm of its probability; None if not wanted."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest ids with their log-probabilities, likeliest first."""


def generate_tokens(
    model: GPT,
    prompts: Tensor | Sequence[Tensor],
    params: SamplingParams = DEFAULT_PARAMS,
    *,
    num_tokens: int,
    generator: Randomness = None,
    logprobs: int | None = None,
    guesses: NgramGuesses | None = None,
    **changes: Any,
) -> Iterator[list[Token]]:
    """Continue prompts as `generate` does: an iterator over the R new tokens of each step.

    logprobs: give each Token its log-probability, and this many of the likeliest tokens; None: neither.
    Raises: as `generate`.
    """
    scored: list[Token] = []

    def observe(logits: Tensor, tokens: Tensor) -> None:
        """Keep the tokens of a step with their log-probabilities."""
        scored[:] = with_logprobs(logits, tokens, logprobs or 0)

    steps = generate(
        model,
        prompts,
        params,
        num_tokens=num_tokens,
        generator=generator,
        observe=None if logprobs is None else observe,
        guesses=guesses,
        **changes,
    )
    if logprobs is None:
        return ([Token(token) for token in cast(list[int], step.tolist())] for step in steps)
    return (list(scored) for _ in steps)


def with_logprobs(logits: Tensor, tokens: Tensor, count: int) -> list[Token]:
    """The chosen tokens, (R,), with their log-probabilities by logits (R, V), and the `count` likeliest."""
    logprobs = logits.float().log_softmax(dim=-1)  # (R, V)
    ids = cast(list[int], tokens.tolist())
    chosen = cast(list[float], logprobs.gather(1, tokens[:, None])[:, 0].tolist())
    return list(map(Token, ids, chosen, likeliest(logprobs, count)))


def likeliest(logprobs: Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """The `count` likeliest ids of each row of log-probabilities, (R, V), likeliest first."""
    top = logprobs.topk(min(count, logprobs.shape[-1]))  # (R, N) each
    ids, values = cast(list[list[int]], top.indices.tolist()), cast(list[list[float]], top.values.tolist())
    return [tuple(zip(*row, strict=True)) for row in zip(ids, values, strict=True)]


def generate_rows(
    model: GPT,
    prompts: Sequence[Tensor],
    params: SamplingParams,
    *,
    num_tokens: int,
    generators: Sequence[torch.Generator],
    logprobs: int | None = None,
    guesses: NgramGuesses | None = None,
    on_short_memory: Callable[[], None] = lambda: None,
    advance: Callable[[int], object] = int,
) -> list[Iterator[Token]]:
    """Continue prompts, R of (T,) int64, in one batch: an iterator over the new tokens of each row.

    A step is computed when the first row that needs it is read. If memory runs out, on_short_memory is
    called, and from then on each row is computed by itself when it is read, with the same tokens.
    generators: one for each row. advance: called with the number of tokens computed since the last call.
    Raises: as `generate`.
    """
    states = [generator.get_state() for generator in generators]

    def steps(rows: Sequence[int]) -> Iterator[list[Token]]:
        """Compute these rows together."""
        made = generate_tokens(
            model,
            [prompts[row] for row in rows],
            params,
            num_tokens=num_tokens,
            generator=[generators[row] for row in rows],
            logprobs=logprobs,
            guesses=guesses,
        )
        return counted(made, advance)

    def alone(row: int) -> Iterator[Token]:
        """Compute one row by itself, from its first token."""
        generators[row].set_state(states[row])
        return (step[0] for step in steps([row]))

    return Batch(steps(range(len(prompts))), alone, on_short_memory).rows(len(prompts))


def counted(steps: Iterator[list[Token]], advance: Callable[[int], object]) -> Iterator[list[Token]]:
    """Pass the steps on, and call `advance` with the number of tokens in each."""
    for step in steps:
        advance(len(step))
        yield step


class Batch:
    """The steps of a batch, shared by iterators over its rows."""

    def __init__(
        self,
        steps: Iterator[list[Token]],
        alone: Callable[[int], Iterator[Token]],
        on_short_memory: Callable[[], None],
    ) -> None:
        self.steps: Iterator[list[Token]] | None = steps
        """None once memory has run out."""
        self.alone, self.on_short_memory = alone, on_short_memory
        self.unread: list[deque[Token]] = []
        """For each row, the computed tokens that have not been read."""

    def rows(self, count: int) -> list[Iterator[Token]]:
        """An iterator over the tokens of each row."""
        self.unread = [deque() for _ in range(count)]
        return [self.row(number) for number in range(count)]

    def row(self, number: int) -> Iterator[Token]:
        """The tokens of a row: from the batch while it lasts, then from the row by itself."""
        unread, read = self.unread[number], 0
        while unread or self.step():
            read += 1
            yield unread.popleft()
        if self.steps is None:
            yield from islice(self.alone(number), read, None)

    def step(self) -> bool:
        """Compute a token of each row. Returns False after the last, or once memory has run out."""
        if self.steps is None:
            return False
        try:
            tokens = next(self.steps, None)
        except (RuntimeError, MemoryError) as error:
            if len(self.unread) == 1 or not is_out_of_memory(error):
                raise
            self.steps = tokens = None
            self.on_short_memory()
        for unread, token in zip(self.unread, tokens or (), strict=False):
            unread.append(token)
        return tokens is not None
