"""Completions: the answers to POST /v1/completions, whole or as a stream of chunks.

Example: answer = Completion(served, request, limits); await answer.whole(), or answer.chunks()
The shape of answers is OpenAI's, what vLLM adds is vLLM's. Log-probabilities are the model's own, before
temperature and the like, of one tensor and not rounded: clients compare them with ==.
"""

import time
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from nanogpt.inference.tokens import Token
from nanogpt.server.config import ServeConfig
from nanogpt.server.jobs import Job, Prompt, read_prompt
from nanogpt.server.protocol import ApiError, CompletionRequest, encoded, json_bytes
from nanogpt.server.served import Delta, Served, Text
from nanogpt.tokenizer.base import Tokenizer

FINISH_REASONS = {"length": "length", "stop": "stop", "end_of_text": "stop"}
"""Ours -> OpenAI's."""


def token_text(tokenizer: Tokenizer, number: int) -> str:
    """A token as text, each another one: bytes that are no text are spelled out, as OpenAI does."""
    raw = tokenizer.tokens[number]
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@dataclass(frozen=True)
class Piece:
    """A token of an answer."""

    token: Token
    text: str
    offset: int
    """Number of characters of the answer before it."""


def pieces(parts: Iterable[tuple[Token, str]], offset: int = 0) -> list[Piece]:
    """Tokens with their places in an answer."""
    found: list[Piece] = []
    for token, text in parts:
        found.append(Piece(token, text, offset))
        offset += len(text)
    return found


def prompt_parts(tokenizer: Tokenizer, prompt: Prompt, scored: list[Token]) -> list[tuple[Token, str]]:
    """The tokens of a prompt, each with its text. scored: those but the first, with log-probabilities."""
    tokens = [Token(prompt.ids[0]), *(scored or map(Token, prompt.ids[1:]))]
    decode = tokenizer.decoder()
    texts = [decode(token.id) for token in tokens]
    texts[-1] += prompt.text[len("".join(texts)) :]
    return list(zip(tokens, texts, strict=True))


def describe_logprobs(tokenizer: Tokenizer, found: list[Piece]) -> dict[str, Any]:
    """Log-probabilities in OpenAI's shape; null for the first token of a text."""
    return {
        "tokens": [token_text(tokenizer, piece.token.id) for piece in found],
        "token_logprobs": [piece.token.logprob for piece in found],
        "top_logprobs": [describe_top(tokenizer, piece.token) for piece in found],
        "text_offset": [piece.offset for piece in found],
    }


def describe_top(tokenizer: Tokenizer, token: Token) -> dict[str, float] | None:
    """The likeliest tokens and the chosen one, with their log-probabilities."""
    if token.logprob is None:
        return None
    named = ((token_text(tokenizer, i), logprob) for i, logprob in (*token.top, (token.id, token.logprob)))
    return dict(named)


def describe_prompt_logprobs(tokenizer: Tokenizer, scored: list[Token]) -> list[dict[str, Any] | None]:
    """Log-probabilities of a prompt in vLLM's shape."""
    described: list[dict[str, Any] | None] = [None]
    for token in scored:
        ranks = {i: rank for rank, (i, _) in enumerate(token.top, 1)}
        described.append(
            {
                str(i): {"logprob": logprob, "rank": ranks.get(i), "decoded_token": token_text(tokenizer, i)}
                for i, logprob in (*token.top, (token.id, token.logprob))
            }
        )
    return described


class Completion:
    """The answer to a request."""

    def __init__(self, served: Served, request: CompletionRequest, limits: ServeConfig) -> None:
        """Submit its texts. Raises: ApiError for an impossible request."""
        if request.suffix:
            raise ApiError(400, "suffix is not supported: this model continues texts only", param="suffix")
        n = request.n or 1
        best_of = request.best_of or n
        if best_of < n:
            raise ApiError(400, f"best_of {best_of} is less than n {n}", param="best_of")
        if best_of > n and request.stream:
            raise ApiError(400, "best_of cannot be streamed: leave out one of the two", param="best_of")
        self.served, self.request, self.n = served, request, n
        self.prompts = [read_prompt(served, given) for given in request.prompts]
        if not self.prompts:
            raise ApiError(400, "prompt is an empty list: give at least one", param="prompt")
        echoed = request.logprobs if request.echo else None
        wanted = [count for count in (echoed, request.prompt_logprobs) if count is not None]
        self.job = Job(
            served,
            self.prompts,
            request,
            limits,
            count=best_of,
            num_tokens=request.max_tokens,
            logprobs=0 if request.logprobs is None and best_of > n else request.logprobs,
            prompt_logprobs=max(wanted, default=None),
        )
        self.head: dict[str, Any] = {
            "id": f"cmpl-{time.time_ns():x}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }
        self.offsets = [0] * len(self.job.texts)
        """Number of characters of each choice that have been described."""

    async def whole(self) -> bytes:
        """The answer in JSON, once all texts have ended. Raises: ApiError if one could not be made."""
        await self.job.finished()
        entries = sum(text.since().entries for text in self.job.texts)
        return await encoded(entries, lambda: self.describe(enumerate(self.best()), usage=True))

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The answer in chunks of JSON, as it is made. Raises: ApiError if a text could not be made."""
        options = self.request.stream_options
        usage = bool(options and options.include_usage)
        always = usage and bool(options and options.continuous_usage_stats)
        async for index, delta in self.job.deltas():
            yield await encoded(delta.entries, partial(self.describe, [(index, delta)], usage=always))
        if usage:
            yield json_bytes(self.describe([], usage=True))

    def best(self) -> list[Delta]:
        """The n texts of each prompt; if there are more, those with the highest mean log-probability."""
        texts, count = self.job.texts, self.job.count
        found: list[Text] = []
        for first in range(0, len(texts), count):
            own = texts[first : first + count]
            found += own if count == self.n else sorted(own, key=mean_logprob, reverse=True)[: self.n]
        return [text.since() for text in found]

    def describe(self, deltas: Iterable[tuple[int, Delta]], *, usage: bool) -> dict[str, Any]:
        """An answer, or a chunk of it, with parts of texts, by index of the choice."""
        choices = (self.choice(index, delta) for index, delta in deltas)  # one at a time: they may be large
        return self.head | {"choices": choices} | ({"usage": self.job.usage()} if usage else {})

    def choice(self, index: int, delta: Delta) -> dict[str, Any]:
        """A part of a choice. The prompt stands before the first one, if it is to be echoed."""
        prompt, tokenizer = self.prompts[index // self.n], self.served.tokenizer
        tokens, begins, reason = delta.tokens, delta.first == 0, delta.finish_reason
        if self.request.echo and begins:
            tokens = prompt_parts(tokenizer, prompt, delta.text.prompt_tokens) + tokens
        found = pieces(tokens, self.offsets[index])
        content = "".join(piece.text for piece in found)
        self.offsets[index] += len(content)
        scored = self.request.logprobs is not None
        choice: dict[str, Any] = {
            "index": index,
            "text": content,
            "logprobs": describe_logprobs(tokenizer, found) if scored else None,
            "finish_reason": None if reason is None else FINISH_REASONS[reason],
        }
        if self.request.return_token_ids:
            choice["token_ids"] = [piece.token.id for piece in found]
            choice["prompt_token_ids"] = prompt.ids if begins else None
        if self.request.prompt_logprobs is not None and begins:
            choice["prompt_logprobs"] = describe_prompt_logprobs(tokenizer, delta.text.prompt_tokens)
        return choice


def mean_logprob(text: Text) -> float:
    """The mean log-probability of the tokens of a text; of none, 0."""
    return fmean([token.logprob or 0.0 for token, _ in text.parts] or [0.0])
