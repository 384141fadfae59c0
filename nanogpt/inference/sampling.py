"""Sampling: choose the next token from the model's logits, as the sampling parameters say.

Example: token = sample(logits, SamplingParams(temperature=0.8, top_k=40))
First each parameter in turn changes the logits: processors.py has a function for each, and docs/sampling.md
works through an example. Then one token is drawn.

Shapes: R rows (texts), V vocab_size
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanogpt.inference.config import SamplingParams
from nanogpt.inference.processors import History, process

Randomness = torch.Generator | Sequence[torch.Generator] | None
"""One generator, or one for each row, on the device of the logits; None: PyTorch's global one."""


def sample(
    logits: Tensor, params: SamplingParams, generator: Randomness = None, history: History | None = None
) -> Tensor:
    """Sample a token for each row of logits: (R, V) -> (R,) int64.

    history: the tokens so far, for the penalties. Temperature 0 is greedy decoding: the likeliest token, the
    first one in a tie.
    """
    logits = process(logits.float(), params, history)
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    return draw(logits.softmax(dim=-1), generator)


def draw(probabilities: Tensor, generator: Randomness) -> Tensor:
    """Draw a token for each row of probabilities: (R, V) -> (R,) int64.

    With a generator for each row, this does what torch.multinomial does: each token waits an exponentially
    distributed time, shorter for likelier tokens, and the first one wins. Raises: RuntimeError for NaN.
    """
    if not isinstance(generator, Sequence):
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    times = torch.empty_like(probabilities)
    for row, own in zip(times.unbind(), generator, strict=True):
        row.exponential_(generator=own)
    race = probabilities / times
    if race.isnan().any():
        raise RuntimeError("the probabilities of the next token are not numbers")
    return race.argmax(dim=-1)
