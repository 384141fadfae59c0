"""Jobs: the texts of a request, from the request to their end.

Example: job = Job(served, prompts, fields, limits); await job.finished(); job.texts[0].parts
Each job has to be ended, which frees the rows and the memory of its texts.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nanogpt.errors import UserError
from nanogpt.inference.scheduler import Request
from nanogpt.inference.text import TokenTexts
from nanogpt.server.config import ServeConfig
from nanogpt.server.protocol import ApiError, SamplingFields
from nanogpt.server.served import Delta, Served, Text

DEFAULT_MAX_TOKENS = 16
"""New tokens unless the request says how many, as OpenAI has it."""

TOO_SLOW = "the text was not finished within this server's deadline"


MAX_ENTRIES = 2_000_000
"""Most tokens of a request with those that it wants to know besides (logprobs); each takes some 100 bytes."""

ALL_ENTRIES = 2 * MAX_ENTRIES
"""The same for all requests together."""


@dataclass(frozen=True)
class Prompt:
    """A prompt."""

    text: str
    ids: list[int]


def read_prompt(
    served: Served, given: str | list[int], *, whole: bool = True, field: str = "prompt"
) -> Prompt:
    """A prompt of a request. Raises: ApiError if it is empty, too long, or has unknown characters or ids.

    whole: whether it must fit into the context, and be continued. field: what gave it, for messages.
    """
    tokenizer = served.tokenizer
    if isinstance(given, str):
        try:
            ids = tokenizer.encode(given).tolist()
        except UserError as error:
            if given != "\n" or tokenizer.end_of_text is None:
                raise ApiError(400, f"{field}: {error}", param=field) from error
            given, ids = "", [tokenizer.end_of_text]
        prompt = Prompt(given, ids)
    else:
        if given and max(given) >= tokenizer.vocab_size:
            message = (
                f"{field}: the ids of this vocabulary are below {tokenizer.vocab_size}, not {max(given)}"
            )
            raise ApiError(400, message, param=field)
        prompt = Prompt(tokenizer.decode(given), given)
    if not prompt.ids:
        raise ApiError(400, f"{field} is empty: give at least one token", param=field)
    if whole and len(prompt.ids) > served.context:
        message = f"{field}: {len(prompt.ids)} tokens, but this model's context is {served.context}"
        raise ApiError(400, message, param=field, code="context_length_exceeded")
    return prompt


def refusal(served: Served) -> ApiError:
    """Why the engine takes nothing more."""
    if served.engine.closing:
        return ApiError(503, served.engine.closing)
    return ApiError(429, "too many texts are waiting: try again in a moment")


def failure(served: Served, error: str) -> ApiError:
    """Why the engine could not make something."""
    return ApiError(503 if error == served.engine.closing else 500, error)


class Job:
    """The texts of a request: `count` for each prompt, with the seeds seed, seed + 1, ..."""

    def __init__(
        self,
        served: Served,
        prompts: Sequence[Prompt],
        fields: SamplingFields,
        limits: ServeConfig,
        *,
        count: int,
        num_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> None:
        """Submit the texts to the engine. Raises: ApiError for too much of something."""
        num_tokens = DEFAULT_MAX_TOKENS if num_tokens is None else num_tokens
        if num_tokens > limits.max_tokens:
            message = f"max_tokens {num_tokens} is more than this server's limit, {limits.max_tokens}"
            raise ApiError(400, message, param="max_tokens")
        if count * len(prompts) > limits.max_texts:
            message = f"{count * len(prompts)} texts are more than this server's limit, {limits.max_texts}"
            raise ApiError(400, message, param="n")
        entries = count * sum(
            num_tokens * (1 + (logprobs or 0)) + len(prompt.ids) * (1 + (prompt_logprobs or 0))
            for prompt in prompts
        )
        if entries > MAX_ENTRIES:
            message = f"texts with {entries:,} tokens and alternatives are too much: at most {MAX_ENTRIES:,}"
            raise ApiError(400, message, param="max_tokens")
        self.served, self.prompts, self.count, self.entries = served, prompts, count, entries
        self.changed = asyncio.Event()
        self.late = False
        """Whether the deadline is over."""
        params = fields.sampling_params(served.tokenizer.vocab_size)
        end = served.tokenizer.end_of_text
        ends = tuple(fields.stop_token_ids or ())
        if any(token >= served.tokenizer.vocab_size for token in ends):
            raise ApiError(400, "stop_token_ids: an id is not of this vocabulary", param="stop_token_ids")
        seed = secrets.randbits(32) if fields.seed is None else fields.seed & (2**63 - 1)
        self.texts = [self.text(fields, ends) for _ in prompts for _ in range(count)]
        requests = [
            Request(
                torch.from_numpy(np.array(prompts[number // count].ids, dtype=np.int64)),
                params,
                num_tokens,
                seed + number,
                text,
                logprobs,
                prompt_logprobs,
                fields.min_tokens or 0,
                ends if end is None or fields.ignore_eos else (end, *ends),
            )
            for number, text in enumerate(self.texts)
        ]
        if served.load.entries + entries > ALL_ENTRIES or not served.engine.submit(requests):
            raise refusal(served)
        served.load.entries += entries
        self.timer = asyncio.get_running_loop().call_later(limits.deadline, self.expire)

    def text(self, fields: SamplingFields, ends: Sequence[int]) -> Text:
        """A new text."""
        texts = TokenTexts(self.served.tokenizer, fields.stops)
        if fields.ignore_eos:
            texts.end_of_text = None
        return Text(texts, self.served.bridge, self.changed, frozenset(ends))

    async def updates(self) -> AsyncIterator[None]:
        """Wait for updates of the texts, again and again, until all have ended.

        The last one may come at any time: before anyone waits for it, or while someone reads the one before.
        Raises: ApiError if a text could not be made, or the deadline is over.
        """
        over = False
        while not over:
            await self.changed.wait()
            self.changed.clear()
            self.check()
            over = all(text.finish_reason is not None for text in self.texts)
            if self.late and not over:
                raise ApiError(504, TOO_SLOW)
            yield

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Wait as `updates` does: the number of each text that has grown or ended, and the new part of it."""
        known, over = [0] * len(self.texts), [False] * len(self.texts)
        async for _ in self.updates():
            for number, text in enumerate(self.texts):
                ended, before = text.finish_reason is not None, known[number]
                if over[number] or (len(text.parts) == before and not ended):
                    continue
                known[number], over[number] = len(text.parts), ended
                yield number, text.since(before)

    def expire(self) -> None:
        """Let whoever waits know that the deadline is over."""
        self.late = True
        self.changed.set()

    def check(self) -> None:
        """Raise ApiError if a text could not be made."""
        error = next((text.error for text in self.texts if text.error), "")
        if error:
            raise failure(self.served, error)

    async def finished(self) -> None:
        """Wait until all texts have ended. Raises: as `updates`."""
        async for _ in self.updates():
            pass

    def end(self) -> None:
        """Give up the texts that have not ended. Is called once, as the texts are not needed any more."""
        self.timer.cancel()
        self.served.load.entries -= self.entries
        for text in self.texts:
            text.cancelled = True

    def usage(self) -> dict[str, int]:
        """Number of tokens so far."""
        prompt, new = sum(len(prompt.ids) for prompt in self.prompts), sum(map(len_of_parts, self.texts))
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def len_of_parts(text: Text) -> int:
    """Number of tokens of a text."""
    return len(text.parts)
