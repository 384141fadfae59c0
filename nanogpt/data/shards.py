"""Token files that are read like one array: the shards of a split, and a split with its mask.

Example: tokens = Shards(parts); tokens[100:200]; tokens[np.array([[3, 4], [7, 8]])]
Only the selected tokens are copied: the parts may be memory maps of files larger than memory.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Shards:
    """Arrays of one type, concatenated, (N,). The index is an int, a slice or an array of ints."""

    def __init__(self, parts: Sequence[NDArray[Any]]) -> None:
        self.parts: list[NDArray[Any]] = list(parts)
        self.ends = np.cumsum([len(part) for part in parts])  # (S,)
        self.dtype: np.dtype[Any] = parts[0].dtype

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int | slice | NDArray[np.int64]) -> NDArray[Any]:
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            index = np.arange(start, stop)
        positions = np.asarray(index, np.int64)
        positions = np.where(positions < 0, positions + len(self), positions)
        shards = np.searchsorted(self.ends, positions, side="right")
        tokens = np.empty(positions.shape, self.dtype)
        for shard in map(int, np.unique(shards)):
            here = shards == shard
            part: NDArray[Any] = self.parts[shard]
            tokens[here] = part[positions[here] - (self.ends[shard] - len(part))]
        return tokens


Tokens = NDArray[Any] | Shards
"""The tokens of a split, (N,)."""


class MaskedTokens:
    """Tokens whose sign is their mask, (N,) int64: an id, or ~id (negative) if it does not count.

    tokens: (N,) ids. mask: (N,), 1 where a token counts for the loss, else 0.
    """

    dtype: np.dtype[Any] = np.dtype(np.int64)

    def __init__(self, tokens: Tokens, mask: Tokens) -> None:
        self.tokens, self.mask = tokens, mask

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int | slice | NDArray[np.int64]) -> NDArray[np.int64]:
        ids = self.tokens[index].astype(np.int64)
        return np.where(self.mask[index], ids, ~ids)
