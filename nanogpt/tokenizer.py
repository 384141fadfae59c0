"""Tokenizers: text <-> ids. Here the simplest one: a token is a character.

Use:    tokenizer = CharTokenizer.train(text); ids = tokenizer.encode(text); tokenizer.decode(ids)
Saved:  to_dict / from_dict, plain types, inside vocab.pt and inside every checkpoint.

Encoding is a table lookup in numpy: the text as UTF-32 is an array of code points, and one
indexing turns code points into ids. No Python loop touches a character.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanogpt.config import UserError

CHUNK = 1 << 22
"""Characters encoded at once: bounds the memory of the UTF-32 copy to 16 MiB."""

UNICODE = 0x110000
"""Number of code points in Unicode."""


class CharTokenizer:
    """One id per character, in order of code point.

    chars: the vocabulary; the id of a character is its position in it.
    """

    def __init__(self, chars: str) -> None:
        self.chars = chars
        self.points = code_points(chars)  # (V,) id -> code point
        self.ids = np.full(UNICODE, -1, dtype=np.int32)  # code point -> id, -1 if unknown
        self.ids[self.points] = np.arange(len(chars), dtype=np.int32)

    @property
    def vocab_size(self) -> int:
        """Number of different ids."""
        return len(self.chars)

    @classmethod
    def train(cls, text: str, advance: Callable[[int], object] = int) -> "CharTokenizer":
        """The tokenizer whose vocabulary is every character that occurs in `text`.

        advance: called with the number of characters done since the last call.
        """
        seen = np.zeros(UNICODE, dtype=np.bool_)
        for chunk in chunks(text):
            seen[code_points(chunk)] = True
            advance(len(chunk))
        return cls("".join(map(chr, np.flatnonzero(seen).tolist())))

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """The narrowest integer type that holds every id."""
        return narrowest(self.vocab_size)

    def encode(self, text: str, advance: Callable[[int], object] = int) -> NDArray[np.unsignedinteger[Any]]:
        """Ids of the characters of `text`, shape (len(text),), of the narrowest type.

        advance: called with the number of characters done since the last call.
        Errors: UserError naming the first character that is not in the vocabulary.
        """
        ids = np.empty(len(text), dtype=self.dtype)
        start = 0
        for chunk in chunks(text):
            found = self.ids[code_points(chunk)]
            if found.min() < 0:
                position = start + int(np.argmin(found))
                raise UserError(
                    f"character {describe(text[position])} at position {position} "
                    f"is not in the vocabulary of {self.vocab_size} characters: leave it out"
                )
            ids[start : start + len(chunk)] = found
            start += len(chunk)
            advance(len(chunk))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, the inverse of encode."""
        return "".join(self.chars[i] for i in ids)

    def to_dict(self) -> dict[str, Any]:
        """All of the tokenizer, as plain types."""
        return {"kind": "char", "chars": self.chars}


def from_dict(saved: Mapping[str, Any]) -> CharTokenizer:
    """The tokenizer that to_dict described. Errors: UserError if its kind is unknown."""
    if saved.get("kind") != "char":
        raise UserError(f"unknown tokenizer {saved.get('kind')!r}: update NanoGPT")
    return CharTokenizer(saved["chars"])


def narrowest(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The narrowest unsigned type that holds the ids 0 .. vocab_size - 1."""
    if vocab_size <= 1 << 8:
        return np.uint8
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def code_points(text: str) -> NDArray[np.uint32]:
    """The Unicode code points of `text`, shape (len(text),)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def chunks(text: str) -> Iterator[str]:
    """`text` in pieces of at most CHUNK characters."""
    for start in range(0, len(text), CHUNK):
        yield text[start : start + CHUNK]


def describe(char: str) -> str:
    """A character as a person can recognise it: itself and its code point."""
    return f"{char!r} (U+{ord(char):04X})"
