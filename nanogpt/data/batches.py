"""Tokens to batches.

Use:    data = load_dataset(Path("data"))
        sampler = BatchSampler(data.train, block_size=256, batch_size=64, seed=1)
        loader = BatchLoader(data.train, device); x, y = loader(sampler(step), 256)
The folder is opened in data/dataset.py. Does not know the model.

# B batch, T block_size, N tokens in the split, W windows in an epoch
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanogpt.data.shards import Tokens
from nanogpt.device import kind_of
from nanogpt.errors import require

RESIDENT_SHARE, RESIDENT_BYTES = 1 / 8, 4
"""Share of a GPU's free memory that a split may take, and the most that a token takes there."""

LISTED = 2**24
"""Windows in an epoch up to which their shuffled order is kept as a list; above, it is computed."""

ROUNDS, MULTIPLIER = 6, np.uint64(0x9E3779B97F4A7C15)
"""Of the Feistel network: its rounds, and an odd number that mixes bits (2^64 over the golden ratio)."""

PIECE = 2**24
"""Tokens copied to a GPU at a time."""


class BatchSampler:
    """The training batches, as a pure function of (seed, shuffle_id, step).

    An epoch cuts the tokens into W windows of T + 1 tokens (each overlaps the next by the one
    token it predicts), from an offset that changes with the epoch, and visits each window once,
    in shuffled order. There is no state: resuming at step s needs s and nothing else.

    shuffle_id: another number gives other shuffles of the same windows (trainer.py uses it to step
    around a batch that broke the training).
    """

    def __init__(self, tokens: Tokens, *, block_size: int, batch_size: int, seed: int) -> None:
        require(
            len(tokens) > block_size,
            f"--block_size {block_size} is too long for the training split of {len(tokens):,} tokens: "
            f"use at most {len(tokens) - 1}, or more text",
        )
        self.tokens, self.block_size, self.batch_size, self.seed = tokens, block_size, batch_size, seed
        # One window fewer than fit leaves room for the offset: every token gets its turn.
        self.windows = max(1, (len(tokens) - 1) // block_size - 1)
        self.offsets = len(tokens) - self.windows * block_size
        self._epoch: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every window is seen once."""
        return self.windows / self.batch_size

    def __call__(self, step: int, shuffle_id: int = 0) -> NDArray[np.int64]:
        """Where the windows of a step begin, (B,)."""
        numbers = step * self.batch_size + np.arange(self.batch_size)
        starts = np.empty(self.batch_size, dtype=np.int64)
        epochs = numbers // self.windows
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            starts[inside] = self.starts(epoch, shuffle_id, numbers[inside] % self.windows)
        return starts

    def starts(self, epoch: int, shuffle_id: int, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the windows begin that an epoch visits as its first, second, ..., by number from 0, (N,)."""
        if self.windows > LISTED:
            random = np.random.default_rng([self.seed, shuffle_id, epoch])
            return int(random.integers(self.offsets)) + self.block_size * shuffled(
                numbers, self.windows, random
            )
        if self._epoch is None or self._epoch[0] != (epoch, shuffle_id):
            random = np.random.default_rng([self.seed, shuffle_id, epoch])
            offset = int(random.integers(self.offsets))
            self._epoch = (epoch, shuffle_id), offset + self.block_size * random.permutation(self.windows)
        return self._epoch[1][numbers]


def shuffled(numbers: NDArray[np.int64], size: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Where a shuffle of 0 .. size - 1 puts these numbers, (N,), without a list of all.

    A Feistel network permutes the numbers of 2 k bits; those that leave the range go through it again
    until they are back (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
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
    """Cuts windows out of a split, on the device where they are needed.

    A split that takes no more than RESIDENT_SHARE of a GPU's free memory lives there: a batch is
    then the numbers of its windows and nothing more. Otherwise windows travel, in the background
    where the memory they leave is pinned.
    """

    def __init__(self, tokens: Tokens, device: torch.device) -> None:
        self.tokens, self.device = tokens, device
        self.resident: Tensor | None = None
        kind = kind_of(device)
        if kind.is_async and RESIDENT_BYTES * len(tokens) <= kind.free_memory(device) * RESIDENT_SHARE:
            self.make_resident()

    def make_resident(self) -> None:
        """Copy the split to the device."""
        dtype = torch.uint8 if self.tokens.dtype == np.uint8 else torch.int32
        self.resident = torch.empty(len(self.tokens), dtype=dtype, device=self.device)
        for first in range(0, len(self.tokens), PIECE):  # the host need not hold it all
            piece = self.tokens[first : first + PIECE].astype(np.int32)
            self.resident[first : first + PIECE] = torch.from_numpy(piece).to(self.device)

    def __call__(self, starts: NDArray[np.int64], length: int) -> tuple[Tensor, Tensor]:
        """Inputs tokens[s : s + length] and targets one further, for each s, (len(starts), length) int64."""
        if self.resident is None:
            places = starts[:, None] + np.arange(length + 1)  # (B, T + 1)
            windows = self.send(torch.from_numpy(self.tokens[places].astype(np.int64)))
        else:
            offsets = torch.arange(length + 1, device=self.device)
            windows = self.resident[self.send(torch.from_numpy(starts))[:, None] + offsets].long()
        return windows[:, :-1], windows[:, 1:]

    def send(self, values: Tensor) -> Tensor:
        """Contiguous values on the device.

        Only what is pinned is copied in the background: other memory may be gone by then.
        """
        kind = kind_of(self.device)
        return kind.pin_memory(values).to(self.device, non_blocking=kind.uses_pinned_memory)


def evaluation_batches(
    tokens: Tokens, *, block_size: int, batch_size: int, most: int | None = None
) -> list[tuple[NDArray[np.int64], int]]:
    """Cover a split in order, every token after the first predicted exactly once.

    Returns (starts, length) for a BatchLoader, batch by batch: full windows, then the shorter tail.
    most: keep at most this many batches, evenly spread and always the same ones.
    """
    predicted = len(tokens) - 1
    whole = predicted // block_size
    starts = np.arange(whole, dtype=np.int64) * block_size
    batches = [(starts[i : i + batch_size], block_size) for i in range(0, whole, batch_size)]
    tail = predicted - whole * block_size
    if tail:
        batches.append((np.array([whole * block_size], dtype=np.int64), tail))
    if most is not None and most < len(batches):
        batches = [batches[i * len(batches) // most] for i in range(most)]
    return batches
