"""Logit processors: what each sampling parameter does to the logits of the next token, in one fixed order.

Example: logits = process(logits, SamplingParams(temperature=0.8, min_p=0.05))
The PENALTIES come first, in their order: they need the tokens so far (History). Then come the PROCESSORS, in
their order. A parameter with its default value does nothing and costs nothing.
To add one: a field of SamplingParams, a function, and a row under the field's name.

Shapes: R rows (texts), V vocab_size, N tokens
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nanogpt.errors import require
from nanogpt.inference.config import SamplingParams, token_bias
from nanogpt.model.kv_cache import integers

SMALLEST = torch.finfo(torch.float32).tiny
"""Lower temperatures and values of top_p count as this: in float32 they would round to 0."""

NO_CHANCE = float("-inf")
"""The logit of a token that is ruled out: its probability is 0."""


@dataclass(frozen=True)
class History:
    """The tokens of each text so far, as the penalties need them."""

    in_prompt: Tensor
    """Whether the prompt has a token, (R, V) bool."""
    counts: Tensor
    """How often each token was generated, (R, V) float."""

    @classmethod
    def of(cls, prompts: Sequence[Tensor], vocab_size: int) -> "History":
        """The history of texts that consist of their prompts, (N,) int64 each."""
        shape, device = (len(prompts), vocab_size), prompts[0].device
        in_prompt = torch.zeros(shape, dtype=torch.bool, device=device)
        for row, prompt in zip(in_prompt, prompts, strict=True):
            row[prompt] = True
        return cls(in_prompt, torch.zeros(shape, device=device))

    def add(self, tokens: Tensor) -> None:
        """Count the new token of each row, (R,)."""
        tokens = tokens[:, None]
        self.counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=self.counts.dtype))


def process(logits: Tensor, params: SamplingParams, history: History | None = None) -> Tensor:
    """Apply every parameter that is not at its default: (R, V) -> (R, V). The input is not modified.

    history: the tokens so far; without it, the penalties are not applied.
    """
    if history is not None:
        for name, penalize in PENALTIES.items():
            if is_given(params, name):
                logits = penalize(logits, getattr(params, name), history)
    for name, apply in PROCESSORS.items():
        if is_given(params, name):
            logits = apply(logits, getattr(params, name))
    return logits


def is_given(params: SamplingParams, name: str) -> bool:
    """Whether a parameter differs from its default."""
    return getattr(params, name) != getattr(SamplingParams, name)


def needs_history(params: SamplingParams) -> bool:
    """Whether a penalty is given."""
    return any(is_given(params, name) for name in PENALTIES)


def check_logit_bias(params: SamplingParams, vocab_size: int) -> None:
    """Raise UserError unless each entry of params.logit_bias names an id of the vocabulary."""
    for entry in params.logit_bias:
        token, _ = token_bias(entry)
        require(
            isinstance(token, int),
            f"--logit_bias {entry!r} names a text: generate knows ids only, as in {{12: -100}}",
        )
        require(
            int(token) < vocab_size,
            f"--logit_bias {entry!r}: the ids of this vocabulary are below {vocab_size}",
        )


def penalize_repetition(logits: Tensor, penalty: float, history: History) -> Tensor:
    """Divide the positive and multiply the negative logits of tokens in the prompt or the new text.

    Above 1, repetition becomes rarer (Keskar et al., 2019; as in transformers).
    """
    seen = history.in_prompt | (history.counts > 0)
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalize_frequency(logits: Tensor, penalty: float, history: History) -> Tensor:
    """Subtract the penalty from a token's logit once per time it was generated (as OpenAI and vLLM do)."""
    return logits - penalty * history.counts


def penalize_presence(logits: Tensor, penalty: float, history: History) -> Tensor:
    """Subtract the penalty once from the logit of each token that was generated (as OpenAI and vLLM do)."""
    return logits - penalty * (history.counts > 0)


def add_logit_bias(logits: Tensor, entries: tuple[str, ...]) -> Tensor:
    """Add a bias to the logits of some tokens; -100 rules one out, 100 forces it."""
    ids, biases = bias_tensors(entries, logits.device)
    return logits.index_add(1, ids, biases.expand(len(logits), -1))


@lru_cache(maxsize=64)
def bias_tensors(entries: tuple[str, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The ids, (N,) int64, and the biases, (N,), of the entries of logit_bias."""
    ids, biases = zip(*map(token_bias, entries), strict=True)
    return integers(ids, device), torch.tensor(biases, dtype=torch.float32).to(device)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits (R, V) by the temperature: below 1 makes the likeliest tokens likelier still.

    The highest logit of each row becomes 0, so that nothing overflows; softmax ignores the shift. At 0, all
    but the likeliest token, the first of equals, are ruled out.
    """
    if temperature == 0:
        return torch.full_like(logits, NO_CHANCE).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
    highest = logits.max(dim=-1, keepdim=True).values  # (R, 1)
    return (logits - highest) / max(temperature, SMALLEST)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Rule out all but the k likeliest tokens: their logits (R, V) become -inf."""
    kept = logits.topk(min(k, logits.shape[-1]))  # (R, k)
    return torch.full_like(logits, NO_CHANCE).scatter(-1, kept.indices, kept.values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Rule out all but the fewest likeliest tokens that together reach probability p.

    (R, V) -> (R, V). Nucleus sampling (Holtzman et al., 2020).
    """
    ordered, order = logits.sort(dim=-1, descending=True)  # (R, V)
    probabilities = ordered.softmax(dim=-1)
    likelier = probabilities.cumsum(dim=-1) - probabilities  # total probability of the likelier tokens
    ordered = ordered.masked_fill(likelier >= max(p, SMALLEST), NO_CHANCE)
    return torch.empty_like(logits).scatter(-1, order, ordered)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Rule out the tokens less likely than p times the likeliest (Nguyen et al., 2024)."""
    highest = logits.max(dim=-1, keepdim=True).values  # (R, 1)
    return logits.masked_fill(logits < highest + math.log(p), NO_CHANCE)


PENALTIES: dict[str, Callable[[Tensor, Any, History], Tensor]] = {
    "repetition_penalty": penalize_repetition,
    "frequency_penalty": penalize_frequency,
    "presence_penalty": penalize_presence,
}
"""Field of SamplingParams -> (logits, its value, history) -> logits."""

PROCESSORS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "logit_bias": add_logit_bias,
    "temperature": apply_temperature,
    "top_k": keep_top_k,
    "top_p": keep_top_p,
    "min_p": keep_min_p,
}
"""Field of SamplingParams -> (logits, its value) -> logits."""
