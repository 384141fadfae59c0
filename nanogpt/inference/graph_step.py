"""Graph step: one token for each text, captured once as a CUDA graph and replayed as one launch for each.

Example: model = GraphGPT(model, graphs)           then used as the model itself
The kernels of a token are shorter than the time in which the CPU launches them. So that always the same ones
run on the same memory, the places of the tokens are numbers on the device, and each attends to the whole
memory of the cache, masked behind its own place: the same numbers, up to rounding.

Shapes: R rows of the cache, V vocab_size, S length of the cache, K n_kv_head, D head_dim
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanogpt.config import GPTConfig
from nanogpt.graphs import Graphs
from nanogpt.model.gpt import GPT
from nanogpt.model.kv_cache import CacheStep, KVCache

WARM_UP_TOKENS = 8
"""Tokens before the capture, which takes as long as some of them: short texts do without."""


class FixedStep(CacheStep):
    """A step of one token in every row, whose places are known on the device alone."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's keys and values, (R, K, 1, D) each. Returns the memory of all, (R, K, S, D)."""
        keys, values = self.cache.allocated(k)[:, layer].unbind()  # (R, K, S, D) each
        place = self.positions[:, None, :, None].expand_as(k)  # (R, K, 1, D)
        keys.scatter_(2, place, k)
        values.scatter_(2, place, v)
        return keys, values


@dataclass(frozen=True)
class Captured:
    """A graph with the memory that it reads and writes."""

    cache: KVCache
    idx: Tensor
    """(R, 1)."""
    positions: Tensor
    """(R, 1)."""
    before: Tensor | None
    """(R, NGRAM_TOKENS)."""
    replay: Callable[[], None]
    logits: Tensor
    """(R, 1, V)."""


class GraphGPT:
    """A GPT of which steps of one token in every row are replayed as a graph, all others computed."""

    def __init__(self, model: GPT, graphs: Graphs) -> None:
        self.model, self.graphs = model, graphs
        self.warm_up_left = WARM_UP_TOKENS
        self.captured: Captured | None = None
        self.possible = True

    @property
    def config(self) -> GPTConfig:
        """The shape of the model."""
        return self.model.config

    def __call__(self, idx: Tensor, *, cache: CacheStep) -> tuple[Tensor, None]:
        """What the model returns for idx (B, T): the logits after the last token of each row, (B, 1, V)."""
        every_row = cache.rows == list(range(len(cache.cache.lengths)))
        if not self.possible or not every_row or idx.shape[1] > 1 or not cache.starts[0]:
            return self.model(idx, cache=cache)
        if self.warm_up_left:
            self.warm_up_left -= 1
            return self.model(idx, cache=cache)
        if self.captured is None:
            try:
                self.captured = self.capture(idx, cache)
            except RuntimeError:  # a part of the model waits for the device
                self.possible = False
                return self.model(idx, cache=cache)
        captured = self.captured
        captured.idx.copy_(idx)
        captured.positions.copy_(cache.positions.expand_as(idx))
        if captured.before is not None and cache.before is not None:
            captured.before.copy_(cache.before)
        captured.replay()
        return captured.logits.clone(), None

    def capture(self, idx: Tensor, step: CacheStep) -> Captured:
        """Capture a step. Raises: RuntimeError if a part of it cannot be captured."""
        idx, positions = idx.clone(), step.positions.expand_as(idx).clone()
        before = None if step.before is None else step.before.clone()
        keys = torch.arange(step.cache.length, device=idx.device)

        def work() -> Tensor:
            """The logits of the tokens that are in idx, at the places in positions."""
            mask = keys <= positions[:, None, :, None]  # (R, 1, 1, S)
            fixed = FixedStep(
                step.cache, step.rows, step.index, step.starts, step.counts, positions, mask, None, before
            )
            return self.model(idx, cache=fixed)[0]

        torch.clear_autocast_cache()  # what is cast now belongs to the graph
        self.graphs.warm_up(work)
        torch.clear_autocast_cache()
        replay, logits = self.graphs.capture(work)
        torch.clear_autocast_cache()
        return Captured(step.cache, idx, positions, before, replay, logits)
