"""Scoring: the loss of each token of any text, the mean in bits per byte, and a comparison of two models.

Example: losses = score(model, tokenizer.encode(text), context=256, stride=64)
         print(losses.mean(), "nats a token")
evaluation.py computes the mean loss over a split during training, on several processes. Knows no files.

Shapes: N tokens of the text, B windows of a batch, T tokens of a window, C n_embd, V vocab_size, S segments
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from nanogpt.data.batches import BatchLoader
from nanogpt.data.shards import Tokens
from nanogpt.errors import require
from nanogpt.machine.device import autocast, eager_mode, kind_of
from nanogpt.model.gpt import GPT
from nanogpt.text.documents import Chunk, PromptChunk
from nanogpt.text.encoding import utf8
from nanogpt.tokenizer.base import Tokenizer
from nanogpt.units import ceil_div

TOKENS_PER_BATCH = 2**14
"""Tokens to compute at a time."""

SEGMENT_BYTES, MIN_SEGMENTS, MAX_SEGMENTS = 512, 10, 4096
"""Minimum length of a segment; segments needed for an interval; maximum number of segments of a text."""

RESAMPLES, INDICES_PER_BLOCK = 10_000, 2**22
"""Number of bootstrap resamples, and of segments drawn at a time."""


# --- tokens ---


class Window(NamedTuple):
    """A part of a text that the model sees at once, of which the last `counted` predictions count."""

    start: int
    length: int
    counted: int


def cut_windows(predictions: int, context: int, stride: int) -> Iterator[Window]:
    """Windows of `context` tokens that begin `stride` tokens apart and count each prediction once.

    All predictions of the first window count; of any other window, those that the previous one did not make.
    """
    start = done = 0
    while done < predictions:
        length = min(context, predictions - start)
        yield Window(start, length, start + length - done)
        done = start + length
        start += stride


def window_sizes(model: GPT, context: int | None, stride: int | None) -> tuple[int, int]:
    """Resolve context (None: the model's block_size) and stride (None: context). Raises: UserError."""
    most = model.config.block_size
    context = most if context is None else context
    stride = context if stride is None else stride
    require(1 <= context <= most, f"--context {context} is not between 1 and the model's block_size {most}")
    require(1 <= stride <= context, f"--stride {stride} is not between 1 and the context of {context} tokens")
    return context, stride


def score(
    model: GPT,
    ids: Tokens,
    context: int | None = None,
    stride: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    advance: Callable[[int], object] = int,
) -> NDArray[np.float64]:
    """The loss, in nats, of each token of a text but the first, (N - 1,). ids: (N,).

    A token is predicted from at most `context` tokens before it (None: the model's block_size), and from at
    least context - stride if there are that many (stride: None: context, so that windows do not overlap).
    dtype: of the matrix products. batch_size: windows in a batch, which changes no loss. advance: called with
    the number of tokens scored since the last call.
    Raises: UserError if stride > context or context > block_size.
    """
    context, stride = window_sizes(model, context, stride)
    device = next(model.parameters()).device
    load, losses = BatchLoader(ids, device), [torch.zeros(0)]
    was_training = model.training
    model.eval()
    with torch.no_grad(), eager_mode(), autocast(device, dtype):
        windows = cut_windows(len(ids) - 1, context, stride)
        for batch in batches_of(windows, batch_size or max(1, TOKENS_PER_BATCH // context)):
            starts = np.array([window.start for window in batch])
            x, y = load(starts, batch[0].length)  # (B, T) each
            losses.append(token_losses(model, x, y[:, -batch[0].counted :]).cpu())
            advance(len(losses[-1]))
    model.train(was_training)
    return torch.cat(losses).double().numpy()


def batches_of(windows: Iterable[Window], batch_size: int) -> Iterator[list[Window]]:
    """Group windows, in order, into batches of equal `length` and `counted`."""
    for _, group in groupby(windows, lambda window: window[1:]):
        same = list(group)
        for first in range(0, len(same), batch_size):
            yield same[first : first + batch_size]


def token_losses(model: GPT, idx: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target in nats, (B n,) float32. idx: (B, T). targets: (B, n), of the last n.

    Logits are computed for a part at a time: with a large vocabulary they take more memory than all else.
    """
    x = model.trunk(idx)[:, -targets.shape[1] :].flatten(0, 1)  # (B n, C)
    wanted = targets.flatten()  # (B n,)
    size = max(1, kind_of(x.device).logits_per_chunk // model.config.vocab_size)
    losses: list[Tensor] = []
    for first in range(0, len(x), size):
        logits = model.logits(x[first : first + size]).float()  # (size, V)
        losses.append(F.cross_entropy(logits, wanted[first : first + size], reduction="none"))
    return torch.cat(losses)


# --- text ---


class EncodedText(NamedTuple):
    """The tokens of a text. ids: (N,). sizes: bytes of text in each, (N,), which add up to those of the text.

    mask: (N,), which of them count for the loss: with pairs, those of completions. The others have size 0.
    """

    ids: NDArray[np.integer[Any]]
    sizes: NDArray[np.int64]
    mask: NDArray[np.bool_]


def encode_documents(tokenizer: Tokenizer, chunks: Iterable[Chunk]) -> EncodedText:
    """Encode documents as the `data` command does: each ends with the end-of-text token, if there is one.

    Raises: UserError naming characters that have no id.
    """
    ids, sizes = [np.zeros(0, tokenizer.dtype)], [np.zeros(0, np.int64)]
    masks, lengths = [np.zeros(0, np.bool_)], token_lengths(tokenizer)
    for chunk in chunks:
        before = len(ids)
        ids.append(tokenizer.encode_batch([chunk.raw])[0])
        sizes.append(token_sizes(lengths, ids[-1], len(chunk.raw)) * chunk.counts)
        if chunk.ends and tokenizer.end_of_text is not None:
            ids.append(np.array([tokenizer.end_of_text], tokenizer.dtype))
            sizes.append(np.zeros(1, np.int64))
        masks.append(np.full(sum(map(len, ids[before:])), chunk.counts))
    return EncodedText(np.concatenate(ids), np.concatenate(sizes), np.concatenate(masks))


def token_lengths(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Bytes of text in each token of the vocabulary, (V,): 0 for the one that ends a document."""
    lengths = np.array([len(token) for token in tokenizer.tokens], np.int64)
    if tokenizer.end_of_text is not None:
        lengths[tokenizer.end_of_text] = 0
    return lengths


def token_sizes(
    lengths: NDArray[np.int64], ids: NDArray[np.integer[Any]], total: int | None
) -> NDArray[np.int64]:
    """Bytes of text in each token, (N,). lengths: (V,). total: bytes of the text; None: unknown.

    If the tokenizer changes the text, the lengths do not add up to the total: then the last token has it all.
    """
    sizes = lengths[ids]
    if total is not None and sizes.sum() != total:
        sizes = np.zeros(len(ids), np.int64)
        sizes[-1:] = total
    return sizes


def decode_documents(tokenizer: Tokenizer, text: EncodedText) -> list[Chunk]:
    """Inverse of encode_documents: the documents in the tokens of a split. The last one may be cut off."""
    documents: list[Chunk] = []
    end = -1 if tokenizer.end_of_text is None else tokenizer.end_of_text
    borders = np.flatnonzero((text.ids[:-1] == end) | (text.mask[:-1] != text.mask[1:])) + 1
    for part, mask in zip(np.split(text.ids, borders), np.split(text.mask, borders), strict=True):
        ended = len(part) > 0 and int(part[-1]) == end
        decoded = tokenizer.decode(part[: len(part) - ended].tolist())
        if ended or decoded:
            kind = Chunk if mask[0] else PromptChunk
            documents.append(kind(utf8(decoded), ended))
    return documents


def leave_out_unknown(
    chunks: Iterable[Chunk], tokenizers: Sequence[Tokenizer]
) -> tuple[list[Chunk], Counter[str]]:
    """Leave out characters that any of the tokenizers does not know, and count each of them."""
    kept: list[Chunk] = []
    counts: Counter[str] = Counter()
    for chunk in chunks:
        text = chunk.raw.decode()
        unknown = {char for tokenizer in tokenizers for char in tokenizer.unknown_characters(text)}
        counts.update({char: text.count(char) for char in unknown})
        without = text.translate(dict.fromkeys(map(ord, unknown))).encode() if unknown else chunk.raw
        kept.append(chunk._replace(raw=without))
    return kept, counts


# --- results ---


@dataclass(frozen=True)
class Score:
    """The losses of a model on a text.

    losses: of each token but the first, in nats, (N - 1,). sizes: bytes of text in each token, (N,).
    context, stride: of the windows. mask: which tokens count, (N,); None: all. The others have loss 0 and
    size 0.
    """

    losses: NDArray[np.float64]
    sizes: NDArray[np.int64]
    context: int
    stride: int
    mask: NDArray[np.bool_] | None = field(default=None, kw_only=True)

    @classmethod
    def of(cls, text: EncodedText, losses: NDArray[np.float64], context: int, stride: int) -> "Score":
        """The score of a text, from the losses of all its tokens but the first."""
        return cls(np.where(text.mask[1:], losses, 0.0), text.sizes, context, stride, mask=text.mask)

    @property
    def count(self) -> int:
        """Number of predictions that count."""
        return len(self.losses) if self.mask is None else int(self.mask[1:].sum())

    @property
    def loss(self) -> float:
        """Mean loss, in nats a token."""
        return math.fsum(self.losses) / self.count

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.loss))

    @property
    def bytes(self) -> int:
        """Bytes of UTF-8 in the predicted tokens: all but the first."""
        return int(self.sizes[1:].sum())

    @property
    def bits_per_byte(self) -> float:
        """Mean loss in bits per byte: the one unit in which different tokenizers can be compared."""
        return math.fsum(self.losses) / math.log(2) / self.bytes

    @property
    def positions(self) -> NDArray[np.int64]:
        """The number of tokens that each token was predicted from, (N - 1,): 1 .. context."""
        windows = cut_windows(len(self.losses), self.context, self.stride)
        return np.concatenate([np.arange(w.length - w.counted, w.length) for w in windows]) + 1

    def loss_by_position(self) -> NDArray[np.float64]:
        """Mean loss of tokens predicted from 1, 2, ... tokens, (context,), in nats; NaN if there are none."""
        sums, counts = self.sums_and_counts(self.positions - 1, self.context)
        return np.divide(sums, counts, where=counts > 0, out=np.full(self.context, np.nan))

    def loss_by_octave(self) -> dict[tuple[int, int], float]:
        """Mean loss of the tokens predicted from 1, 2, 3-4, 5-8, ... tokens, by first and last of these."""
        octaves = np.frexp(self.positions - 1)[1].astype(np.int64)  # log2 of the position, rounded up
        sums, counts = self.sums_and_counts(octaves)
        return {
            (2**k // 2 + 1, min(2**k, self.context)): float(sums[k] / counts[k])
            for k in range(len(counts))
            if counts[k]
        }

    def sums_and_counts(
        self, groups: NDArray[np.int64], least: int = 0
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Sum of the losses in each group, and their number. groups: of each token, (N - 1,)."""
        sums = np.bincount(groups, self.losses, least).astype(np.float64)  # of no losses: integers
        counted = None if self.mask is None else self.mask[1:]
        return sums, np.bincount(groups, counted, least).astype(np.int64)


@dataclass(frozen=True)
class Difference:
    """How much worse A is than B, in bits per byte, with a 95 % interval (NaN with too few segments)."""

    mean: float
    low: float
    high: float
    segments: int

    @property
    def is_told(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def compare(a: Score, b: Score, seed: int = 0) -> Difference:
    """The difference of two models on the same text, paired by segments (see common_segments)."""
    with np.errstate(invalid="ignore"):  # a loss may be infinite
        nats_a, nats_b, sizes = common_segments(a, b)
        bits = (nats_a - nats_b) / math.log(2)
    mean = float(bits.sum() / sizes.sum()) if len(sizes) else math.nan
    return Difference(mean, *interval(bits, sizes, seed), len(sizes))


def interval_of(score: Score, seed: int = 0) -> tuple[float, float, int]:
    """The 95 % interval of the bits per byte over the passages of a text: low, high, number of segments."""
    with np.errstate(invalid="ignore"):  # a loss may be infinite
        nats, _, sizes = common_segments(score, score)
        return *interval(nats / math.log(2), sizes, seed), len(sizes)


def interval(bits: NDArray[np.float64], sizes: NDArray[np.int64], seed: int) -> tuple[float, float]:
    """The 2.5th and the 97.5th percentile of sum(bits) / sum(sizes) of segments; NaN if there are too few."""
    if len(sizes) < MIN_SEGMENTS:
        return math.nan, math.nan
    low, high = np.percentile(bootstrap(bits, sizes, seed=seed), [2.5, 97.5]).tolist()
    return low, high


def common_segments(a: Score, b: Score) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Cut a text where a token ends for both models. Returns nats of A, nats of B, and bytes, (S,) each.

    A segment ends at the first such place after SEGMENT_BYTES (more for a long text: see MAX_SEGMENTS). The
    segments cover everything that both predict, except for the beginning up to the first such place.
    """
    ends_a, ends_b = np.cumsum(a.sizes), np.cumsum(b.sizes)  # (N,) each
    cuts = np.intersect1d(ends_a, ends_b)
    cuts = cuts[cuts >= max(ends_a[0], ends_b[0])]
    if not len(cuts):
        return np.zeros(0), np.zeros(0), np.zeros(0, np.int64)
    length = max(SEGMENT_BYTES, ceil_div(int(cuts[-1] - cuts[0]), MAX_SEGMENTS))
    multiples = np.arange(int(cuts[0]), int(cuts[-1]), length)
    cuts = np.union1d(cuts[np.searchsorted(cuts, multiples)], cuts[-1:])  # (S + 1,)
    nats: list[NDArray[np.float64]] = []
    for losses, ends in ((a.losses, ends_a), (b.losses, ends_b)):
        total = np.append(0, np.cumsum(losses))  # of the tokens so far, (N,)
        nats.append(np.diff(total[np.searchsorted(ends, cuts, side="right") - 1]))
    return nats[0], nats[1], np.diff(cuts)


def bootstrap(
    values: NDArray[np.float64], sizes: NDArray[np.int64], *, seed: int = 0, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """sum(values) / sum(sizes) of segments drawn with replacement, (resamples,) (Efron, 1979)."""
    random, count = np.random.default_rng(seed), len(values)
    ratios: list[NDArray[np.float64]] = []
    block = max(1, INDICES_PER_BLOCK // count)
    for first in range(0, resamples, block):
        drawn = random.integers(count, size=(min(block, resamples - first), count))
        ratios.append(values[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(ratios)
