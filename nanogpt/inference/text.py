"""Text as it is made: decoded token by token, up to the end of the text or a stop string.

Example: for text in generate_text(model, tokenizer, prompt, num_tokens=100, stop=["JULIET:"]): ...
Knows nothing of files or of printing.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

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
"""Why a text ends: after num_tokens, before a stop string, or because the model ends it."""


class TextStream(Iterator[str]):
    """The text of tokens, in chunks, as they come; a chunk never ends within a character.

    A character of which the last bytes are missing at the end is left out.
    made: takes each token with the text that it adds, if it is wanted.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tokens: Iterable[Token],
        stop: Sequence[str] = (),
        made: "deque[tuple[Token, str]] | None" = None,
    ) -> None:
        require(not isinstance(stop, str), f"stop={stop!r} is a text: give a list of texts")
        require("" not in stop, 'stop has an empty text, "", which would stop at once: leave it out')
        self.tokenizer, self.made = tokenizer, made
        self.finish_reason: FinishReason = "stop"
        """Why the text ended, once it has; it is "stop" unless the tokens end first."""
        self.chunks = stop_at(self.pieces(tokens), stop)

    def __next__(self) -> str:
        """The next chunk."""
        return next(self.chunks)

    def pieces(self, tokens: Iterable[Token]) -> Iterator[str]:
        """The text that each token adds: "" while its last character is incomplete."""
        taken: deque[Token] = deque()
        for piece in self.tokenizer.stream(self.until_end(tokens, taken)):
            if not taken:
                break  # no token belongs to it: a character that no token completes
            token = taken.popleft()
            if self.made is not None:
                self.made.append((token, piece))
            yield piece

    def until_end(self, tokens: Iterable[Token], taken: "deque[Token]") -> Iterator[int]:
        """The ids of the tokens before the end of the text; `taken` gets the tokens."""
        for token in tokens:
            if token.id == self.tokenizer.end_of_text:
                self.finish_reason = "end_of_text"
                return
            taken.append(token)
            yield token.id
        self.finish_reason = "length"


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
    """Continue one prompt (1, T) int64: an iterator over the new text, in chunks, as it is made.

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

    A step of the batch is computed when a text is read that needs it, so the first text can be read while it
    is made, and nothing is computed once all texts have ended. See generate_rows for memory that runs out.
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
    """Each token of a text with the part of the text that it adds, as soon as that is certain.

    Together the parts are the text. A token that begins a character adds "", the one that completes it adds
    the character. The text ends as in generate_text: tokens of a stop string are left out.
    """
    return certain_tokens(TextStream(tokenizer, tokens, stop, deque()))


def certain_tokens(stream: TextStream) -> Iterator[tuple[Token, str]]:
    """As token_texts, of a stream that collects what is made: it knows afterwards why the text ends."""
    made = stream.made
    assert made is not None
    certain = 0  # number of characters of the text whose tokens are still in `made`
    for chunk in stream:
        certain += len(chunk)
        while made and len(made[0][1]) <= certain:
            certain -= len(made[0][1])
            yield made.popleft()
    while made and (certain or stream.finish_reason != "stop"):
        token, piece = made.popleft()
        yield token, piece[:certain]
        certain = max(0, certain - len(piece))


def resolve_logit_bias(params: Params, tokenizer: Tokenizer) -> Params:
    """Replace the texts in params.logit_bias with the ids of their tokens.

    Raises: UserError if a text is not one token, or an id is not of the vocabulary.
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
    """The id of a text that is one token. Raises: UserError if it is not."""
    try:
        ids = tokenizer.encode(text).tolist()
    except UserError as error:
        raise UserError(f"--logit_bias {text!r}: {error}") from error
    parts = " ".join(f"id:{i} ({tokenizer.decode([i])!r})" for i in ids)
    require(len(ids) == 1, f"--logit_bias {text!r} is {len(ids)} tokens, not one: {parts}".rstrip(": "))
    return ids[0]


def stop_at(chunks: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Pass text on up to the first stop string, which is left out.

    The end of the text is held back as long as it may be the beginning of a stop string: with the stop string
    "END", the chunks "THE E" and "ND." become "THE ".
    """
    pending = ""
    for chunk in chunks:
        pending += chunk
        found = [position for string in stop if (position := pending.find(string)) >= 0]
        if found:
            pending = pending[: min(found)]
            break
        held_back = max((partial_match(pending, string) for string in stop), default=0)
        if len(pending) > held_back:
            yield pending[: len(pending) - held_back]
            pending = pending[len(pending) - held_back :]
    if pending:
        yield pending


def partial_match(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`, without being all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
