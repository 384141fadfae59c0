"""Inspection: how a model reads a text. Surprise at each token, attention weights, and the logit lens.

Example: found = inspect_tokens(model, tokenizer, ids, top=5, attention=(1, 2), lens=True)
         found.tokens[7].rank, found.next.entropy, found.attention[7], found.lens[1][7]
Log-probabilities are the model's own, those of its logits before any sampling parameter changes them. A long
text can be inspected in parts, between which the model is free for others.

Shapes: T tokens of the text, N positions of a part, C n_embd, V vocab_size
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from nanogpt.errors import require
from nanogpt.inference.prompts import device_of
from nanogpt.inference.text import Alternative, alternatives, pieces_of
from nanogpt.inference.tokens import likeliest
from nanogpt.machine.device import kind_of
from nanogpt.model.gpt import GPT, Block, Context, attention
from nanogpt.tokenizer.base import Tokenizer

LENS_TOP = 3
"""Alternatives that the logit lens names for each layer and position."""

MAX_POSITIONS = 128
"""Maximum number of positions in a part, even if the vocabulary is so small that more logits would fit."""

Alternatives = tuple[Alternative, ...]
"""The likeliest tokens at a place, likeliest first."""


@dataclass(frozen=True)
class InspectedToken:
    """A token of a text, and how the model predicted it from those before it (the first one it did not)."""

    text: str
    """The text that it adds: "" if it only begins a character."""
    id: int
    logprob: float | None = None
    """Natural logarithm of its probability."""
    entropy: float | None = None
    """Entropy, in nats, of the distribution that it was predicted with: the expected value of -logprob."""
    rank: int | None = None
    """Its rank among all tokens by probability; 1: the likeliest."""
    top: Alternatives = ()


@dataclass(frozen=True, eq=False)
class NextToken:
    """The distribution of the token after a text."""

    entropy: float
    top: Alternatives
    logprobs: Tensor
    """Of every token of the vocabulary, (V,) float32."""


@dataclass(frozen=True, eq=False)
class Inspection:
    """How a model reads a text."""

    tokens: list[InspectedToken]
    next: NextToken
    attention: Tensor | None
    """How much each token attends to each, (T, T) float32: a row for each query, which sums to 1."""
    lens: list[list[Alternatives]] | None
    """For each layer, for each position: the likeliest next tokens, if the model ended after that layer.

    Layer 0 are the embeddings, layer n_layer is the whole model.
    """


def inspect_tokens(model: GPT, tokenizer: Tokenizer, ids: Tensor, **wanted: Any) -> Inspection:
    """Inspect a text in one go. Arguments and errors: see inspect_in_parts."""
    with torch.no_grad():
        *_, found = inspect_in_parts(model, tokenizer, ids, **wanted)
    return cast(Inspection, found)


def inspect_in_parts(
    model: GPT,
    tokenizer: Tokenizer,
    ids: Tensor,
    *,
    top: int = 10,
    attention: tuple[int, int] | None = None,
    lens: bool = False,
) -> Iterator[Inspection | None]:
    """Inspect a text, (T,) int64, in parts, which yield None, ..., the Inspection. Needs torch.no_grad.

    model: in evaluation mode. top: number of alternatives of each token. attention: the layer and the head,
    counted from 0, whose attention weights are wanted. lens: whether to apply the logit lens.
    Raises: UserError, at the call, if the text is empty or longer than the context, or if there is no such
    layer or head.
    """
    size = model.config.block_size
    require(0 < len(ids) <= size, f"the text has {len(ids)} tokens: give 1 to {size}, the model's context")
    require(top >= 0, f"top {top} is negative: give a number of alternatives")
    for name, index, count in zip(
        ("layer", "head"), attention or (0, 0), (model.config.n_layer, model.config.n_head), strict=True
    ):
        require(0 <= index < count, f"attention: {name} {index}: those of this model are 0 to {count - 1}")
    return parts_of_inspection(model, tokenizer, ids.to(device_of(model)), top, attention, lens=lens)


def parts_of_inspection(
    model: GPT, tokenizer: Tokenizer, ids: Tensor, top: int, place: tuple[int, int] | None, *, lens: bool
) -> Iterator[Inspection | None]:
    """See inspect_in_parts. place: the layer and the head whose attention weights are wanted."""
    stream, context = residual_stream(model, ids)
    weights = None
    if place is not None:
        layer, head = place
        weights = attention_weights(cast(Block, model.blocks[layer]), stream[layer], context, head)
    yield None

    numbers = cast(list[int], ids.tolist())
    texts = pieces_of(tokenizer, numbers)
    tokens = [InspectedToken(texts[0], numbers[0])]
    for logprobs in logprobs_in_parts(model, stream[-1][:-1]):  # (N, V) each
        first = len(tokens)
        scored = scores(logprobs, ids[first : first + len(logprobs)])
        for i, (score, best) in enumerate(zip(scored, likeliest(logprobs, top), strict=True), first):
            tokens.append(InspectedToken(texts[i], numbers[i], *score, alternatives(tokenizer, best)))
        yield None

    (logprobs,) = logprobs_in_parts(model, stream[-1][-1:])  # (1, V)
    (best,) = likeliest(logprobs, top)
    following = NextToken(float(entropy(logprobs)), alternatives(tokenizer, best), logprobs[0].cpu())
    layers: list[list[Alternatives]] = []
    for x in stream if lens else ():
        layers.append([])
        for logprobs in logprobs_in_parts(model, x):
            layers[-1] += [alternatives(tokenizer, best) for best in likeliest(logprobs, LENS_TOP)]
            yield None
    yield Inspection(tokens, following, weights, layers if lens else None)


def residual_stream(model: GPT, ids: Tensor) -> tuple[list[Tensor], Context]:
    """The residual stream of a text, (T,): after the embeddings and after each block, (T, C) each.

    Also returns the Context of its blocks.
    """
    passed: list[tuple[Tensor, Context, Tensor]] = []

    def note(_: nn.Module, given: tuple[Tensor, Context], x: Tensor) -> None:
        """Keep the input and the output of a block."""
        passed.append((*given, x))

    hooks = [block.register_forward_hook(note) for block in model.blocks]
    try:
        model.trunk(ids[None])
    finally:
        for hook in hooks:
            hook.remove()
    first, context, _ = passed[0]
    return [first[0], *(x[0] for _, _, x in passed)], context


def attention_weights(block: Block, x: Tensor, context: Context, head: int) -> Tensor:
    """How much each token attends to each in a head, (T, T) float32. x: (T, C), as it enters the block."""
    q, k, _ = block.attn.queries_keys_values(block.norm_1(x[None]), context)  # (1, H, T, D) each
    q, k = q[0, head].float().cpu(), k[0, head].float().cpu()  # a GPU may round products to TensorFloat-32
    with torch.autocast("cpu", enabled=False):
        return attention(q, k, torch.eye(len(q)))  # averages of the rows of an identity are the weights


def logprobs_in_parts(model: GPT, x: Tensor) -> Iterator[Tensor]:
    """Log-probabilities of the next token at each position, a few positions at a time, (N, V) float32.

    x: the residual stream, (T, C). Before the last block, this is the logit lens (nostalgebraist, 2020).
    """
    size = max(1, min(MAX_POSITIONS, kind_of(x.device).logits_per_chunk // model.config.vocab_size))
    for part in cast(tuple[Tensor, ...], x.split(size)):
        yield model.logits(model.final_norm(part)).float().log_softmax(dim=-1)


def scores(logprobs: Tensor, tokens: Tensor) -> list[tuple[float, float, int]]:
    """Log-probability, entropy of the distribution, and rank of each token, (N,). logprobs: (N, V)."""
    chosen = logprobs.gather(1, tokens[:, None])  # (N, 1)
    ranks = (logprobs > chosen).sum(dim=-1) + 1  # (N,)
    columns = (chosen[:, 0], entropy(logprobs), ranks)
    return list(zip(*(cast(list[Any], column.tolist()) for column in columns), strict=True))


def entropy(logprobs: Tensor) -> Tensor:
    """The entropy of distributions, (N, V), in nats, (N,)."""
    return cast(Tensor, torch.special.entr(logprobs.exp())).sum(dim=-1)
