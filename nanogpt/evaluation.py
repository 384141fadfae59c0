"""Evaluation of a model in training: its mean loss over a split, and a short sample of its text.

Example: windows = evaluation_windows(data.val, block_size=256, batch_size=64)
         loss = evaluate(model, BatchLoader(data.val, device), windows, dtype=torch.float32)
scoring.py measures any text, token by token. Knows nothing of the training loop.

Shapes: B micro-batch, T tokens of a window
"""

import math
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanogpt.data.batches import BatchLoader, evaluation_batches
from nanogpt.data.dataset import Dataset
from nanogpt.data.shards import Tokens
from nanogpt.distributed.parallelize import unsharded
from nanogpt.distributed.world import ALONE, World
from nanogpt.errors import require
from nanogpt.inference.generate import generate
from nanogpt.machine.device import autocast, eager_mode, kind_of
from nanogpt.model.gpt import GPT
from nanogpt.model.kernels import IGNORED

SAMPLE_TOKENS = 120
"""Length of a sample, in tokens."""

Windows = tuple[NDArray[np.int64], int]
"""A micro-batch of windows: the positions of their first tokens, (B,), and their length T."""


def evaluation_windows(
    tokens: Tokens, *, block_size: int, batch_size: int, micro_batch: int = 0, max_batches: int | None = None
) -> list[Windows]:
    """Cut a split into micro-batches of windows without overlap, in order.

    micro_batch: windows in a micro-batch; 0: batch_size.
    max_batches: maximum number of batches, which are then evenly spread and always the same; None: all.
    """
    batches = evaluation_batches(
        tokens, block_size=block_size, batch_size=batch_size, max_batches=max_batches
    )
    size = micro_batch or batch_size
    return [
        (starts[first : first + size], length)
        for starts, length in batches
        for first in range(0, len(starts), size)
    ]


def evaluate(
    model: GPT,
    load: BatchLoader,
    windows: Sequence[Windows],
    *,
    dtype: torch.dtype,
    world: World = ALONE,
    advance: Callable[[], object] = lambda: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> float | None:
    """The mean loss over the targets that count, in nats per token, computed by all processes together.

    dtype: of the matrix products. advance: called after each micro-batch of this process.
    interrupted: called after `advance`; if it returns True on any process, all processes return None.
    """
    losses: list[Tensor] = []  # on the device, for which the CPU waits only at the end
    counts: list[Tensor] = []
    was_training, stopped = model.training, False
    model.eval()
    with torch.no_grad(), eager_mode():
        for first in range(0, len(windows), world.size):
            index = first + world.rank
            # A process without a micro-batch repeats the last one: with FSDP all processes must take part.
            x, y = load(*windows[min(index, len(windows) - 1)])
            with autocast(load.device, dtype):
                loss = model.loss(x, y)
            if index < len(windows):
                counts.append((y != IGNORED).sum())
                losses.append(loss * counts[-1])
            advance()
            stopped = bool(world.max_over_ranks(interrupted())[0])
            if stopped:
                break
    model.train(was_training)
    if stopped:
        return None
    sums = cast(list[float], torch.stack(losses).tolist() if losses else [])
    tokens = sum(world.all_gather(cast(list[int], torch.stack(counts).tolist() if counts else [])))
    require(tokens > 0, "no token of the validation batches counts for the loss: give more --eval_iters")
    # fsum is exact: any number of processes gives the same result.
    return math.fsum(world.all_gather(sums)) / tokens


def sample_text(
    model: GPT,
    dataset: Dataset,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    *,
    num_tokens: int = SAMPLE_TOKENS,
) -> str:
    """Sample a short continuation of the validation split's first token.

    With pairs of prompt and completion: the split's first prompt, and a completion of it.
    """
    generator = kind_of(device).generator(device, seed)
    given = dataset.val[: dataset.first_prompt].astype(np.int64)
    prompt = torch.from_numpy(given[None]).to(device)  # (1, T)
    was_training = model.training
    model.eval()
    with unsharded(model), eager_mode(), autocast(device, dtype):
        tokens = generate(model, prompt, num_tokens=num_tokens, temperature=0.8, generator=generator)
        ids = [int(token) for token in tokens]
    model.train(was_training)
    if dataset.val_mask is None:
        return dataset.tokenizer.decode(ids)
    return dataset.tokenizer.decode([*given.tolist(), *takewhile(dataset.tokenizer.end_of_text.__ne__, ids)])
