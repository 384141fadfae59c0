"""Decoding: from a model and a prompt to one token after another.

Use:    for token in generate(model, prompt_ids, num_tokens=100, temperature=0.8): ...
Each step runs the model on the last block_size tokens. Knows nothing of text or of printing.

# B batch, T tokens, V vocab_size
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanogpt.model.gpt import GPT

SMALLEST = torch.finfo(torch.float32).tiny
"""Temperatures below this are as good as this."""


@torch.no_grad()
def generate(
    model: GPT,
    idx: Tensor,
    *,
    num_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue `idx` (B, T) int64, yielding each new token (B,) as soon as it is chosen.

    generator: source of randomness, on the device of `idx`; None for the global one.
    """
    for _ in range(num_tokens):
        context = idx[:, -model.config.block_size :]  # the model sees no further back
        logits, _ = model(context)  # (B, T, V)
        token = sample(logits[:, -1], temperature, top_k, top_p, generator)  # (B,)
        yield token
        idx = torch.cat((context, token[:, None]), dim=1)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose a token by its logits: (B, V) -> (B,) int64.

    temperature: 0 takes the likeliest (the first of equals). top_k, top_p: see keep_top_k,
    keep_top_p; both may be given, top_k first.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    highest = logits.max(dim=-1, keepdim=True).values
    logits = (logits - highest) / max(temperature, SMALLEST)  # no overflow, however small it is
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Rule out all but the k likeliest tokens: their logits (B, V) become -inf."""
    kept = logits.topk(min(k, logits.shape[-1]))  # (B, k)
    return torch.full_like(logits, float("-inf")).scatter(-1, kept.indices, kept.values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Rule out all but the fewest likeliest tokens that together reach probability p.

    (B, V) -> (B, V). Nucleus sampling (Holtzman et al., 2020).
    """
    ordered, order = logits.sort(dim=-1, descending=True)  # (B, V)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the likelier tokens
    ordered = ordered.masked_fill(before >= p, float("-inf"))
    return torch.empty_like(logits).scatter(-1, order, ordered)
