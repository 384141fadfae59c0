"""Chats: the answers to POST /v1/chat/completions, of a model that has learned to continue texts.

A base model knows no roles. Its prompt is the messages as lines of a play, "User: ..." and "Assistant: ...",
and every answer carries a warning that says so. The text ends where the next "User:" would begin.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any

from nanogpt.inference.tokens import Token
from nanogpt.server.completions import FINISH_REASONS, token_text
from nanogpt.server.config import ServeConfig
from nanogpt.server.jobs import Job, read_prompt
from nanogpt.server.protocol import ChatRequest, Message, encoded, json_bytes
from nanogpt.server.served import Delta, Served
from nanogpt.tokenizer.base import Tokenizer

WARNING = (
    "this is a base model, which continues texts and was not trained to chat: it was given the messages as "
    "the lines of a dialogue"
)

NEXT_TURN = "\nUser:"
"""Where the user would speak again."""

CHUNK: dict[str, Any] = {"object": "chat.completion.chunk"}
"""What tells a chunk of a stream from an answer."""


def chat_prompt(messages: Sequence[Message]) -> str:
    """The prompt for messages: a line for each, and the beginning of the assistant's."""
    lines = [f"{message.role.capitalize()}: {message.text}" for message in messages]
    return "\n".join([*lines, "Assistant:"])


class Chat:
    """The answer to a request."""

    def __init__(self, served: Served, request: ChatRequest, limits: ServeConfig) -> None:
        """Submit its texts. Raises: ApiError for an impossible request."""
        self.served, self.request = served, request
        newer = request.max_completion_tokens  # OpenAI's newer name for max_tokens
        fields = request.model_copy(update={"stop": [*request.stops, NEXT_TURN]})
        self.job = Job(
            served,
            [read_prompt(served, chat_prompt(request.messages), field="messages")],
            fields,
            limits,
            count=request.n or 1,
            num_tokens=request.max_tokens if newer is None else newer,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )
        self.head: dict[str, Any] = {
            "id": f"chatcmpl-{time.time_ns():x}",
            "created": int(time.time()),
            "model": served.name,
            "warning": WARNING,
        }

    async def whole(self) -> bytes:
        """The answer in JSON, once all texts have ended. Raises: ApiError if one could not be made."""
        await self.job.finished()
        deltas = [text.since() for text in self.job.texts]

        def describe() -> dict[str, Any]:
            """The answer."""
            choices = (self.choice(index, delta, "message") for index, delta in enumerate(deltas))
            return self.head | {"object": "chat.completion", "choices": choices, "usage": self.job.usage()}

        return await encoded(sum(delta.entries for delta in deltas), describe)

    def choice(self, index: int, delta: Delta, key: str) -> dict[str, Any]:
        """A part of a choice. key: "message", or "delta" in a stream."""
        message = {"content": "".join(piece for _, piece in delta.tokens)}
        if delta.first == 0:
            message["role"] = "assistant"
        reason, tokenizer = delta.finish_reason, self.served.tokenizer
        scored = {"content": [describe_token(tokenizer, token) for token, _ in delta.tokens]}
        return {
            "index": index,
            key: message,
            "logprobs": scored if self.request.logprobs else None,
            "finish_reason": None if reason is None else FINISH_REASONS[reason],
        }

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The answer in chunks of JSON, as it is made. Raises: ApiError if a text could not be made."""
        async for index, delta in self.job.deltas():
            yield await encoded(delta.entries, partial(self.chunk, index, delta))
        options = self.request.stream_options
        if options and options.include_usage:
            last: dict[str, Any] = {"choices": [], "usage": self.job.usage()}
            yield json_bytes(self.head | CHUNK | last)

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        """A chunk of the answer with a part of a choice."""
        return self.head | CHUNK | {"choices": [self.choice(index, delta, "delta")]}


def describe_token(tokenizer: Tokenizer, token: Token) -> dict[str, Any]:
    """A token with its log-probability and its alternatives, in the shape that chats have."""

    def described(number: int, logprob: float | None) -> dict[str, Any]:
        """One of them."""
        raw = tokenizer.tokens[number]
        return {"token": token_text(tokenizer, number), "logprob": logprob, "bytes": list(raw)}

    top = [described(i, logprob) for i, logprob in token.top]
    return described(token.id, token.logprob) | {"top_logprobs": top}
