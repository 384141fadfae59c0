"""Protocol: the requests and errors of the OpenAI API, with vLLM's additions, as the server reads them.

Example: request = CompletionRequest.model_validate_json('{"prompt": "ROMEO:", "max_tokens": 5}')
Fields of other servers that are not here are ignored, as their clients expect. Knows nothing of models.
"""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from starlette.responses import Response

from nanogpt.errors import UserError
from nanogpt.inference.config import SamplingParams

MAX_LOGPROBS = 100
"""Most alternatives of a token that a request may ask for."""

MAX_STOPS = 64
"""Most stop strings of a request, and most ids in stop_token_ids."""

MAX_STOP_LENGTH = 256
"""Most characters of a stop string: each token is compared with every beginning of it."""

MAX_BIASES = 1024
"""Most entries of logit_bias."""

SEED_LIMIT = 2**63

TokenId = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]


class ApiError(Exception):
    """An answer with an error, in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The answer as an object."""
        kind = ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The answer."""
        headers = {"Retry-After": "1"} if self.status in {429, 503} else {}
        if self.status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        return json_response(self.body, self.status, headers)


ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Status -> type of the error; others are an invalid_request_error or a server_error."""


def json_bytes(value: object) -> bytes:
    """A value as JSON: ASCII, so that half a surrogate pair, which a vocabulary may have, passes too.

    An iterator is a list.
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":"), default=list).encode()


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A value as an answer in JSON."""
    return Response(json_bytes(value), status, headers, "application/json")


MANY_ENTRIES = 2000
"""Tokens and alternatives that take so long to describe that a thread of its own does it."""

JSON_LEVELS = 5
"""Levels of an answer that are encoded item by item: below them are single tokens."""


async def encoded(entries: int, describe: Callable[[], object]) -> bytes:
    """What a function describes, as JSON; a large answer is made on a thread, so that nobody waits for it."""
    if entries < MANY_ENTRIES:
        return json_bytes(describe())
    return await asyncio.to_thread(lambda: json_in_parts(describe()))


def json_in_parts(value: object, levels: int = JSON_LEVELS) -> bytes:
    """As json_bytes, item by item: after each, other threads have their turn."""
    if levels and isinstance(value, dict):
        items = cast(dict[str, object], value).items()
        return b"{%b}" % b",".join(
            json_bytes(key) + b":" + json_in_parts(item, levels - 1) for key, item in items
        )
    if levels and isinstance(value, list | Iterator):
        return b"[%b]" % b",".join(json_in_parts(item, levels - 1) for item in cast(Iterator[object], value))
    return json_bytes(value)


class Model(BaseModel):
    """Base of all requests: types are not converted, and unknown fields ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


Request = TypeVar("Request", bound=Model)


class StreamOptions(Model):
    """What a stream says besides the text."""

    include_usage: bool | None = None
    """Whether a chunk with the number of tokens comes before the end."""
    continuous_usage_stats: bool | None = None
    """Whether every chunk has it."""


class SamplingFields(Model):
    """What completions and chats have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Count | None = None
    seed: Annotated[int, Field(ge=-SEED_LIMIT, lt=SEED_LIMIT)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_BIASES)] | None = None
    """Id -> bias, from -100 to 100."""
    user: str | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """vLLM's, as all that follow; 0 and -1: all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    ignore_eos: bool | None = None
    """Whether the text goes on after an end of text."""
    min_tokens: Count | None = None
    """Tokens before which the text does not end by an end of text or one of stop_token_ids."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    return_token_ids: bool | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling_params(self, vocab_size: int) -> SamplingParams:
        """Our sampling parameters. Raises: ApiError for an impossible value."""
        try:
            bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        except ValueError as error:
            raise ApiError(400, f"logit_bias: {error}: give ids of tokens", param="logit_bias") from error
        for token, value in bias.items():
            if not 0 <= token < vocab_size or abs(value) > 100:
                message = f"logit_bias {token}: {value:g}: ids are from 0 to {vocab_size - 1}, biases to 100"
                raise ApiError(400, message, param="logit_bias")
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_k": None if self.top_k in {0, -1} else self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p or None,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "logit_bias": bias or None,
        }
        given = {name: value for name, value in given.items() if value is not None}
        try:
            return SamplingParams(**given)
        except UserError as error:
            raise ApiError(400, re.sub(r"--(\w)", r"\1", str(error))) from error


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]] | None = None
    """Texts or ids of tokens; null: a line feed, or the end of a text where the vocabulary has none."""
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: str | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        if self.prompt is None:
            return ["\n"]
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(part, int) for part in self.prompt) and self.prompt:
            return [[part for part in self.prompt if isinstance(part, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]


class TextPart(Model):
    """A part of a message that has several."""

    type: Literal["text"]
    text: str


class Message(Model):
    """A message of a chat."""

    role: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]{1,32}$")]
    content: str | list[TextPart] | None = None

    @property
    def text(self) -> str:
        """The text of all parts."""
        return (
            "\n".join(part.text for part in self.content)
            if isinstance(self.content, list)
            else self.content or ""
        )


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class TokenizeRequest(Model):
    """POST /tokenize, with vLLM's or llama.cpp's name for the text."""

    prompt: str | None = None
    content: str | None = None


class DetokenizeRequest(Model):
    """POST /detokenize."""

    tokens: list[TokenId]


class AttentionHead(Model):
    """An attention head."""

    layer: Count
    head: Count


class InspectRequest(Model):
    """POST /inspect, which is ours: how the model reads a text, or the tokens with these ids."""

    model: str | None = None
    text: str | None = None
    tokens: list[TokenId] | None = None
    top: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Alternatives of each token; null: 10."""
    attention: AttentionHead | None = None
    """The head of which the attention weights are wanted."""
    lens: bool | None = None
    """Whether to say what each layer would say next."""
    distribution: bool | None = None
    """Whether to give the log-probability of every token of the vocabulary after the text."""


def parse(kind: type[Request], body: bytes) -> Request:
    """The request in a body. Raises: ApiError if it is not one."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        first = max(errors, key=lambda found: len(found["loc"]))  # the one that got furthest into a union
        place = ".".join(str(part) for part in first["loc"][:1])
        message = f"{place}: {first['msg']}" if place else f"the body: {first['msg']}"
        raise ApiError(400, message, param=place or None) from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error
