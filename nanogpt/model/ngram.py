"""N-gram embeddings: vectors for the last two and the last three tokens, looked up in tables.

Example: x = token_embedding(idx) + NgramEmbedding(config)(idx)
They give the first layer the statistics of pairs and triples at the price of a look-up. Most rows are rarely
used, so training/sparse.py updates only those that a batch touches.

Shapes: B batch, T tokens, C n_embd, V vocab_size
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.config import GPTConfig

HASH_MULTIPLIER, HASH_SHIFT = 0x9E3779B97F4A7C1, 24
"""Fibonacci hashing (Knuth, 1973): the middle bits of a product with 2^64 over the golden ratio, made odd."""

PAIR_HASH, TRIPLE_HASH = (48_271, 69_621), (39_373, 40_692)
"""Multipliers of earlier versions, on which their saved tables depend."""


class NgramEmbedding(nn.Module):
    """The sum of two vectors: for the pair and for the triple of tokens that end at a position.

    With ngram_pairs "exact", each pair has its own row if there are enough rows. Triples are hashed, and some
    share a row.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.vocab_size, rows = config.vocab_size, config.ngram_vocab
        self.exact = config.ngram_pairs == "exact"
        all_pairs = (config.vocab_size + 1) * config.vocab_size  # a pair may begin before the text
        self.pairs = nn.Embedding(min(rows, all_pairs) if self.exact else rows, config.n_embd)
        self.triples = nn.Embedding(rows, config.n_embd)
        self.pairs_fit = self.exact and all_pairs <= rows

    def forward(self, idx: Tensor, before: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, T, C). before: the two tokens before each row, (B, 2); None: idx begins a text."""
        # (B, T + 2): 0 stands for "before the text"
        ids = F.pad(idx + 1, (2, 0)) if before is None else torch.cat((before, idx), dim=1) + 1
        before_last, last, current = ids[:, :-2], ids[:, 1:-1], ids[:, 2:]  # (B, T) each
        if self.exact:
            pair = last * self.vocab_size + current - 1  # below (V + 1) V
            triple = hashed(before_last * (self.vocab_size + 1) * self.vocab_size + pair)
            pair = pair if self.pairs_fit else hashed(pair)
        else:
            pair = PAIR_HASH[0] * last + PAIR_HASH[1] * current
            triple = TRIPLE_HASH[0] * before_last + TRIPLE_HASH[1] * pair
        pairs, triples = self.pairs.num_embeddings, self.triples.num_embeddings
        return self.pairs(pair % pairs) + self.triples(triple % triples)


def hashed(key: Tensor) -> Tensor:
    """Hash int64 keys, so that their remainders by any divisor are evenly distributed."""
    return torch.bitwise_right_shift(key * HASH_MULTIPLIER, HASH_SHIFT)
