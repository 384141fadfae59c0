"""Prompts as token ids, and the continuation of any number of prompts in batches.

Example: ids = encode_prompt(tokenizer, "ROMEO:")[0]
         for row in generate_in_batches(model, [ids, ids], params, num_tokens=100, seed=1): ...
Knows nothing of files or printing.

Shapes: T tokens
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from nanogpt.errors import UserError
from nanogpt.inference.config import SamplingParams
from nanogpt.inference.speculation import NgramGuesses
from nanogpt.inference.tokens import Token, generate_rows
from nanogpt.machine.device import kind_of
from nanogpt.model.gpt import GPT
from nanogpt.tokenizer.base import CharTokenizer, Tokenizer

DEFAULT_PROMPT = "\n"

MAX_ROWS = 64
"""Maximum number of texts in a batch: with more, throughput hardly grows, and the first text is slow."""


def device_of(model: torch.nn.Module) -> torch.device:
    """The device that a model is on."""
    return next(model.parameters()).device


def generators_for(model: torch.nn.Module, seeds: Iterable[int]) -> list[torch.Generator]:
    """A generator of random numbers for each seed, on the device of the model."""
    device = device_of(model)
    return [kind_of(device).generator(device, seed) for seed in seeds]


def encode_prompt(
    tokenizer: Tokenizer, prompt: str, *, skip_unknown: bool = False, flag: str = "--prompt"
) -> torch.Tensor:
    """Encode a prompt as token ids, (1, T) int64.

    skip_unknown: leave out characters that the model has never seen.
    flag: the flag that gave the prompt, for messages.
    The default prompt, a line feed, always works: if the vocabulary lacks it, end-of-text replaces it.
    Raises: UserError naming unknown characters, unless they are skipped; or if no token is left.
    """
    is_default = prompt == DEFAULT_PROMPT
    if skip_unknown and isinstance(tokenizer, CharTokenizer):
        unknown = set(tokenizer.unknown_characters(prompt))
        prompt = "".join(char for char in prompt if char not in unknown)
        if not prompt and not is_default:
            raise UserError(f"{flag}: the model has seen none of its characters: give another")
    try:
        ids = tokenizer.encode(prompt)
        problem = "" if len(ids) else f"this tokenizer makes no token of {prompt!r}: give another one"
    except UserError as error:
        ids, problem = np.zeros(0), str(error)
    if not problem:
        return torch.from_numpy(ids.astype(np.int64))[None]
    if is_default:
        return torch.tensor([[tokenizer.end_of_text or 0]])
    advice = ", or give --unknown skip" if isinstance(tokenizer, CharTokenizer) else ""
    raise UserError(f"{flag}: {problem}{advice}")


def generate_in_batches(
    model: GPT,
    prompts: Iterable[Tensor],
    params: SamplingParams,
    *,
    num_tokens: int,
    seed: int,
    logprobs: int | None = None,
    guesses: NgramGuesses | None = None,
    on_short_memory: Callable[[], None] = lambda: None,
    advance: Callable[[int], object] = int,
) -> Iterator[Iterator[Token]]:
    """Continue prompts, (T,) int64 each, in batches of MAX_ROWS: an iterator over the tokens of each.

    Text i has the seed `seed` + i, and does not depend on the others. Read each before the next.
    Other arguments and errors: see generate_rows.
    """
    numbered = enumerate(prompts)
    while batch := list(islice(numbered, MAX_ROWS)):
        yield from generate_rows(
            model,
            [ids for _, ids in batch],
            params,
            num_tokens=num_tokens,
            generators=generators_for(model, (seed + number for number, _ in batch)),
            logprobs=logprobs,
            guesses=guesses,
            on_short_memory=on_short_memory,
            advance=advance,
        )
