"""Generation: from prompts to one token after another.

Example: for token in generate(model, prompt, num_tokens=100, temperature=0.8): ...
The prompt is computed once (prefill), then each token alone: a cache has the keys and values of those before
it (model/kv_cache.py). steps.py says what computes it, sampling.py chooses the tokens, text.py makes text of
them.

Shapes: R rows (texts), T tokens, V vocab_size
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nanogpt.errors import require
from nanogpt.inference.checks import check_count, check_prompts
from nanogpt.inference.config import SamplingParams
from nanogpt.inference.processors import History, check_logit_bias, needs_history
from nanogpt.inference.sampling import Randomness, sample
from nanogpt.inference.speculation import NgramGuesses
from nanogpt.inference.steps import StepModel, fastest_steps
from nanogpt.model.gpt import GPT
from nanogpt.model.kv_cache import KVCache, integers

DEFAULT_PARAMS = SamplingParams()

Observer = Callable[[Tensor, Tensor], None]
"""Is called at each step with the model's own logits (R, V) and the tokens chosen from them (R,)."""


def generate(
    model: GPT,
    prompts: Tensor | Sequence[Tensor],
    params: SamplingParams = DEFAULT_PARAMS,
    *,
    num_tokens: int,
    generator: Randomness = None,
    observe: Observer | None = None,
    guesses: NgramGuesses | None = None,
    **changes: Any,
) -> Iterator[Tensor]:
    """Continue prompts, (R, T) or R of (T,) int64: an iterator over the new tokens, (R,) each, one a row.

    model: in evaluation mode, else dropout acts. changes: fields of `params` by their names, as
    temperature=0.8, top_k=40, top_p=0.9. generator: see `sample`; with one for each row, what becomes of a
    row does not depend on the others. observe: see Observer. guesses: for params.speculate.
    Raises: UserError for an impossible value; TypeError for an unknown name. Both at the call, not at the
    first token.
    """
    params = replace(params, **changes)
    overlap, size = params.context_overlap or 1, model.config.block_size
    require(overlap <= size, f"--context_overlap {overlap} is more than the context, {size}")
    prompts = check_prompts(prompts, model.config.vocab_size)
    check_count(num_tokens)
    check_logit_bias(params, model.config.vocab_size)
    stepped = fastest_steps(model, params.speculate, guesses)
    return decode(stepped, prompts, params, num_tokens, generator, observe=observe)


@torch.no_grad()
def decode(
    model: StepModel,
    prompts: list[Tensor],
    params: SamplingParams,
    num_tokens: int,
    generator: Randomness,
    *,
    observe: Observer | None,
) -> Iterator[Tensor]:
    """Yield each new token (R,) as soon as it is sampled.

    A text that outgrows the model's context goes on in a new one, which begins with its last tokens
    (params.context_overlap; as many as fit: a sliding window). What was before them is forgotten.
    """
    size = model.config.block_size
    overlap = params.context_overlap or max(1, size // 2)
    contexts = [prompt[-size:] for prompt in prompts]
    cache = KVCache(model.config, len(prompts), min(size, max(map(len, contexts)) + num_tokens))
    history = History.of(prompts, model.config.vocab_size) if needs_history(params) else None
    new: deque[Tensor] = deque(maxlen=size)  # tokens, (R,) each
    for _ in range(num_tokens):
        if not new:
            logits = prefill(model, cache, range(len(contexts)), contexts)  # (R, V)
        elif max(cache.lengths) < size:
            logits = decode_one(model, cache, range(len(contexts)), new[-1])  # (R, V)
        else:
            texts = torch.stack((*new,), dim=1)  # (R, T)
            full = [row for row, length in enumerate(cache.lengths) if length == size]
            rest = [row for row, length in enumerate(cache.lengths) if length < size]
            ends = [torch.cat((contexts[row], texts[row]))[-overlap:] for row in full]
            parts = [prefill(model, cache, full, ends)]
            if rest:
                tokens = new[-1][integers(rest, texts.device)]
                parts.append(decode_one(model, cache, rest, tokens))
            order = sorted(range(len(contexts)), key=(full + rest).__getitem__)
            logits = torch.cat(parts)[integers(order, texts.device)]  # (R, V)
        new.append(sample(logits, params, generator, history))  # (R,)
        if history is not None:
            history.add(new[-1])
        if observe is not None:
            observe(logits, new[-1])
        yield new[-1]


def prefill(model: StepModel, cache: KVCache, rows: Sequence[int], texts: Sequence[Tensor]) -> Tensor:
    """Fill rows of the cache with texts, (T,) each. Returns the logits after each, (R, V)."""
    cache.clear(rows)
    counts = list(map(len, texts))
    idx = torch.stack([F.pad(text, (0, max(counts) - len(text))) for text in texts])  # (R, T)
    return feed(model, cache, rows, idx, counts)


def decode_one(model: StepModel, cache: KVCache, rows: Sequence[int], tokens: Tensor) -> Tensor:
    """Add a token, (R,), to each of these rows of the cache. Returns the logits after it, (R, V)."""
    return feed(model, cache, rows, tokens[:, None])


def feed(
    model: StepModel, cache: KVCache, rows: Sequence[int], idx: Tensor, counts: Sequence[int] | None = None
) -> Tensor:
    """Compute tokens, (R, T), that follow those in the cache. Returns the logits after each row, (R, V)."""
    step = cache.step(rows, idx, counts)
    logits, _ = model(idx, cache=step)  # (R, 1, V)
    cache.advance(step, idx)
    return logits[:, -1]
