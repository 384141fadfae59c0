"""Tokens with their log-probabilities, and a batch whose rows are read one after the other.

Example: for step in generate_tokens(model, prompts, num_tokens=100, logprobs=5): step[0].top ...
Log-probabilities are the model's own: of the softmax of its logits, before a sampling parameter changes them.

Shapes: R rows (texts), N alternatives, V vocab_size
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from nanogpt.device import is_out_of_memory
from nanogpt.inference.config import SamplingParams
from nanogpt.inference.generate import DEFAULT_PARAMS, generate
from nanogpt.inference.sampling import Randomness
from nanogpt.inference.speculation import NgramGuesses
from nanogpt.model.gpt import GPT

SHORT_MEMORY = "Too little memory for all texts at once: they are made one after the other"
"""What to say when the rows of a batch have to be computed alone."""


@dataclass(frozen=True)
class Token:
    """A new token of a text."""

    id: int
    logprob: float | None = None
    """Natural logarithm of its probability; None if it was not asked for."""
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
    """Continue prompts as `generate` does: an iterator over the new tokens, R of them at each step.

    logprobs: how many of the likeliest tokens each Token names besides its own log-probability; None: it has
    neither. Raises: as `generate`.
    """
    scored: list[Token] = []

    def observe(logits: Tensor, tokens: Tensor) -> None:
        """Score the tokens of a step."""
        scored[:] = score(logits, tokens, logprobs or 0)

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


def score(logits: Tensor, tokens: Tensor, count: int) -> list[Token]:
    """The chosen tokens, (R,), with the log-probabilities of logits, (R, V), and the `count` highest."""
    logprobs = logits.float().log_softmax(dim=-1)  # (R, V)
    ids = cast(list[int], tokens.tolist())
    chosen = cast(list[float], logprobs.gather(1, tokens[:, None])[:, 0].tolist())
    return list(map(Token, ids, chosen, likeliest(logprobs, count)))


def likeliest(logprobs: Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """The `count` ids with the highest log-probabilities, (R, V), of each row, likeliest first."""
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

    A step is computed when a row is read that needs it. If memory runs out in it, on_short_memory is called,
    and each row is computed on its own when it is read; its tokens are those that it would have had.
    generators: one for each row. advance: called with the number of tokens computed since the last call.
    Raises: as `generate`.
    """
    states = [generator.get_state() for generator in generators]

    def steps(rows: Sequence[int]) -> Iterator[list[Token]]:
        """The steps of a batch of some rows."""
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
        """The tokens of one row, from the first."""
        generators[row].set_state(states[row])
        return (step[0] for step in steps([row]))

    return Batch(steps(range(len(prompts))), alone, on_short_memory).rows(len(prompts))


def counted(steps: Iterator[list[Token]], advance: Callable[[int], object]) -> Iterator[list[Token]]:
    """The same steps; `advance` is called with the number of tokens of each."""
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
        """The tokens that the steps have made and a row has not read yet, for each row."""

    def rows(self, count: int) -> list[Iterator[Token]]:
        """An iterator over the tokens of each row."""
        self.unread = [deque() for _ in range(count)]
        return [self.row(number) for number in range(count)]

    def row(self, number: int) -> Iterator[Token]:
        """The tokens of a row: of the batch as long as it lasts, then of the row alone."""
        unread, read = self.unread[number], 0
        while unread or self.step():
            read += 1
            yield unread.popleft()
        if self.steps is None:
            yield from islice(self.alone(number), read, None)

    def step(self) -> bool:
        """Compute a token of each row. Returns False after the last, or if memory has run out."""
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
