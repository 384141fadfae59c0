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

from nanogpt.errors import require
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

    model: in evaluation mode, else dropout acts. changes: fields of `params` by their names, as
    temperature=0.8, top_k=40, top_p=0.9. generator: source of randomness, on the device of `prompt`; None:
    PyTorch's global one.
    Raises: UserError for an impossible value; TypeError for an unknown name. Both at the call, not at the
    first token.
    """
    return decode(model, prompt, replace(params, **changes), num_tokens, generator)


@torch.no_grad()
def decode(
    model: GPT, tokens: Tensor, params: SamplingParams, num_tokens: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Yield each new token (B,) as soon as it is sampled.

    There is no KV cache: for every token the model computes all T positions of the context anew, even their
    logits, though only those of the last position are used.
    """
    for _ in range(num_tokens):
        context = tokens[:, -model.config.block_size :]  # (B, T): the model sees no further back
        logits, _ = model(context)  # (B, T, V)
        token = sample(logits[:, -1], params, generator)  # (B,), drawn from the softmax of the last logits
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
    Raises: UserError as `generate`, and for an empty stop string.
    """
    require(not isinstance(stop, str), f"stop={stop!r} is a text: give a list of texts")
    require("" not in stop, 'stop has an empty text, "", which would stop at once: leave it out')
    require(len(prompt) == 1, f"{len(prompt)} prompts: generate_text continues one, generate any number")
    tokens = map(int, generate(model, prompt, params, num_tokens=num_tokens, generator=generator, **changes))
    until_end = takewhile(lambda token: token != tokenizer.end_of_text, tokens)
    return stop_at(tokenizer.stream(until_end), stop)


def stop_at(chunks: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Pass text on up to the first stop string, which is left out.

    The end of the text is held back as long as it may be the beginning of a stop string: with the stop string
    "END", the chunks "THE E" and "ND." become "THE ".
    """
    pending = ""
    for chunk in chunks:
        pending += chunk
        found = [position for string in stop if (position := pending.find(string)) >= 0]
        if found:
            pending = pending[: min(found)]
            break
        held_back = max((partial_match(pending, string) for string in stop), default=0)
        if len(pending) > held_back:
            yield pending[: len(pending) - held_back]
            pending = pending[len(pending) - held_back :]
    if pending:
        yield pending


def partial_match(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`, without being all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
