"""Byte-pair encoding (Sennrich et al. 2016; over bytes: Radford et al. 2019): a token is a piece of a word.

Example: tokenizer = train_bpe(text.encode(), vocab_size=4096); ids = tokenizer.encode(text)
gigatoken learns and encodes. Any other tokenizer.json runs in Hugging Face's tokenizers, the library that
defined the format. reference_bpe.py shows how BPE works.

Shapes: V vocab_size, N tokens
"""

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanogpt.errors import UserError, require
from nanogpt.storage.files import download
from nanogpt.terminal.console import say
from nanogpt.tokenizer.base import END_OF_TEXT, Ids, Tokenizer, TrainingText

UNMERGED_IDS = 257
"""Number of ids in a byte-level BPE without merges: one for each byte, and the end of a text."""

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>", "[SEP]")
"""Names of the token that ends a text in published vocabularies."""

PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))
"""Bytes that a byte-level vocabulary writes as the character of the same number."""

GPT2_ORDER = (*PRINTABLE, *(byte for byte in range(256) if byte not in PRINTABLE))
"""Bytes in the order of GPT-2's ids."""

CHAR_OF = {
    byte: chr(byte if byte in PRINTABLE else 256 + i - len(PRINTABLE)) for i, byte in enumerate(GPT2_ORDER)
}
"""The visible character for each byte in a byte-level vocabulary (Radford et al. 2019)."""

BYTE_OF = {char: byte for byte, char in CHAR_OF.items()}

WORDS: dict[str, Any] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
"""The part of a tokenizer.json that splits a text by GPT-2's rule for words."""


class BPETokenizer(Tokenizer):
    """Byte-pair encoding as a tokenizer.json describes it, in gigatoken.

    source: the whole text of the tokenizer.json, a byte-level BPE (`is_byte_level`). With a normalizer (NFC),
    characters are composed first: e and an accent become é.
    """

    kind = "bpe"
    min_vocab_size = UNMERGED_IDS + 1

    def __init__(self, source: str) -> None:
        import awkward  # noqa: F401 - gigatoken hides that it cannot be had, and why  # pyright: ignore
        import gigatoken

        self.source = source
        described = json.loads(source)
        vocabulary, added = described["model"]["vocab"], added_tokens(described)
        size = max([*vocabulary.values(), *added.values()]) + 1
        self.tokens = [b""] * size
        for token, i in vocabulary.items():
            self.tokens[i] = bytes(BYTE_OF[char] for char in token)
        for token, i in added.items():
            self.tokens[i] = token.encode()
        self.end_of_text = find_end_of_text(self.tokens, added)
        self.keeps_text = described.get("normalizer") is None
        described["added_tokens"] = plain_tokens(described)  # what spells a special token in a text is text
        self.backend = gigatoken.Tokenizer.from_json(json.dumps(described))

    @classmethod
    def from_text(cls, text: TrainingText, vocab_size: int) -> "BPETokenizer":
        """Learn the merges from a sample of a text. Raises: UserError if it is too small for `vocab_size`."""
        sample = text.sample()
        say(f"Learning a vocabulary of {vocab_size:,} from {len(sample) / 1e6:,.1f} MB of text")
        return train_bpe(sample, vocab_size)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "BPETokenizer":
        """Inverse of to_dict."""
        return cls(saved["tokenizer.json"])

    def encode_batch(self, texts: Sequence[bytes]) -> tuple[Ids, NDArray[np.int64]]:
        """As Tokenizer.encode_batch."""
        encoded: Any = self.backend.encode_batch(list(texts), parallel=False)
        if isinstance(encoded, list):  # its fallback if memory is short
            raise MemoryError("no memory for the result of an encoding")
        ids, offsets = encoded.layout.content.data, encoded.layout.offsets.data
        return ids.astype(self.dtype, copy=False), np.diff(offsets)

    def to_dict(self) -> dict[str, Any]:
        """The whole tokenizer as plain types."""
        return {"kind": self.kind, "tokenizer.json": self.source}


class ForeignTokenizer(Tokenizer):
    """Any other tokenizer.json, in the library that defined the format: slower, and right by definition.

    It may change the text, as normalizers do.
    """

    kind = "tokenizer.json"
    keeps_text = False

    def __init__(self, source: str) -> None:
        from tokenizers import Tokenizer as Backend

        self.source = source
        self.backend = Backend.from_str(source)
        self.backend.encode_special_tokens = True  # text that spells a special token stays text
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.tokens = [
            self.backend.decode([i], skip_special_tokens=False).encode("utf-8", "replace")
            for i in range(max(vocabulary.values()) + 1)
        ]
        self.end_of_text = find_end_of_text(self.tokens, added_tokens(json.loads(source)))

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "ForeignTokenizer":
        """Inverse of to_dict."""
        return cls(saved["tokenizer.json"])

    def encode_batch(self, texts: Sequence[bytes]) -> tuple[Ids, NDArray[np.int64]]:
        """As Tokenizer.encode_batch."""
        encoded = self.backend.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        lengths = np.array([len(one.ids) for one in encoded], dtype=np.int64)
        ids = np.concatenate(
            [np.array(one.ids, dtype=self.dtype) for one in encoded] or [np.empty(0, self.dtype)]
        )
        return ids, lengths

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`."""
        return "".join(self.stream(ids))

    def decoder(self) -> Callable[[int], str]:
        """As Tokenizer.decoder."""
        from tokenizers.decoders import DecodeStream

        pieces = DecodeStream(skip_special_tokens=False)
        own_end = self.end_of_text if self.backend.id_to_token(self.end_of_text or 0) is None else None
        return lambda i: END_OF_TEXT if i == own_end else pieces.step(self.backend, int(i)) or ""

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of each id as it comes."""
        return map(self.decoder(), ids)

    def to_dict(self) -> dict[str, Any]:
        """The whole tokenizer as plain types."""
        return {"kind": self.kind, "tokenizer.json": self.source}


def is_byte_level(described: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is a byte-level BPE, of a text as it is or with its characters composed."""
    model: dict[str, Any] = described["model"]
    decoder: dict[str, Any] = described.get("decoder") or {}
    flags = ("normalized", "single_word", "lstrip", "rstrip")
    exact = not any(token.get(flag) for token in plain_tokens(described) for flag in flags)
    return bool(
        model.get("type") == "BPE"
        and not model.get("dropout")
        and not model.get("byte_fallback")
        and described.get("normalizer") in (None, {"type": "NFC"})
        and decoder.get("type") == "ByteLevel"
        and exact
    )


def added_tokens(described: Mapping[str, Any]) -> dict[str, int]:
    """The tokens that a tokenizer.json adds to its model's vocabulary: token -> id."""
    tokens: list[dict[str, Any]] = described.get("added_tokens") or []
    return {token["content"]: token["id"] for token in tokens}


def plain_tokens(described: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The added tokens that are found in a text, as Qwen's <think>; special ones are not."""
    added: list[dict[str, Any]] = described.get("added_tokens") or []
    return [token for token in added if not token.get("special")]


def find_end_of_text(tokens: list[bytes], added: Mapping[str, int]) -> int:
    """The id that ends a document: the vocabulary's own, or a new one, appended to `tokens`."""
    for name in END_OF_TEXT_NAMES:
        if name in added:
            return added[name]
    tokens.append(END_OF_TEXT.encode())
    return len(tokens) - 1


def train_bpe(text: bytes, vocab_size: int) -> BPETokenizer:
    """Learn a byte-level BPE of `vocab_size` ids from UTF-8 text, with GPT-2's rule for words.

    Ids: 256 bytes, the merges in the order they were learned, end-of-text last. The byte 0xFF separates
    documents in `text`. The merges equal those of Hugging Face's trainer, ties included, until a text has no
    more pairs to merge: then gigatoken appends pairs that no longer occur, which encoding never uses.
    Raises: UserError if the text is too small for so many merges.
    """
    from gigatoken.gigatoken_rs import train_bpe as learn

    with silence_output():  # it prints a report
        _, merges = learn(text, vocab_size, [END_OF_TEXT], separator=b"\xff")
    require(
        len(merges) == vocab_size - UNMERGED_IDS,
        f"--vocab_size {vocab_size} is too large for this text, which has only {len(merges)} pairs to merge: "
        f"use at most {len(merges) + UNMERGED_IDS}, or --tokenizer byte",
    )
    return BPETokenizer(byte_level_json(merges))


def byte_level_json(merges: Iterable[tuple[bytes, bytes]], alphabet: Iterable[int] = range(256)) -> str:
    """The tokenizer.json of a byte-level BPE with GPT-2's pre-tokenizer.

    alphabet: the bytes in the order of their ids.
    """
    spelled = [(spell(left), spell(right)) for left, right in merges]
    vocabulary = {CHAR_OF[byte]: i for i, byte in enumerate(alphabet)}
    for left, right in spelled:
        vocabulary.setdefault(left + right, len(vocabulary))
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    described = byte_level(vocabulary, spelled, pre_tokenizer=WORDS, decoder=WORDS)
    described["added_tokens"].append({"id": len(vocabulary), "content": END_OF_TEXT, **added})
    return json.dumps(described, ensure_ascii=False)


def byte_level(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    pre_tokenizer: Mapping[str, Any],
    decoder: Mapping[str, Any],
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """The content of a tokenizer.json of a byte-level BPE, without added tokens.

    pre_tokenizer: how a text is split into words. ignore_merges: a word that is a token need not be merged.
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def gpt2_tokenizer(vocab_bpe: str) -> BPETokenizer:
    """GPT-2's tokenizer, from its published file of merges (vocab.bpe)."""
    pairs = (line.split(" ") for line in vocab_bpe.splitlines()[1:] if line)
    merges = ((unspell(left), unspell(right)) for left, right in pairs)
    return BPETokenizer(byte_level_json(merges, alphabet=GPT2_ORDER))


def download_gpt2() -> BPETokenizer:
    """Download GPT-2's tokenizer. Raises: UserError if it cannot be reached."""
    return gpt2_tokenizer(published_merges())


def published_merges() -> str:
    """Download GPT-2's published file of merges. Raises: UserError if it cannot be reached."""
    try:
        raw = download(GPT2_URL)
    except OSError as error:
        raise UserError(
            "--tokenizer gpt2 cannot be fetched: connect to the internet, or give --tokenizer the path "
            f"of GPT-2's tokenizer.json ({type(error).__name__})"
        ) from error
    require(hashlib.sha256(raw).hexdigest() == GPT2_SHA256, "--tokenizer gpt2 arrived damaged: try again")
    return raw.decode("utf-8")


def spell(token: bytes) -> str:
    """A token's bytes as a byte-level vocabulary writes them."""
    return "".join(CHAR_OF[byte] for byte in token)


def unspell(token: str) -> bytes:
    """Inverse of spell."""
    return bytes(BYTE_OF[char] for char in token)


@contextmanager
def silence_output() -> Generator[None]:
    """Silence compiled code that writes to standard output and error."""
    with open(os.devnull, "w") as nowhere:
        saved = {stream: os.dup(stream) for stream in (1, 2)}
        try:
            for stream in saved:
                os.dup2(nowhere.fileno(), stream)
            yield
        finally:
            for stream, copy in saved.items():
                os.dup2(copy, stream)
                os.close(copy)
