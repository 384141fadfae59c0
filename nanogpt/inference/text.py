"""Text as it is made: decoded token by token, up to the end of the text or a stop string.

Example: for text in generate_text(model, tokenizer, prompt, num_tokens=100, stop=["JULIET:"]): ...
Knows nothing of files or of printing.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

from torch import Tensor

from nanogpt.errors import require
from nanogpt.inference.config import SamplingParams
from nanogpt.inference.generate import DEFAULT_PARAMS, generate
from nanogpt.inference.sampling import Randomness
from nanogpt.model.gpt import GPT
from nanogpt.tokenizer.base import Tokenizer


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: Tensor,
    params: SamplingParams = DEFAULT_PARAMS,
    *,
    num_tokens: int,
    stop: Sequence[str] = (),
    generator: Randomness = None,
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
