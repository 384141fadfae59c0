"""KV cache: the keys and values of the tokens so far in all layers, so that only new tokens are computed.

Example: cache = KVCache(model.config, rows=1, length=256)
         step = cache.step([0], idx); logits, _ = model(idx, cache=step); cache.advance(step, idx)
A row is a text. Each row has its own length, so texts of different lengths share a batch. A model computes
the same with a cache as without one, up to rounding. Knows nothing of sampling.

Shapes: L layers, R rows of the cache, B rows of a step, T tokens of a step, K n_kv_head, S keys, D head_width
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanogpt.config import GPTConfig

BEFORE_TEXT = -1
"""Stands for a token before the beginning of a text."""

NGRAM_TOKENS = 2
"""Number of tokens before each one that n-gram tables look at."""


class KVCache:
    """Keys and values, (L, R, K, S, D) each, for `rows` texts of up to `length` tokens."""

    def __init__(self, config: GPTConfig, rows: int, length: int) -> None:
        self.config, self.length = config, length
        self.lengths = [0] * rows
        """Number of tokens in each row of the cache."""
        self.keys_values: Tensor | None = None
        """(2, L, R, K, S, D). Allocated with the first keys, in their dtype and on their device."""
        self.last_tokens: Tensor | None = None
        """The last NGRAM_TOKENS tokens of each row, (R, NGRAM_TOKENS), if the model has n-gram tables."""

    def clear(self, rows: Sequence[int]) -> None:
        """Empty these rows."""
        for row in rows:
            self.lengths[row] = 0
        if self.last_tokens is not None:
            self.last_tokens.index_fill_(0, integers(rows, self.last_tokens.device), BEFORE_TEXT)

    def copy_prefix(self, source: int, row: int, prefix: Tensor) -> None:
        """Set `row` to `prefix`, (T,) int64, the first tokens of the row `source`, without computing it."""
        assert self.keys_values is not None
        assert len(prefix) <= self.lengths[source]
        self.clear([row])
        if row != source:
            memory, length = self.keys_values, len(prefix)
            memory[:, :, row, :, :length] = memory[:, :, source, :, :length]
        self.lengths[row] = len(prefix)
        if self.last_tokens is not None:
            last = prefix[-NGRAM_TOKENS:]
            self.last_tokens[row, NGRAM_TOKENS - len(last) :] = last

    def step(self, rows: Sequence[int], idx: Tensor, counts: Sequence[int] | None = None) -> "CacheStep":
        """Prepare to compute T more tokens in each of these rows, which are all empty, or none is.

        idx: (B, T) int64. counts: how many of the T are tokens of each row, the rest being padding; None:
        all. The logits will be those after the last token of each row.
        """
        B, T = idx.shape
        starts, counts = [self.lengths[row] for row in rows], counts or [T] * B
        assert max(starts) + T <= self.length, "the cache is full"
        assert not any(starts) or all(starts), "new rows and others in one step"
        offsets, is_uniform = torch.arange(T, device=idx.device), len(set(starts)) == 1
        mask = None
        if is_uniform:
            positions = starts[0] + offsets  # (T,)
            if starts[0] and T > 1:
                mask = torch.arange(starts[0] + T, device=idx.device) <= positions[:, None]  # (T, S)
        else:
            positions = integers(starts, idx.device)[:, None] + offsets  # (B, T)
            keys = torch.arange(max(starts) + T, device=idx.device)
            mask = keys <= positions[:, None, :, None]  # (B, 1, T, S)
        is_padded = min(counts) < T
        ends = integers(counts, idx.device) - 1 if is_padded else None  # (B,)
        index = integers(rows, idx.device)  # (B,)
        before = self.before(index, idx)
        return CacheStep(self, list(rows), index, starts, list(counts), positions, mask, ends, before)

    def before(self, index: Tensor, idx: Tensor) -> Tensor | None:
        """The tokens before those of a step, (B, NGRAM_TOKENS), if the model has n-gram tables."""
        if not self.config.ngram_vocab:
            return None
        if self.last_tokens is None:
            shape = (len(self.lengths), NGRAM_TOKENS)
            self.last_tokens = torch.full(shape, BEFORE_TEXT, dtype=idx.dtype, device=idx.device)
        return self.last_tokens[index]

    def advance(self, step: "CacheStep", idx: Tensor) -> None:
        """Add the tokens of a step to the lengths, once the model has computed it."""
        for row, start, count in zip(step.rows, step.starts, step.counts, strict=True):
            self.lengths[row] = start + count
        if self.last_tokens is not None and step.before is not None:
            tokens = torch.cat((step.before, idx), dim=1)  # (B, NGRAM_TOKENS + T)
            counts = integers(step.counts, idx.device)[:, None]  # (B, 1)
            last = counts + torch.arange(NGRAM_TOKENS, device=idx.device)  # (B, NGRAM_TOKENS)
            self.last_tokens[step.index] = tokens.gather(1, last)

    def allocated(self, like: Tensor) -> Tensor:
        """The memory of the cache, (2, L, R, K, S, D), allocated for keys such as `like`, (B, K, T, D)."""
        if self.keys_values is None:
            _, K, _, D = like.shape
            shape = (2, self.config.n_layer, len(self.lengths), K, self.length, D)
            self.keys_values = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return self.keys_values

    def in_float32(self) -> Tensor:
        """The memory of the cache, (2, L, R, K, S, D), converted to float32."""
        if self.keys_values is None:
            K = self.config.n_kv_head or self.config.n_head
            self.allocated(torch.empty(0, K, 0, self.config.head_width, dtype=torch.float32, device="cpu"))
        assert self.keys_values is not None
        self.keys_values = self.keys_values.float()
        return self.keys_values


@dataclass(frozen=True)
class CacheStep:
    """Tokens that are computed together: their positions, and what they attend to."""

    cache: KVCache
    rows: list[int]
    """Rows of the cache, B of them."""
    index: Tensor
    """The same, on the device, (B,)."""
    starts: list[int]
    """Tokens of each row before this step."""
    counts: list[int]
    """Tokens of each row in this step."""
    positions: Tensor
    """(T,) or, if the rows differ, (B, T)."""
    mask: Tensor | None
    """Which keys a query attends to: see gpt.attention."""
    ends: Tensor | None
    """The index, within the step, of each row's last token, (B,); None: T - 1 for all."""
    before: Tensor | None
    """The tokens before those of the step, (B, NGRAM_TOKENS), for n-gram tables."""

    views: list[tuple[Tensor, ...]] = field(default_factory=list[tuple[Tensor, ...]])
    """For each layer, views of the memory: of the new keys and values, and of all that queries see."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's keys and values, (B, K, T, D) each. Returns those of all tokens, (B, K, S, D)."""
        memory, T = self.cache.allocated(k), k.shape[2]  # (2, L, R, K, S, D)
        is_uniform = self.positions.dim() == 1
        if is_uniform and self.has_every_row:  # the usual case: views of all layers at once
            first = self.starts[0]
            if not self.views:
                new, seen = memory[..., first : first + T, :], memory[..., : first + T, :]
                parts = [part.unbind() for half in (new, seen) for part in half.unbind()]
                self.views.extend(zip(*parts, strict=True))
            new_keys, new_values, keys, values = self.views[layer]
            new_keys.copy_(k)
            new_values.copy_(v)
            return (keys.to(k.dtype), values.to(k.dtype)) if first else (k, v)
        self.write(memory[:, layer], k, v)
        if not any(self.starts):
            return k, v
        keys, values = memory[:, layer, :, :, : max(self.starts) + T]  # (R, K, S, D)
        return keys[self.index].to(k.dtype), values[self.index].to(k.dtype)

    @property
    def has_every_row(self) -> bool:
        """Whether the step adds to all rows of the cache, in order."""
        return self.rows == list(range(len(self.cache.lengths)))

    def write(self, memory: Tensor, k: Tensor, v: Tensor) -> None:
        """Write keys and values, (B, K, T, D) each, into a layer's memory, (2, R, K, S, D)."""
        for whole, new in zip(memory, (k, v), strict=True):
            whole[self.index[:, None], :, self.positions] = new.transpose(1, 2).to(whole.dtype)

    def last(self, x: Tensor) -> Tensor:
        """Select the last token of each row: (B, T, C) -> (B, 1, C)."""
        if self.ends is None:
            return x[:, -1:]
        return x[torch.arange(len(x), device=x.device), self.ends][:, None]


def integers(values: Sequence[int], device: torch.device) -> Tensor:
    """Integers on the device, (N,) int64: created there if they are 0, 1, 2, ..., else copied."""
    if list(values) == list(range(len(values))):
        return torch.arange(len(values), device=device)
    return torch.tensor(values).to(device, non_blocking=True)
