"""Sampling: choose the next token from the model's logits, by temperature, top-k and top-p.

Example: token = sample(logits, SamplingParams(temperature=0.8, top_k=40))
Pure functions on logits; docs/sampling.md works one example through. To add a way of sampling, write a
function that rules tokens out, and call it in `sample` if its parameter is given.

Shapes: B batch, V vocab_size
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanogpt.inference.config import SamplingParams

MIN_TEMPERATURE = torch.finfo(torch.float32).tiny
"""Lower temperatures count as this one: dividing by them would overflow. 0 itself is greedy decoding."""

NO_CHANCE = float("-inf")
"""The logit of a token that is ruled out: its probability is 0."""


Randomness = torch.Generator | Sequence[torch.Generator] | None
"""One generator, or one for each row, on the device of the logits; None: PyTorch's global one."""


def sample(logits: Tensor, params: SamplingParams, generator: Randomness = None) -> Tensor:
    """Sample a token for each row of logits: (B, V) -> (B,) int64.

    Temperature 0 is greedy decoding: the likeliest token, the first of equals.
    """
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    logits = apply_temperature(logits.float(), params.temperature)
    if params.top_k is not None:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p is not None:
        logits = keep_top_p(logits, params.top_p)
    return draw(logits.softmax(dim=-1), generator)


def draw(probabilities: Tensor, generator: Randomness) -> Tensor:
    """Draw a token for each row of probabilities: (B, V) -> (B,) int64."""
    if not isinstance(generator, Sequence):
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    rows = zip(probabilities, generator, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=own) for row, own in rows])


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits (B, V) by the temperature: below 1 makes the likeliest tokens likelier still.

    The highest logit of each row becomes 0, so that nothing overflows; softmax ignores the shift.
    """
    highest = logits.max(dim=-1, keepdim=True).values  # (B, 1)
    return (logits - highest) / max(temperature, MIN_TEMPERATURE)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Rule out all but the k likeliest tokens: their logits (B, V) become -inf."""
    kept = logits.topk(min(k, logits.shape[-1]))  # (B, k)
    return torch.full_like(logits, NO_CHANCE).scatter(-1, kept.indices, kept.values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Rule out all but the fewest likeliest tokens that together reach probability p.

    (B, V) -> (B, V). Nucleus sampling (Holtzman et al., 2020).
    """
    ordered, order = logits.sort(dim=-1, descending=True)  # (B, V)
    probabilities = ordered.softmax(dim=-1)
    likelier = probabilities.cumsum(dim=-1) - probabilities  # total probability of the likelier tokens
    ordered = ordered.masked_fill(likelier >= p, NO_CHANCE)
    return torch.empty_like(logits).scatter(-1, order, ordered)
