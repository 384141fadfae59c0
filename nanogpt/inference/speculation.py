"""Speculative decoding (Leviathan et al., 2023) with drafts from n-grams instead of a second model.

Example: model = Speculator(model, NgramGuesses(), count=4)       then used like the model itself
The guess for the next token is the one that most often followed the last few tokens before. Where a pass
takes as long as reading the weights from memory, a few more tokens cost hardly anything, and each gives the
logits after it. While the sampled tokens are those that were guessed, nothing more is computed. Each is
sampled from the same logits with the same random numbers as without guesses, so the text is the same, up to
rounding.

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
"""Lengths of the contexts that a guess is made from: the longest one that was seen before decides."""

MAX_LEARNED = 2_000_000
"""At most this many tokens, the first ones of a text, are learned from beforehand, which takes a second."""

HASH_MULTIPLIER = 0x9E3779B97F4A7C15
"""Fibonacci hashing (Knuth, 1973)."""


class Speculator:
    """A model that computes guesses along with each token of a single text; a batch goes without."""

    def __init__(self, model: GPT | NativeGPT, guesses: "NgramGuesses", count: int) -> None:
        """count: maximum number of tokens to guess in a pass."""
        self.model, self.guesses, self.count = model, guesses, count
        self.computed: list[tuple[int, Tensor]] = []
        """The guesses for the next tokens, each with the logits after it, (1, 1, V)."""
        self.passes = 0
        """Number of passes of the model over a token and its guesses."""

    @property
    def config(self) -> GPTConfig:
        """The shape of the model."""
        return self.model.config

    def __call__(self, idx: Tensor, *, cache: CacheStep) -> tuple[Tensor, None]:
        """As the model, for idx (B, T): the logits after the last token of each row, (B, 1, V)."""
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
        step = step.cache.step(step.rows, idx)  # what a wrong guess leaves in the cache is overwritten
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
    """Guesses the next tokens: those that most often followed the last ones, in this text or another one."""

    def __init__(self, text: NDArray[Any] | None = None) -> None:
        """text: tokens to learn from beforehand, (N,) integers, such as those of the model's training."""
        learned = np.zeros(0, np.int64) if text is None else text[:MAX_LEARNED].astype(np.int64)
        self.learned = {order: most_frequent(learned, order) for order in ORDERS}
        self.begin()

    def begin(self) -> None:
        """Begin a new, empty text. What was learned stays."""
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
        """Guess the next tokens, at most `count`."""
        guesses: list[int] = []
        recent = self.tokens[-ORDERS[0] :]
        while len(guesses) < count:
            found = self.after((recent + guesses)[-ORDERS[0] :])
            if found is None:
                break
            guesses.append(found)
        return guesses

    def after(self, last: list[int]) -> int | None:
        """The token that most often followed the longest known end of these; None if no end is known."""
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
    """Hash some tokens or, given arrays of uint64, each column of tokens."""
    value: Any = np.uint64(0)
    with np.errstate(over="ignore"):
        for token in context:
            value = (value + np.uint64(1) + np.asarray(token, np.uint64)) * np.uint64(HASH_MULTIPLIER)
    return value


def most_frequent(text: NDArray[np.int64], order: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The hashes of all n-grams of `order` tokens in a text, ascending, and what most often follows each."""
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
