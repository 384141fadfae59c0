"""Text as it is generated: decoded token by token, up to the end of the text or a stop string.

Example: for text in generate_text(model, tokenizer, prompt, num_tokens=100, stop=["JULIET:"]): ...
Knows nothing of files or printing.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from nanogpt.errors import UserError, require
from nanogpt.inference.config import SamplingParams, token_bias
from nanogpt.inference.generate import DEFAULT_PARAMS
from nanogpt.inference.sampling import Randomness
from nanogpt.inference.speculation import NgramGuesses
from nanogpt.inference.tokens import Token, generate_rows, generate_tokens
from nanogpt.model.gpt import GPT
from nanogpt.tokenizer.base import Tokenizer

Params = TypeVar("Params", bound=SamplingParams)

FinishReason = Literal["length", "stop", "end_of_text"]
"""Why a text ended: after num_tokens, before a stop string, or because the model ended it."""


class Alternative(NamedTuple):
    """One of the likeliest tokens at a place of a text."""

    text: str
    id: int
    logprob: float


class TextStream(Iterator[str]):
    """The text of tokens, in chunks, as they come. A chunk never ends within a character.

    A character that is incomplete at the end is left out.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: Iterable[Token], stop: Sequence[str] = ()) -> None:
        self.texts = TokenTexts(tokenizer, stop)
        self.chunks = (text for _, text in self.texts.add_all(tokens) if text)

    def __next__(self) -> str:
        """The next chunk."""
        return next(self.chunks)

    @property
    def finish_reason(self) -> FinishReason:
        """Why the text ended, once it has."""
        return self.texts.finish_reason or "stop"


class TokenTexts:
    """Matches tokens, added one by one, with the text that each adds, as soon as that is certain.

    Together the parts are the text of a TextStream. A token that begins a character adds "", and the one that
    completes it adds the character. The tokens of a stop string are left out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        check_stop(stop)
        self.decode, self.end_of_text, self.stop = tokenizer.decoder(), tokenizer.end_of_text, stop
        self.pending: deque[tuple[Token, str]] = deque()
        """Tokens whose text may belong to a stop string."""
        self.finish_reason: FinishReason | None = None
        """Why the text ended; None while it goes on."""

    def add(self, token: Token) -> list[tuple[Token, str]]:
        """Add a token. Returns those that have become certain, each with its text."""
        if token.id == self.end_of_text:
            return self.finish("end_of_text")
        self.pending.append((token, self.decode(token.id)))
        count, ends = certain_part(self.pending_text(), self.stop)
        return self.cut(count) if ends else self.certain(count)

    def pending_text(self) -> str:
        """The text of the tokens that are pending."""
        return "".join(piece for _, piece in self.pending)

    def certain(self, count: int) -> list[tuple[Token, str]]:
        """Take the tokens whose text is among the next `count` characters."""
        parts: list[tuple[Token, str]] = []
        while count and len(self.pending[0][1]) <= count:
            parts.append(self.pending.popleft())
            count -= len(parts[-1][1])
        return parts

    def cut(self, count: int) -> list[tuple[Token, str]]:
        """End the text before a stop string, after `count` characters. Returns the tokens before it."""
        self.finish_reason = "stop"
        parts = self.certain(count)
        left = count - sum(len(piece) for _, piece in parts)
        return [*parts, (self.pending[0][0], self.pending[0][1][:left])] if left else parts

    def finish(self, reason: FinishReason = "length") -> list[tuple[Token, str]]:
        """End the text, as no token follows. Returns the tokens that are left."""
        found = first_stop(self.pending_text(), self.stop)
        if found is not None:
            return self.cut(found)
        self.finish_reason = reason
        return list(self.pending)

    def add_all(self, tokens: Iterable[Token]) -> Iterator[tuple[Token, str]]:
        """Add tokens until the text ends, and yield each as soon as its text is certain."""
        for token in tokens:
            yield from self.add(token)
            if self.finish_reason is not None:
                return
        yield from self.finish()


def check_stop(stop: Sequence[str]) -> None:
    """Raise UserError if `stop` is one text, or has an empty one."""
    require(not isinstance(stop, str), f"stop={stop!r} is a text: give a list of texts")
    require("" not in stop, 'stop has an empty text, "", which would stop at once: leave it out')


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: Tensor,
    params: SamplingParams = DEFAULT_PARAMS,
    *,
    num_tokens: int,
    stop: Sequence[str] = (),
    generator: Randomness = None,
    guesses: NgramGuesses | None = None,
    **changes: Any,
) -> TextStream:
    """Continue one prompt, (1, T) int64: an iterator over the new text, in chunks, as it is generated.

    It ends after num_tokens tokens, before a string of `stop`, or where the model ends the text.
    params, generator, guesses, changes: as for `generate`; logit_bias may name tokens by their text.
    Raises: UserError as `generate`, and for an empty stop string.
    """
    require(len(prompt) == 1, f"{len(prompt)} prompts: generate_text continues one, generate any number")
    params = resolve_logit_bias(replace(params, **changes), tokenizer)
    steps = generate_tokens(
        model, prompt, params, num_tokens=num_tokens, generator=generator, guesses=guesses
    )
    return TextStream(tokenizer, (step[0] for step in steps), stop)


def generate_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Tensor],
    params: SamplingParams = DEFAULT_PARAMS,
    *,
    num_tokens: int,
    generators: Sequence[torch.Generator],
    stop: Sequence[str] = (),
    on_short_memory: Callable[[], None] = lambda: None,
) -> list[TextStream]:
    """Continue prompts, (T,) int64 each, in one batch: a TextStream for each.

    A step of the batch is computed when the first text that needs it is read: that text can be shown while it
    is generated, and nothing is computed once all texts have ended. If memory runs out: see generate_rows.
    """
    rows = generate_rows(
        model,
        prompts,
        resolve_logit_bias(params, tokenizer),
        num_tokens=num_tokens,
        generators=generators,
        on_short_memory=on_short_memory,
    )
    return [TextStream(tokenizer, row, stop) for row in rows]


def token_texts(
    tokenizer: Tokenizer, tokens: Iterable[Token], stop: Sequence[str] = ()
) -> Iterator[tuple[Token, str]]:
    """Each token with the text that it adds, as soon as that is certain (see TokenTexts)."""
    return TokenTexts(tokenizer, stop).add_all(tokens)


def alternatives(tokenizer: Tokenizer, top: Iterable[tuple[int, float]]) -> tuple[Alternative, ...]:
    """Likely ids and their log-probabilities, with the text of each."""
    return tuple(Alternative(tokenizer.decode([i]), i, logprob) for i, logprob in top)


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token of a complete text adds: "" if it only begins a character.

    A character that is incomplete at the end belongs to the last token.
    """
    pieces = list(tokenizer.stream(ids))
    return [*pieces[: len(ids) - 1], "".join(pieces[len(ids) - 1 :])]


def resolve_logit_bias(params: Params, tokenizer: Tokenizer) -> Params:
    """Replace the texts in params.logit_bias with the ids of their tokens.

    Raises: UserError if a text is not a single token, or an id is outside the vocabulary.
    """
    entries: list[str] = []
    for entry in params.logit_bias:
        token, bias = token_bias(entry)
        number = token if isinstance(token, int) else only_token(token, tokenizer)
        require(
            number < tokenizer.vocab_size,
            f"--logit_bias {entry!r}: the vocabulary has {tokenizer.vocab_size} tokens, from id 0",
        )
        entries.append(f"id:{number}={bias!r}")
    return replace(params, logit_bias=tuple(entries))


def only_token(text: str, tokenizer: Tokenizer) -> int:
    """The id of a text that is a single token. Raises: UserError if it is not."""
    try:
        ids = tokenizer.encode(text).tolist()
    except UserError as error:
        raise UserError(f"--logit_bias {text!r}: {error}") from error
    parts = " ".join(f"id:{i} ({tokenizer.decode([i])!r})" for i in ids)
    require(len(ids) == 1, f"--logit_bias {text!r} is {len(ids)} tokens, not one: {parts}".rstrip(": "))
    return ids[0]


def certain_part(text: str, stop: Sequence[str]) -> tuple[int, bool]:
    """Number of characters of a text that nothing to come can change, and whether it ends after them.

    A text ends before the stop string that begins first. So nothing is certain from a place on where one may
    have begun, even if another one is complete behind it: with "END." and "N", of "THE EN" only "THE " is.
    """
    found, begun = first_stop(text, stop), len(text) - held_back(text, stop)
    return (begun, False) if found is None or begun < found else (found, True)


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string in a text begins; None if there is none."""
    return min((position for string in stop if (position := text.find(string)) >= 0), default=None)


def held_back(text: str, stop: Sequence[str]) -> int:
    """Number of characters at the end of a text that may be the beginning of a stop string."""
    return max((partial_match(text, string) for string in stop), default=0)


def partial_match(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`, without being all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
