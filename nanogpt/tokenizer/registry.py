"""Which tokenizer: the one that was saved, or the one in a tokenizer.json.

Use:    tokenizer = from_dict(saved); tokenizer = from_file(Path("tokenizer.json"))
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanogpt.errors import UserError, require
from nanogpt.tokenizer.base import ByteTokenizer, CharTokenizer, Tokenizer
from nanogpt.tokenizer.bpe import BPETokenizer, ForeignTokenizer, is_byte_level

PROBE = "It's 1,234.50\tm²  — naïve\r\n\n  日本語, emoji 🙂🏽 \u00a0 x==y;{}\n\u200bЁё 'll ''s   \x00 end  "
"""Text with one of everything, on which two implementations of a tokenizer must agree."""


def from_dict(saved: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that to_dict described. Errors: UserError if it is of no known kind, or malformed."""
    kind = saved.get("kind")
    kind = kind if isinstance(kind, str) else None
    if kind not in ("char", "byte", "bpe", "tokenizer.json"):
        raise UserError(f"unknown tokenizer {kind!r:.40}: update NanoGPT")
    try:
        return built(saved)
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # compiled code panics in a class of its own
        raise UserError(f"malformed tokenizer of kind {kind}") from error


def built(saved: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a known kind. Errors: anything if it is malformed."""
    match saved["kind"]:
        case "char":
            return CharTokenizer(saved["chars"], end_of_text=saved.get("end_of_text", False))
        case "byte":
            return ByteTokenizer()
        case "bpe":
            return BPETokenizer(saved["tokenizer.json"])
        case _:
            return ForeignTokenizer(saved["tokenizer.json"])


def from_file(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json. Errors: UserError if it is missing or is none."""
    require(
        not path.exists() or path.is_file(), f"--tokenizer {path} cannot be read: it is not a file"
    )  # a pipe has no end
    try:
        source = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"--tokenizer {path} cannot be read: {reason}") from error
    try:
        foreign = ForeignTokenizer(source)
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"--tokenizer {path} is not a tokenizer.json: {error}") from error
    if not is_byte_level(json.loads(source)):
        return foreign
    try:
        fast = BPETokenizer(source)
    except Exception:  # a pre-tokenizer that gigatoken does not know
        return foreign
    same = fast.encode(PROBE).tolist() == foreign.encode(PROBE).tolist()
    return fast if same else foreign
