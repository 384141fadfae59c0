"""Tokenizers: text <-> ids. The interface of all of them, and the two simplest: characters and bytes.

Example: tokenizer = CharTokenizer.train(text); ids = tokenizer.encode(text); tokenizer.decode(ids)
to_dict and registry.from_dict save and load a tokenizer, as plain types in vocab.pt and in every checkpoint.
Encoding is a table lookup, of bytes or of code points: no Python loop touches a character.

Shapes: V vocab_size, N tokens
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from nanogpt.errors import UserError
from nanogpt.text.encoding import utf8

ENCODE_CHARS = 1 << 16
"""Characters to encode at a time: their copy in UTF-32 (256 KiB) stays in the processor's cache."""

CODE_POINTS = 0x110000
"""Number of code points in Unicode."""

END_OF_TEXT = "<|endoftext|>"
"""How the token that ends a document is shown. The same characters in a text are ordinary text."""

Ids = NDArray[np.unsignedinteger[Any]]


class TrainingText(Protocol):
    """The text that a tokenizer is made from."""

    @property
    def characters(self) -> str:
        """Every different character of the whole text, in order of code point."""
        ...

    @property
    def documents(self) -> int:
        """Number of documents in the whole text."""
        ...

    def sample(self) -> bytes:
        """Chunks of the training split in UTF-8, separated by the byte 0xFF. Reads the text again."""
        ...


class Tokenizer(ABC):
    """Text <-> ids.

    tokens: the UTF-8 bytes of each of the V ids. end_of_text: the id that ends a document, if there is one.
    A new kind of tokenizer is a subclass and a row in registry.py.
    """

    kind: ClassVar[str]
    """The name of the class in registry.py and in saved tokenizers."""
    unit: ClassVar[str] = "tokens"
    """The noun for its tokens, in messages."""
    min_vocab_size: ClassVar[int | None] = None
    """Least --vocab_size; None: the vocabulary does not depend on --vocab_size."""
    tokens: list[bytes]
    end_of_text: int | None = None
    keeps_text: bool = True
    """Whether decode is the inverse of encode; a normalizer, for one, changes the text first."""

    @classmethod
    def from_text(cls, text: TrainingText, vocab_size: int) -> "Tokenizer":
        """A new tokenizer for a text. Raises: UserError if the text is too small for `vocab_size`."""
        raise NotImplementedError(f"{cls.__name__} is not made from a text")

    @classmethod
    @abstractmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Tokenizer":
        """Inverse of to_dict. Raises: any exception if `saved` is malformed."""

    @property
    def vocab_size(self) -> int:
        """Number of different ids."""
        return len(self.tokens)

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """The narrowest integer type that holds every id."""
        return narrowest_dtype(self.vocab_size)

    @abstractmethod
    def encode_batch(self, texts: Sequence[bytes]) -> tuple[Ids, NDArray[np.int64]]:
        """Ids of several texts in UTF-8, concatenated, (N,), and how many each text has, (len(texts),)."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The whole tokenizer as plain types."""

    def encode(self, text: str) -> Ids:
        """Ids of `text`, (N,), in the narrowest type. A lone surrogate becomes U+FFFD.

        Raises: UserError if a character has no id.
        """
        return self.encode_batch([utf8(text)])[0]

    def unknown_characters(self, text: str) -> list[str]:
        """The characters of `text` without an id, each once, in order. By default there are none."""
        return []

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, the inverse of encode. Bytes that are not UTF-8 become U+FFFD."""
        return b"".join([self.tokens[i] for i in ids]).decode("utf-8", "replace")

    def decoder(self) -> Callable[[int], str]:
        """A stateful function: given one id after the other, the text that each adds.

        A character that is split between tokens is added with its last byte.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda i: utf8.decode(self.tokens[i])

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of each id as it comes (see `decoder`), then what is left of an incomplete character."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            yield utf8.decode(self.tokens[i])
        yield utf8.decode(b"", final=True)


class CharTokenizer(Tokenizer):
    """One id per character, in order of code point.

    chars: the vocabulary. The id of a character is its index in it; the id len(chars) ends a document.
    """

    kind = "char"
    unit = "different characters"

    def __init__(self, chars: str, *, end_of_text: bool = False) -> None:
        self.chars = chars
        self.tokens = [char.encode("utf-8", "surrogatepass") for char in chars]
        if end_of_text:
            self.end_of_text = len(chars)
            self.tokens.append(END_OF_TEXT.encode())
        self.points = code_points(chars)  # (V,) id -> code point
        self.ids = np.full(CODE_POINTS, -1, dtype=np.int32)  # code point -> id; -1: unknown
        self.ids[self.points] = np.arange(len(chars), dtype=np.int32)
        # Ids of ASCII characters are below 128, since ids are in order of code point.
        self.ascii = bytes(max(i, 0) for i in self.ids[:256].tolist() if i < 256).ljust(256)
        self.unknown_ascii = bytes(np.flatnonzero(self.ids[:128] < 0).tolist())

    @classmethod
    def from_text(cls, text: TrainingText, vocab_size: int) -> "CharTokenizer":
        """The tokenizer of all characters of a text, and of an end-of-text token for several documents."""
        return cls(text.characters, end_of_text=text.documents > 1)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "CharTokenizer":
        """Inverse of to_dict."""
        return cls(saved["chars"], end_of_text=saved.get("end_of_text", False))

    @classmethod
    def train(cls, text: str, *, end_of_text: bool = False) -> "CharTokenizer":
        """The tokenizer of all characters in `text`."""
        seen = np.zeros(CODE_POINTS, dtype=np.bool_)
        for chunk in split_text(text):
            mark_characters(seen, chunk.encode("utf-8", "surrogatepass"))
        return cls(marked_characters(seen), end_of_text=end_of_text)

    def encode(self, text: str) -> Ids:
        """Ids of the characters of `text`, lone surrogates too. Raises: UserError naming the unknown ones."""
        return self.encode_utf8(text.encode("utf-8", "surrogatepass"))

    def encode_batch(self, texts: Sequence[bytes]) -> tuple[Ids, NDArray[np.int64]]:
        """As Tokenizer.encode_batch. Raises: UserError naming the characters not in the vocabulary."""
        if len(texts) == 1:
            ids = self.encode_utf8(texts[0])
            return ids, np.array([len(ids)])
        parts = [self.encode_utf8(text) for text in texts] if has_multibyte(texts) else None
        if parts is None:
            return self.encode_utf8(b"".join(texts)), np.array([len(text) for text in texts], np.int64)
        return np.concatenate(parts), np.array([len(part) for part in parts], np.int64)

    def encode_utf8(self, raw: bytes) -> Ids:
        """Ids of the characters of a text in UTF-8. Raises: UserError naming the unknown ones."""
        if raw.isascii() and not has_any(raw, self.unknown_ascii):
            return np.frombuffer(raw.translate(self.ascii), np.uint8).astype(self.dtype, copy=False)
        text = raw.decode("utf-8", "surrogatepass")
        ids = np.empty(len(text), dtype=self.dtype)
        start = 0
        for chunk in split_text(text):
            found = self.ids[code_points(chunk)]
            if found.min() < 0:
                raise UserError(self.unknown_message(text))
            ids[start : start + len(chunk)] = found
            start += len(chunk)
        return ids

    def unknown_message(self, text: str) -> str:
        """The error message for `text`: the unknown characters, and the position of the first."""
        missing = self.unknown_characters(text)
        names = ", ".join([*map(describe_character, missing[:5]), *(["..."] if len(missing) > 5 else [])])
        where = f"at position {text.index(missing[0])}"
        of = f"not in the vocabulary of {len(self.chars)} characters"
        if len(missing) == 1:
            return f"character {names} {where} is {of}: leave it out"
        return f"characters {names} (the first {where}) are {of}: leave them out"

    def unknown_characters(self, text: str) -> list[str]:
        """The characters of `text` that are not in the vocabulary, each once, in order."""
        return [char for char in dict.fromkeys(text) if self.ids[ord(char)] < 0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, the inverse of encode, lone surrogates too."""
        return b"".join([self.tokens[i] for i in ids]).decode("utf-8", "surrogatepass")

    def decoder(self) -> Callable[[int], str]:
        """As Tokenizer.decoder: the character of an id."""
        return lambda i: self.decode([i])

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of `ids` as they come."""
        return map(self.decoder(), ids)

    def to_dict(self) -> dict[str, Any]:
        """The whole tokenizer as plain types."""
        return {"kind": self.kind, "chars": self.chars, "end_of_text": self.end_of_text is not None}


class ByteTokenizer(Tokenizer):
    """One id per byte of UTF-8, 256 of them, so that every text can be encoded.

    The byte 0xFF, which never occurs in UTF-8, ends a document.
    """

    kind = "byte"
    end_of_text = 255

    def __init__(self) -> None:
        self.tokens = [bytes([i]) for i in range(255)] + [END_OF_TEXT.encode()]

    @classmethod
    def from_text(cls, text: TrainingText, vocab_size: int) -> "ByteTokenizer":
        """The tokenizer: it is the same for every text."""
        return cls()

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "ByteTokenizer":
        """Inverse of to_dict."""
        return cls()

    def encode_batch(self, texts: Sequence[bytes]) -> tuple[Ids, NDArray[np.int64]]:
        """As Tokenizer.encode_batch."""
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        return np.frombuffer(b"".join(texts), np.uint8), lengths

    def to_dict(self) -> dict[str, Any]:
        """The whole tokenizer as plain types."""
        return {"kind": self.kind}


def narrowest_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The narrowest unsigned type that holds the ids 0 .. vocab_size - 1."""
    if vocab_size <= 1 << 8:
        return np.uint8
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def mark_characters(seen: NDArray[np.bool_], raw: bytes) -> None:
    """Set seen[c], (CODE_POINTS,), for every code point c of a text in UTF-8."""
    known = bytes(np.flatnonzero(seen[:128]).tolist())
    rest = raw.translate(None, known)  # mostly empty, else characters of several bytes
    for char in set(rest.decode("utf-8", "surrogatepass")):
        seen[ord(char)] = True


def marked_characters(seen: NDArray[np.bool_]) -> str:
    """The characters that mark_characters has marked, in order of code point."""
    return "".join(map(chr, np.flatnonzero(seen).tolist()))


def has_multibyte(texts: Sequence[bytes]) -> bool:
    """Whether one of the texts has a character of several bytes."""
    return not all(text.isascii() for text in texts)


def has_any(raw: bytes, values: bytes) -> bool:
    """Whether one of the byte values occurs in `raw`."""
    return len(raw.translate(None, values)) < len(raw)


def code_points(text: str) -> NDArray[np.uint32]:
    """The Unicode code points of `text`, shape (len(text),)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def split_text(text: str) -> Iterator[str]:
    """Split `text` into parts of at most ENCODE_CHARS characters."""
    for start in range(0, len(text), ENCODE_CHARS):
        yield text[start : start + ENCODE_CHARS]


def describe_character(char: str) -> str:
    """A character for a message: itself and its code point."""
    return f"{char!r} (U+{ord(char):04X})"
