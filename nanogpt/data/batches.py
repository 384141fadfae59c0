"""Training and evaluation batches, cut from the tokens of a split.

Example: data = load_dataset(Path("data"))
         sampler = BatchSampler(data.train, block_size=256, batch_size=64, seed=1)
         loader = BatchLoader(data.train, device); x, y = loader(sampler(step), 256)
data/dataset.py opens the folder. Knows nothing of the model.

Shapes: B batch, T block_size, N tokens in the split, W windows in an epoch
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanogpt.data.shards import MaskedTokens, Tokens
from nanogpt.errors import require
from nanogpt.machine.device import kind_of
from nanogpt.model.kernels import IGNORED

RESIDENT_SHARE, RESIDENT_BYTES = 1 / 8, 4
"""Share of a GPU's free memory that a split may take, and the maximum number of bytes per token there."""

MAX_LISTED_WINDOWS = 2**24
"""Up to this many windows in an epoch, their shuffled order is kept as a list; beyond, it is computed."""

ROUNDS, MULTIPLIER = 6, np.uint64(0x9E3779B97F4A7C15)
"""Rounds of the Feistel network, and an odd number that mixes bits (2^64 over the golden ratio)."""

TOKENS_PER_COPY = 2**24
"""Tokens to copy to a GPU at a time."""


class BatchSampler:
    """Training batches as a pure function of (seed, shuffle_id, step).

    An epoch cuts the tokens into W windows of T + 1 tokens (each overlaps the next by the one token it
    predicts), from an offset that changes with the epoch, and visits each window once, in shuffled order.
    There is no state: to resume at step s, s is enough.

    shuffle_id: a different number gives a different shuffle of the same windows. After a roll-back, the
    trainer uses one to avoid the batch that made the loss diverge.
    """

    def __init__(self, tokens: Tokens, *, block_size: int, batch_size: int, seed: int) -> None:
        require(
            len(tokens) > block_size,
            f"--block_size {block_size} is too long for the training split of {len(tokens):,} tokens: "
            f"use at most {len(tokens) - 1}, or more text",
        )
        self.tokens, self.block_size, self.batch_size, self.seed = tokens, block_size, batch_size, seed
        # One window fewer than would fit leaves room for the offset, so that every token is used.
        self.windows = max(1, (len(tokens) - 1) // block_size - 1)
        self.offsets = len(tokens) - self.windows * block_size
        self.listed: tuple[tuple[int, int], NDArray[np.int64]] | None = None
        """The latest (epoch, shuffle_id), and its starts in their shuffled order, (W,)."""

    @property
    def steps_per_epoch(self) -> float:
        """Steps in an epoch, in which every window is seen once."""
        return self.windows / self.batch_size

    def __call__(self, step: int, shuffle_id: int = 0) -> NDArray[np.int64]:
        """Start positions of the windows in the batch of a step, (B,)."""
        numbers = step * self.batch_size + np.arange(self.batch_size)
        starts = np.empty(self.batch_size, dtype=np.int64)
        epochs = numbers // self.windows
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            starts[inside] = self.starts(epoch, shuffle_id, numbers[inside] % self.windows)
        return starts

    def starts(self, epoch: int, shuffle_id: int, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Start positions of the windows at these places, (n,), in the shuffled order of an epoch, (n,)."""
        key = epoch, shuffle_id
        if self.listed is None or self.listed[0] != key:
            random = np.random.default_rng([self.seed, shuffle_id, epoch])
            offset = int(random.integers(self.offsets))
            if self.windows > MAX_LISTED_WINDOWS:
                return offset + self.block_size * shuffled_numbers(numbers, self.windows, random)
            self.listed = key, offset + self.block_size * random.permutation(self.windows)
        return self.listed[1][numbers]


def shuffled_numbers(numbers: NDArray[np.int64], size: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Where a random permutation of 0 .. size - 1 takes these numbers, (n,), without listing all of it.

    A Feistel network permutes the numbers of 2 k bits. A result outside the range goes through it again until
    it is inside (cycle walking; Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    half = np.uint64((max(2, (size - 1).bit_length()) + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    keys = random.integers(1 << 63, size=ROUNDS, dtype=np.uint64)
    result = numbers.astype(np.uint64)
    outside = np.ones(len(result), np.bool_)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for key in keys:
            mixed = (right ^ key) * MULTIPLIER
            mixed = (mixed ^ (mixed >> np.uint64(29))) * MULTIPLIER
            left, right = right, left ^ (mixed >> np.uint64(33)) & mask
        result[outside] = left << half | right
        outside = result >= size
    return result.astype(np.int64)


class BatchLoader:
    """Cuts windows out of a split and puts them on the device.

    A split that takes at most RESIDENT_SHARE of a GPU's free memory is copied there once; then a batch sends
    only its start positions. Otherwise it sends its windows, in the background if their memory is pinned.
    mask: which tokens count for the loss, (N,); None: all. Targets that do not count become IGNORED.
    """

    def __init__(self, tokens: Tokens, device: torch.device, mask: Tokens | None = None) -> None:
        self.tokens = tokens if mask is None else MaskedTokens(tokens, mask)
        self.device, self.masked = device, mask is not None
        self.resident: Tensor | None = None
        kind = kind_of(device)
        if kind.is_async and RESIDENT_BYTES * len(tokens) <= kind.free_memory(device) * RESIDENT_SHARE:
            self.make_resident()

    def make_resident(self) -> None:
        """Copy the split to the device."""
        dtype = torch.uint8 if self.tokens.dtype == np.uint8 else torch.int32
        self.resident = torch.empty(len(self.tokens), dtype=dtype, device=self.device)
        for first in range(0, len(self.tokens), TOKENS_PER_COPY):  # the host need not hold the whole split
            part = self.tokens[first : first + TOKENS_PER_COPY].astype(np.int32)
            self.resident[first : first + TOKENS_PER_COPY] = torch.from_numpy(part).to(self.device)

    def __call__(self, starts: NDArray[np.int64], length: int) -> tuple[Tensor, Tensor]:
        """Inputs tokens[s : s + length] for each start s, and targets one token on, (B, T) int64 each."""
        if self.resident is None:
            positions = starts[:, None] + np.arange(length + 1)  # (B, T + 1)
            windows = self.send(torch.from_numpy(self.tokens[positions].astype(np.int64)))
        else:
            offsets = torch.arange(length + 1, device=self.device)
            windows = self.resident[self.send(torch.from_numpy(starts))[:, None] + offsets].long()
        x, y = windows[:, :-1], windows[:, 1:]
        if self.masked:  # ~id marks a token that does not count: an input all the same, but no target
            x, y = x.maximum(~x), y.clamp(min=IGNORED)
        return x, y

    def send(self, values: Tensor) -> Tensor:
        """Send contiguous values to the device, in the background if they can be pinned.

        Other memory might be freed before the copy is done.
        """
        kind = kind_of(self.device)
        return kind.pin_memory(values).to(self.device, non_blocking=kind.uses_pinned_memory)


def evaluation_batches(
    tokens: Tokens, *, block_size: int, batch_size: int, max_batches: int | None = None
) -> list[tuple[NDArray[np.int64], int]]:
    """Evaluation batches, which cover a split in order and predict each token but the first exactly once.

    Returns (starts, length) of each batch, for a BatchLoader: full windows, then the shorter tail.
    max_batches: keep at most this many batches, evenly spread and always the same ones.
    """
    predicted = len(tokens) - 1
    whole = predicted // block_size
    starts = np.arange(whole, dtype=np.int64) * block_size
    batches = [(starts[i : i + batch_size], block_size) for i in range(0, whole, batch_size)]
    tail = predicted - whole * block_size
    if tail:
        batches.append((np.array([whole * block_size], dtype=np.int64), tail))
    if max_batches is not None and max_batches < len(batches):
        batches = [batches[i * len(batches) // max_batches] for i in range(max_batches)]
    return batches
