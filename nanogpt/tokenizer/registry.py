"""The table of tokenizers: how to make one, load a saved one, or open a tokenizer.json.

Example: tokenizer = existing_tokenizer("gpt2") or TOKENIZERS["char"].from_text(text, vocab_size=0)
         tokenizer = from_dict(tokenizer.to_dict())
To add a tokenizer, write a subclass of `Tokenizer` in a file of its own, and give it a row here.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nanogpt.errors import UserError, require
from nanogpt.tokenizer.base import ByteTokenizer, CharTokenizer, Tokenizer
from nanogpt.tokenizer.bpe import BPETokenizer, ForeignTokenizer, added_tokens, download_gpt2, is_byte_level

TOKENIZERS: dict[str, type[Tokenizer]] = {
    "char": CharTokenizer,
    "byte": ByteTokenizer,
    "bpe": BPETokenizer,
    "tokenizer.json": ForeignTokenizer,
}
"""Classes by kind. --tokenizer takes each kind except the last, which is given by its path."""

PUBLISHED: dict[str, Callable[[], Tokenizer]] = {"gpt2": download_gpt2}
"""Tokenizers that are downloaded, by the name that --tokenizer takes."""

SAVED_SUFFIXES = (".pt", ".safetensors")
"""Suffixes of our files with a tokenizer inside, whose path --tokenizer takes (data/saved_tokenizer.py)."""

PROBE = (
    "It's 1,234.50\tm²  — naïve\r\n\n  日本語, emoji 🙂🏽 \u00a0 x==y;{}\n\u200bЁё e\u0301 "
    "'ll ''s   \x00 end  "
)
"""Text with one of everything, on which two implementations of a tokenizer must agree."""


def check_name(name: str, vocab_size: int) -> None:
    """Check the values of --tokenizer and --vocab_size.

    Raises: UserError if the tokenizer is unknown, or needs more tokens.
    """
    names = [*(kind for kind in TOKENIZERS if kind != ForeignTokenizer.kind), *PUBLISHED]
    require(
        name in names or name.endswith((".json", *SAVED_SUFFIXES)),
        f"--tokenizer {name} is unknown: use {', '.join(names)} or the path of a .json, .pt or .safetensors",
    )
    least = min_vocab_size(name)
    require(
        least is None or vocab_size >= least,
        f"--vocab_size {vocab_size} is too small: {name} begins with {(least or 0) - 1} tokens",
    )


def min_vocab_size(name: str) -> int | None:
    """The least --vocab_size for a tokenizer; None if it does not depend on --vocab_size."""
    return TOKENIZERS[name].min_vocab_size if name in TOKENIZERS else None


def existing_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer that --tokenizer names if it exists already; None if it is made from the text.

    Raises: UserError if it cannot be downloaded or opened.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]()
    return from_file(Path(name)) if name.endswith(".json") else None


def from_dict(saved: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that to_dict described.

    Raises: UserError if its kind is unknown, or it is malformed; ImportError without the library it runs in.
    """
    kind = saved.get("kind")
    if not isinstance(kind, str) or kind not in TOKENIZERS:
        kind = kind if isinstance(kind, str) else None
        raise UserError(f"unknown tokenizer {kind!r:.40}: update NanoGPT")
    try:
        return TOKENIZERS[kind].from_dict(saved)
    except (MemoryError, ImportError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # compiled code panics in a class of its own
        raise UserError(f"malformed tokenizer of kind {kind}") from error


def from_file(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json.

    Raises: UserError if the file is missing or is no tokenizer.json; ImportError as `from_dict`.
    """
    require(  # reading a pipe would wait without end
        not path.exists() or path.is_file(), f"--tokenizer {path} cannot be read: it is not a file"
    )
    try:
        source = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"--tokenizer {path} cannot be read: {reason}") from error
    try:
        foreign = ForeignTokenizer(source)
    except ImportError:
        raise
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"--tokenizer {path} is not a tokenizer.json: {error}") from error
    described = json.loads(source)
    if not is_byte_level(described):
        return foreign
    try:
        fast = BPETokenizer(source)
    except Exception:  # gigatoken does not know the pre-tokenizer
        return foreign
    probe = " ".join([PROBE, *added_tokens(described), PROBE])
    same = fast.encode(probe).tolist() == foreign.encode(probe).tolist()
    return fast if same else foreign
