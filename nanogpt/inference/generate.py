"""Generation: from a prompt to one token after another, or to text as it is made.

Example: for token in generate(model, prompt, num_tokens=100, temperature=0.8): ...
         for text in generate_text(model, tokenizer, prompt, num_tokens=100, stop=["JULIET:"]): ...
How a token is chosen is in sampling.py. Knows nothing of files or of printing.

Shapes: B batch, T tokens, V vocab_size
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from nanogpt.inference.config import SamplingParams
from nanogpt.inference.sampling import sample
from nanogpt.model.gpt import GPT
from nanogpt.tokenizer.base import Tokenizer

DEFAULT_PARAMS = SamplingParams()


def generate(
    model: GPT,
    prompt: Tensor,
    params: SamplingParams = DEFAULT_PARAMS,
    *,
    num_tokens: int,
    generator: torch.Generator | None = None,
    **changes: Any,
) -> Iterator[Tensor]:
    """Continue `prompt` (B, T) int64: an iterator over the new tokens, (B,) each, one for each row.

    changes: fields of `params` by their names, as temperature=0.8, top_k=40, top_p=0.9.
    generator: source of randomness, on the device of `prompt`; None: PyTorch's global one.
    Raises: UserError for a value that cannot be meant; TypeError for an unknown name.
    """
    return decode(model, prompt, replace(params, **changes), num_tokens, generator)


@torch.no_grad()
def decode(
    model: GPT, tokens: Tensor, params: SamplingParams, num_tokens: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Yield each new token (B,) as soon as it is sampled.

    For every token the model runs anew over the last block_size tokens. Even the output layer does, though
    only its last position is used: a KV cache will leave one position to compute.
    """
    for _ in range(num_tokens):
        context = tokens[:, -model.config.block_size :]  # (B, T): the model sees no further back
        logits, _ = model(context)  # (B, T, V)
        token = sample(logits[:, -1], params, generator)  # (B,)
        yield token
        tokens = torch.cat((context, token[:, None]), dim=1)


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: Tensor,
    params: SamplingParams = DEFAULT_PARAMS,
    *,
    num_tokens: int,
    stop: Sequence[str] = (),
    generator: torch.Generator | None = None,
    **changes: Any,
) -> Iterator[str]:
    """Continue one prompt (1, T) int64: an iterator over the new text, in chunks, as it is made.

    It ends after num_tokens tokens, before a string of `stop`, or where the model ends the text.
    params, generator, changes: as for `generate`.
    """
    tokens = map(int, generate(model, prompt, params, num_tokens=num_tokens, generator=generator, **changes))
    until_end = takewhile(lambda token: token != tokenizer.end_of_text, tokens)
    return stop_at(tokenizer.stream(until_end), stop)


def stop_at(chunks: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Pass text on up to the first stop string, which is left out.

    The end of the text is held back as long as it may be the beginning of a stop string.
    """
    pending = ""
    for chunk in chunks:
        pending += chunk
        found = [position for string in stop if (position := pending.find(string)) >= 0]
        if found:
            yield pending[: min(found)]
            return
        held_back = max((partial_match(pending, string) for string in stop), default=0)
        if len(pending) > held_back:
            yield pending[: len(pending) - held_back]
            pending = pending[len(pending) - held_back :]
    yield pending


def partial_match(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`, without being all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
