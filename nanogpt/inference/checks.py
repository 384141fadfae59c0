"""Checks of the arguments of generate, which fail before the first token is computed.

Example: prompts = check_prompts(prompts, model.config.vocab_size)
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, cast

from torch import Tensor

from nanogpt.errors import require


def check_prompts(given: Any, vocab_size: int) -> list[Tensor]:
    """The prompts, (R, T) or R of (T,), as a list of (T,) int64. Raises: UserError."""
    require(
        isinstance(given, (Tensor, Sequence)), f"prompts is a {type(given).__name__}: give token ids, (R, T)"
    )
    prompts = list(cast(Sequence[Any], given))
    require(bool(prompts), "there are no prompts: give one at least")
    for prompt in prompts:
        good = isinstance(prompt, Tensor) and prompt.dim() == 1
        require(good, "a prompt is not a tensor of token ids, (T,): give (R, T), or a list of (T,)")
        require(len(prompt) > 0, "a prompt has no tokens: give at least one")
        whole = not (prompt.is_floating_point() or prompt.is_complex() or str(prompt.dtype) == "torch.bool")
        require(whole, f"a prompt has numbers of {prompt.dtype}: give token ids, int64")
        low, high = int(prompt.min()), int(prompt.max())
        wrong = low if low < 0 else high
        require(
            low >= 0 and high < vocab_size,
            f"a prompt has the token id {wrong}: those of this model are 0 to {vocab_size - 1}",
        )
    return [prompt.long() for prompt in prompts]


def check_count(num_tokens: Any) -> None:
    """Raise UserError unless num_tokens is a whole number from 0 on."""
    good = isinstance(num_tokens, Integral) and int(num_tokens) >= 0
    require(good, f"num_tokens {num_tokens!r} is not a whole number from 0 on")
