"""Inspection: the answer to POST /inspect, how the model reads a text.

Example: response = await inspect(served, InspectRequest(text="To be", lens=True), limits)
The engine's thread does it in parts between the tokens that it makes. A large answer is written in pieces on
a thread of its own, so that nobody waits for that either. Its form is in docs/server.md.
"""

import asyncio
from collections.abc import Awaitable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, cast

import torch
from starlette.responses import Response

from nanogpt.errors import UserError
from nanogpt.inference.inspection import InspectedToken, Inspection, inspect_in_parts
from nanogpt.inference.scheduler import describe
from nanogpt.inference.text import Alternative
from nanogpt.server.completions import token_text
from nanogpt.server.config import ServeConfig
from nanogpt.server.jobs import TOO_SLOW, failure, read_prompt, refusal
from nanogpt.server.protocol import ApiError, InspectRequest, json_in_parts
from nanogpt.server.served import Served
from nanogpt.tokenizer.base import Tokenizer

DEFAULT_TOP = 10
"""Alternatives of each token, unless the request says how many."""

MAX_ATTENTION_TOKENS = 1024
"""Most tokens of a text of which the attention is given: its size is their square."""

ATTENTION_DECIMALS = 4
"""Decimals of an attention weight."""


def inspect(served: Served, request: InspectRequest, limits: ServeConfig) -> Awaitable[Response]:
    """Ask the engine at once; the answer comes later. Raises: ApiError for an impossible request."""
    future = served.engine.call(parts_of(served, request))
    if future is None:
        raise refusal(served)
    return answer(served, request, limits, future)


async def answer(
    served: Served, request: InspectRequest, limits: ServeConfig, future: "Future[Inspection]"
) -> Response:
    """The answer to a request. Raises: ApiError if the engine could not do it."""
    try:
        found = await asyncio.wait_for(asyncio.wrap_future(future), limits.deadline)
    except asyncio.TimeoutError as error:
        raise ApiError(504, TOO_SLOW) from error
    except Exception as error:
        raise failure(served, describe(error)) from error
    body = await asyncio.to_thread(encode, served, found, distribution=bool(request.distribution))
    return Response(body, media_type="application/json")


def parts_of(served: Served, request: InspectRequest) -> Iterator[Inspection | None]:
    """The work for a request. Raises: ApiError for an impossible one."""
    given, field = (request.text, "text") if request.tokens is None else (request.tokens, "tokens")
    if given is None or (request.text is not None and request.tokens is not None):
        raise ApiError(400, "give text or tokens, one of the two", param="text")
    ids = read_prompt(served, given, field=field).ids
    head = request.attention and (request.attention.layer, request.attention.head)
    if head and len(ids) > MAX_ATTENTION_TOKENS:
        message = f"attention is given of at most {MAX_ATTENTION_TOKENS} tokens, not of {len(ids)}"
        raise ApiError(400, message, param="attention")
    top = DEFAULT_TOP if request.top is None else request.top
    wanted: dict[str, Any] = {"top": top, "attention": head, "lens": bool(request.lens)}
    try:
        return inspect_in_parts(served.model, served.tokenizer, torch.tensor(ids), **wanted)
    except UserError as error:  # all but the head is right by now
        raise ApiError(400, str(error), param="attention") from error


def encode(served: Served, found: Inspection, *, distribution: bool) -> bytes:
    """An inspection as JSON."""
    tokenizer, shape = served.tokenizer, served.model.config
    following: dict[str, Any] = {
        "entropy": found.next.entropy,
        "top": describe_top(tokenizer, found.next.top),
    }
    if distribution:
        following["logprobs"] = found.next.logprobs.tolist()
    weights: list[list[float]] | None = None
    if found.attention is not None:
        rounded = found.attention.double().round(decimals=ATTENTION_DECIMALS)
        weights = cast(list[list[float]], rounded.tolist())
    return json_in_parts(
        {
            "tokens": (describe_token(tokenizer, token) for token in found.tokens),
            "next": following,
            "attention": weights,
            "lens": found.lens and [(describe_top(tokenizer, top) for top in layer) for layer in found.lens],
            "layers": shape.n_layer,
            "heads": shape.n_head,
            "context": shape.block_size,
        },
        levels=3,
    )


def describe_token(tokenizer: Tokenizer, token: InspectedToken) -> dict[str, Any]:
    """A token of the text: `text` is what it adds, `token` its name, as in completions."""
    named = {"token": token_text(tokenizer, token.id), "top": describe_top(tokenizer, token.top)}
    return vars(token) | named


def describe_top(tokenizer: Tokenizer, top: Iterable[Alternative]) -> list[dict[str, Any]]:
    """Likely tokens; bytes that are no text are spelled as in completions."""
    return [
        {"id": other.id, "text": token_text(tokenizer, other.id), "logprob": other.logprob} for other in top
    ]
