"""Decoding steps as a CUDA graph: one token for each text, captured once and replayed as one launch.

Example: model = GraphGPT(model, graphs)           then used like the model itself
The kernels of a token take less time than the CPU needs to launch them. A graph launches the same kernels on
the same memory every time. So the rows of the texts and the positions of their tokens are tensors on the
device, and each token attends to the whole memory of its row, masked after its own position: the same result,
up to rounding. There is a graph for each number of texts or, if they are only some rows of the cache
(continuous batching), for the next power of two: the last text is then computed several times.

Shapes: B rows of a step, R rows of the cache, V vocab_size, S length of the cache, K n_kv_head, D head_width
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanogpt.config import GPTConfig
from nanogpt.machine.graphs import Graphs
from nanogpt.model.gpt import GPT
from nanogpt.model.kv_cache import CacheStep

WARM_UP_TOKENS = 8
"""Tokens before a capture, which takes as long as several of them: short texts are not worth it."""


class FixedStep(CacheStep):
    """A step of one token in each of its rows. The rows and positions are known only on the device."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's keys and values, (B, K, 1, D) each. Returns all of these rows, (B, K, S, D)."""
        memory = self.cache.allocated(k)[:, layer]  # (2, R, K, S, D)
        self.write(memory, k, v)
        keys, values = memory if self.has_every_row else memory[:, self.index]
        return keys, values


@dataclass(frozen=True)
class Captured:
    """A graph with the memory that it reads and writes."""

    step: FixedStep
    """Its index (B,), positions (B, 1) and, with n-gram tables, before (B, NGRAM_TOKENS) are read anew."""
    idx: Tensor
    """(B, 1)."""
    replay: Callable[[], None]
    logits: Tensor
    """(B, 1, V)."""

    def __call__(self, idx: Tensor, step: CacheStep) -> Tensor:
        """The logits after the tokens idx, (B, 1), of which there may be fewer here: (B, 1, V)."""
        write(self.idx, idx)
        write(self.step.index, step.index)
        write(self.step.positions, step.positions.expand_as(idx))
        if self.step.before is not None and step.before is not None:
            write(self.step.before, step.before)
        self.replay()
        return self.logits[: len(idx)].clone()


class GraphGPT:
    """A GPT that replays steps of one token as a graph and computes others as usual. Serves one cache."""

    def __init__(self, model: GPT, graphs: Graphs) -> None:
        self.model, self.graphs = model, graphs
        self.captured: dict[tuple[int, bool], Captured] = {}
        """For each number of rows, and whether they are all that the cache has."""
        self.steps_of: Counter[tuple[int, bool]] = Counter()
        """Steps so far, by the same key."""
        self.possible = True

    @property
    def config(self) -> GPTConfig:
        """The shape of the model."""
        return self.model.config

    def __call__(self, idx: Tensor, *, cache: CacheStep) -> tuple[Tensor, None]:
        """What the model returns for idx (B, T): the logits after the last token of each row, (B, 1, V)."""
        if not self.possible or idx.shape[1] > 1 or not cache.starts[0]:
            return self.model(idx, cache=cache)
        every = cache.has_every_row
        rows = len(idx) if every else 1 << (len(idx) - 1).bit_length()  # the next power of two
        self.steps_of[rows, every] += 1
        if self.steps_of[rows, every] <= WARM_UP_TOKENS:
            return self.model(idx, cache=cache)
        if (rows, every) not in self.captured:
            try:
                self.captured[rows, every] = self.capture(rows, idx, cache)
            except RuntimeError:  # a part of the model waits for the device
                self.possible = False
                return self.model(idx, cache=cache)
        return self.captured[rows, every](idx, cache), None

    def capture(self, rows: int, idx: Tensor, step: CacheStep) -> Captured:
        """Capture a step of this many rows. Raises: RuntimeError if a part of it cannot be captured."""
        tokens, index, positions = (
            repeat_last(x, rows) for x in (idx, step.index, step.positions.expand_as(idx))
        )
        before = None if step.before is None else repeat_last(step.before, rows)

        def fixed(mask: Tensor | None) -> FixedStep:
            """The step, on memory of its own."""
            return FixedStep(
                step.cache, step.rows, index, step.starts, step.counts, positions, mask, None, before
            )

        def work() -> Tensor:
            """The logits of the tokens, at the places in positions."""
            keys = torch.arange(step.cache.length, device=idx.device)  # in memory that the graph keeps
            mask = keys <= positions[:, None, :, None]  # (B, 1, 1, S)
            return self.model(tokens, cache=fixed(mask))[0]

        torch.clear_autocast_cache()  # what is cast now belongs to the graph
        self.graphs.warm_up(work)
        torch.clear_autocast_cache()
        replay, logits = self.graphs.capture(work)
        torch.clear_autocast_cache()
        return Captured(fixed(None), tokens, replay, logits)


def repeat_last(x: Tensor, rows: int) -> Tensor:
    """A copy of x, (B, ...), extended to this many rows by repeating the last one."""
    return torch.cat((x, x[-1:].expand(rows - len(x), *x.shape[1:])))


def write(memory: Tensor, x: Tensor) -> None:
    """Write x, (B, ...), into memory that may have more rows: they get the last one, as in `repeat_last`."""
    memory[: len(x)] = x
    if len(x) < len(memory):
        memory[len(x) :] = x[-1]
