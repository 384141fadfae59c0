"""Speculation: compute guessed tokens along with the next one, so that one pass may give several of them.

Example: model = Speculator(model, NgramGuesses(), count=4)       then used as the model itself
A guess is what followed the last few tokens most often before. Where a pass takes the time in which the
weights are read, a few tokens more cost hardly anything, and give the logits after each of them (Leviathan et
al., 2023). As long as the tokens that are then chosen are those that were guessed, nothing more needs to be
computed. Each is chosen from the same logits as without guesses, by the same random numbers: so the text is
the same, up to rounding.

Shapes: T tokens of a pass, V vocab_size, N tokens of a text
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanogpt.config import GPTConfig
from nanogpt.model.gpt import GPT
from nanogpt.model.kv_cache import CacheStep
from nanogpt.native.step import NativeGPT

ORDERS = (8, 5, 3, 2)
"""Numbers of tokens that a guess is made from; the largest of which the tokens were seen before counts."""

MAX_LEARNED = 2_000_000
"""Tokens of a text that are learned from beforehand at most: its first ones. That takes a second."""

HASH_MULTIPLIER = 0x9E3779B97F4A7C15
"""Fibonacci hashing (Knuth, 1973)."""


class Speculator:
    """A model that computes guesses along with each token of a single text; else it is the model."""

    def __init__(self, model: GPT | NativeGPT, guesses: "NgramGuesses", count: int) -> None:
        """count: tokens to guess in a pass, at most."""
        self.model, self.guesses, self.count = model, guesses, count
        self.computed: list[tuple[int, Tensor]] = []
        """Guessed tokens that come next, with the logits after each, (1, 1, V)."""
        self.passes = 0
        """Passes of the model over one token and its guesses."""

    @property
    def config(self) -> GPTConfig:
        """The shape of the model."""
        return self.model.config

    def __call__(self, idx: Tensor, *, cache: CacheStep) -> tuple[Tensor, None]:
        """What the model returns for idx (B, T): the logits after the last token of each row, (B, 1, V)."""
        if len(cache.cache.lengths) > 1:
            logits, _ = self.model(idx, cache=cache)
            return logits, None
        if not cache.starts[0]:
            self.guesses.begin()
        self.guesses.add(new := cast(list[int], idx[0, : cache.counts[0]].tolist()))
        if len(new) > 1 or not cache.starts[0]:
            self.computed = []
            logits, _ = self.model(idx, cache=cache)
            return logits, None
        if self.computed and self.computed[0][0] == new[0]:
            return self.computed.pop(0)[1], None
        return self.look_ahead(idx, cache), None

    def look_ahead(self, idx: Tensor, step: CacheStep) -> Tensor:
        """Compute a token (1, 1) with guesses after it. Returns the logits after the token, (1, 1, V)."""
        room = step.cache.length - step.starts[0] - 1
        guessed = self.guesses.next(min(self.count, room))
        ahead = torch.tensor([guessed], dtype=idx.dtype).to(idx.device)
        idx = torch.cat((idx, ahead), dim=1)  # (1, T)
        step = step.cache.step(step.rows, idx)  # what it writes past the token is overwritten, or right
        model = self.model
        if isinstance(model, NativeGPT) and idx.numel() <= model.max_tokens:
            logits = model.compute(idx, step)  # (1, T, V)
        else:
            model = model.model if isinstance(model, NativeGPT) else model
            logits = model.logits(model.trunk(idx, cache=step))
        self.passes += 1
        after = torch.split(logits, 1, dim=1)
        self.computed = list(zip(guessed, after[1:], strict=True))
        return after[0]


class NgramGuesses:
    """Guesses what follows: what followed the last tokens most often before, in this text or another."""

    def __init__(self, text: NDArray[Any] | None = None) -> None:
        """text: tokens to learn from beforehand, (N,) integers, as those that the model was trained on."""
        learned = np.zeros(0, np.int64) if text is None else text[:MAX_LEARNED].astype(np.int64)
        self.learned = {order: most_frequent(learned, order) for order in ORDERS}
        self.begin()

    def begin(self) -> None:
        """Begin with a text of no tokens. What was learned stays."""
        self.tokens: list[int] = []
        self.seen: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)

    def add(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            for order in ORDERS:
                if len(self.tokens) >= order:
                    self.seen[tuple(self.tokens[-order:])][token] += 1
            self.tokens.append(token)

    def next(self, count: int) -> list[int]:
        """The tokens that will follow, `count` of them or fewer."""
        guesses: list[int] = []
        recent = self.tokens[-ORDERS[0] :]
        while len(guesses) < count:
            found = self.after((recent + guesses)[-ORDERS[0] :])
            if found is None:
                break
            guesses.append(found)
        return guesses

    def after(self, last: list[int]) -> int | None:
        """The token that followed these, or as many of them as were seen, most often; None: none were."""
        for order in ORDERS:
            context = tuple(last[-order:])
            if context in self.seen:
                return max(self.seen[context].items(), key=lambda item: item[1])[0]
            keys, followers = self.learned[order]
            key = context_hash(context)
            place = bisect_left(keys, key)
            if place < len(keys) and keys[place] == key:
                return int(followers[place])
        return None


def context_hash(context: Sequence[Any]) -> Any:
    """A number for tokens, or numbers for columns of tokens as arrays of uint64."""
    value: Any = np.uint64(0)
    with np.errstate(over="ignore"):
        for token in context:
            value = (value + np.uint64(1) + np.asarray(token, np.uint64)) * np.uint64(HASH_MULTIPLIER)
    return value


def most_frequent(text: NDArray[np.int64], order: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """For all runs of `order` tokens in a text: their hashes, ascending, and what follows each most often."""
    if len(text) <= order:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    unsigned = text.astype(np.uint64)
    keys = context_hash([unsigned[start : len(text) - order + start] for start in range(order)])
    followers = text[order:]
    sort = np.lexsort((followers, keys))
    keys, followers = keys[sort], followers[sort]
    new = np.ones(len(keys), bool)
    new[1:] = (keys[1:] != keys[:-1]) | (followers[1:] != followers[:-1])
    first = np.flatnonzero(new)  # of each pair of a key and a follower
    counts = np.diff(first, append=len(keys))
    keys, followers = keys[first], followers[first]
    best = np.lexsort((-counts, keys))  # the most frequent follower of a key comes first
    keys, followers = keys[best], followers[best]
    unique, place = np.unique(keys, return_index=True)
    return unique, followers[place]
