"""Sampler: a model and the prompts that it continues, as texts or as tokens with log-probabilities.

Example: sampler = Sampler.of(load_model("out"), ["ROMEO:"], SampleConfig(num_tokens=100))
         with sampler.computing(): texts = [sampler.text(row) for row in sampler.rows()]
api.py has the function `generate`, which uses it. Knows nothing of progress bars.
"""

import secrets
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch

from nanogpt.checkpoint.format import TextModel
from nanogpt.inference.config import SampleConfig
from nanogpt.inference.prompts import device_of, encode_prompt, generate_in_batches
from nanogpt.inference.steps import copy_for_steps
from nanogpt.inference.text import (
    Alternative,
    FinishReason,
    TextStream,
    TokenTexts,
    alternatives,
    resolve_logit_bias,
)
from nanogpt.inference.tokens import SHORT_MEMORY, Token
from nanogpt.machine.device import autocast, eager_mode, explain_out_of_memory
from nanogpt.model.gpt import GPT
from nanogpt.terminal.console import warn
from nanogpt.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class TextToken:
    """A token of a generated text."""

    text: str
    """The text that it adds: "" if it only begins a character."""
    id: int
    logprob: float
    """Natural logarithm of the model's own probability, before temperature and other parameters."""
    top: tuple[Alternative, ...]
    """The likeliest tokens in its place, likeliest first."""


@dataclass(frozen=True)
class Completion:
    """A generated text with its tokens."""

    prompt: str
    text: str
    """The new text, without the prompt."""
    tokens: tuple[TextToken, ...]
    """Its tokens. Joined, their texts are the text."""
    finish_reason: FinishReason
    """length, stop or end_of_text."""
    seed: int
    """The seed that reproduces this text."""

    def __str__(self) -> str:
        """The text."""
        return self.text


@dataclass(frozen=True)
class Sampler:
    """A model prepared for sampling, and the prompts to continue."""

    model: GPT
    tokenizer: Tokenizer
    prompts: list[str]
    config: SampleConfig
    seed: int
    """Seed of the first text; text i has seed + i."""
    dtype: torch.dtype

    @classmethod
    def of(cls, given: TextModel, prompts: list[str], config: SampleConfig) -> "Sampler":
        """The sampler for a model. Raises: UserError for a wrong logit_bias."""
        model, dtype = copy_for_steps(given.model, given.trained_in, config.dtype, config.quantize)
        seed = secrets.randbits(32) if config.seed is None else config.seed
        return cls(model, given.tokenizer, prompts, resolve_logit_bias(config, given.tokenizer), seed, dtype)

    @contextmanager
    def computing(self) -> Generator[None]:
        """The context in which its tokens are computed."""
        with explain_out_of_memory(), eager_mode(), autocast(device_of(self.model), self.dtype):
            yield

    def rows(self, advance: Callable[[int], object] = int) -> Iterator[Iterator[Token]]:
        """The tokens for each prompt (see generate_in_batches). Raises: UserError for a wrong prompt."""
        skip, device = self.config.unknown == "skip", device_of(self.model)
        ids = [
            encode_prompt(self.tokenizer, prompt, skip_unknown=skip, flag="prompt")[0].to(device)
            for prompt in self.prompts
        ]
        return generate_in_batches(
            self.model,
            ids,
            self.config,
            num_tokens=self.config.num_tokens,
            seed=self.seed,
            logprobs=self.config.logprobs,
            on_short_memory=partial(warn, SHORT_MEMORY),
            advance=advance,
        )

    def completion(self, number: int, row: Iterator[Token]) -> Completion:
        """The text of a row, with its tokens."""
        texts = TokenTexts(self.tokenizer, self.config.stop)
        tokens = tuple(
            TextToken(
                text,
                token.id,
                cast(float, token.logprob),
                alternatives(self.tokenizer, token.top),
            )
            for token, text in texts.add_all(row)
        )
        text = "".join(token.text for token in tokens)
        assert texts.finish_reason is not None
        return Completion(self.prompts[number], text, tokens, texts.finish_reason, self.seed + number)

    def text(self, row: Iterator[Token]) -> str:
        """The text of a row."""
        return "".join(TextStream(self.tokenizer, row, self.config.stop))

    def chunks(self) -> Iterator[str]:
        """The text of the first row, in chunks."""
        with self.computing():
            stream = TextStream(self.tokenizer, next(self.rows()), self.config.stop)
        return self.in_context(stream)

    def in_context(self, stream: TextStream) -> Iterator[str]:
        """The chunks of a stream, each computed within `computing`, which does not extend to their reader."""
        while True:
            with self.computing():
                chunk = next(stream, None)
            if chunk is None:
                return
            yield chunk
