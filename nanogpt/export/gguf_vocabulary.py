"""The tokenizers of a GGUF file: tokens spelled as in GPT-2's vocabulary, and merges.

Example: write(writer, vocabulary(tokenizer))
llama.cpp has byte-pair encoding and no tokenizer of characters. Merges make one: those that join the bytes of
each character, from left to right. UTF-8 says where a character begins, so that no merge crosses two of them.
The first bytes of a character, merged, need no id. A character that is not in the vocabulary is left out.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanogpt.export.tokenizer_json import tokenizer_json
from nanogpt.tokenizer.base import END_OF_TEXT, ByteTokenizer, CharTokenizer, Tokenizer
from nanogpt.tokenizer.bpe import BPETokenizer, ForeignTokenizer, added_tokens, plain_tokens, spell

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens: text, never text, text that is never split, and none."""

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
"""Qwen2's rule for words, which Qwen3 has too. It is compared, not run."""

NO_MERGE = " ".join([spell(b"\xc0")] * 2)
"""A merge of bytes that UTF-8 does not have: the list of merges may not be empty."""

NO_SPACES_CLEANED = "qwen2"
"""A rule for words in whose company llama.cpp deletes no spaces from what it decodes."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF describes it."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    end_of_text: int
    pre: str = NO_SPACES_CLEANED
    """Name of the rule by which llama.cpp splits a text into words first."""
    added_end: bool = False
    """Whether the end of a text is a token that the model does not have.

    llama.cpp ends a text at a token of its own choice (11) if it is not told one."""


def misfits(tokenizer: Tokenizer) -> list[str]:
    """What of a tokenizer llama.cpp cannot express."""
    if isinstance(tokenizer, ForeignTokenizer):
        return ["a tokenizer.json other than byte-level BPE"]
    if isinstance(tokenizer, BPETokenizer) and rule_for_words(json.loads(tokenizer.source)) is None:
        return ["a tokenizer.json that splits words unlike GPT-2 and Qwen2"]
    return []


def rule_for_words(described: Mapping[str, Any]) -> str | None:
    """The rule by which a byte-level BPE splits a text into words: gpt-2 or qwen2; None: another."""
    model: dict[str, Any] = described["model"]
    if any(model.get(name) for name in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")):
        return None
    words: dict[str, Any] = described.get("pre_tokenizer") or {}
    parts: list[dict[str, Any]] = words.get("pretokenizers") or [words]
    *splits, last = parts
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") is not False:
        return None
    uses_regex, qwen2 = last.get("use_regex", True), {"Regex": QWEN2_WORDS}
    if not splits and uses_regex:
        return "gpt-2"
    isolated = [("Split", qwen2, "Isolated", False)]
    found = [tuple(split.get(key) for key in ("type", "pattern", "behavior", "invert")) for split in splits]
    return "qwen2" if found == isolated and not uses_regex else None


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of a tokenizer, with a token that ends a text."""
    return MAKERS[tokenizer.kind](tokenizer)


def char_vocabulary(tokenizer: CharTokenizer) -> Vocabulary:
    """Characters as tokens, with the merges of their bytes."""
    size = len(tokenizer.chars)
    spelled = [spell(token) for token in tokenizer.tokens[:size]]
    merges = dict.fromkeys(
        f"{token[:length]} {token[length]}" for token in spelled for length in range(1, len(token))
    )
    return Vocabulary(
        tokens=[*spelled, END_OF_TEXT],
        types=[NORMAL] * size + [CONTROL],
        merges=[*merges],
        end_of_text=size,
        added_end=tokenizer.end_of_text is None,
    )


def byte_vocabulary(tokenizer: ByteTokenizer) -> Vocabulary:
    """Bytes as tokens, without merges."""
    end = tokenizer.vocab_size - 1  # 0xFF, which UTF-8 does not have
    return Vocabulary(
        tokens=[END_OF_TEXT if i == end else spell(bytes([i])) for i in range(tokenizer.vocab_size)],
        types=[CONTROL if i == end else NORMAL for i in range(tokenizer.vocab_size)],
        merges=[],
        end_of_text=end,
    )


def bpe_vocabulary(tokenizer: BPETokenizer) -> Vocabulary:
    """The tokens and merges of a tokenizer.json."""
    described = tokenizer_json(tokenizer)
    rule = rule_for_words(described)
    assert rule is not None
    names: dict[int, str] = {i: token for token, i in described["model"]["vocab"].items()}
    added = {i: token for token, i in added_tokens(described).items()}
    types = dict.fromkeys(names, NORMAL) | dict.fromkeys(added, CONTROL)
    types |= {token["id"]: USER_DEFINED for token in plain_tokens(described)}
    ids = range(tokenizer.vocab_size)
    merges: list[str | list[str]] = described["model"]["merges"]
    return Vocabulary(
        tokens=[added.get(i, names.get(i, f"[unused {i}]")) for i in ids],
        types=[types.get(i, UNUSED) for i in ids],
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        end_of_text=tokenizer.end_of_text or 0,
        pre=rule,
    )


MAKERS: dict[str, Callable[[Any], Vocabulary]] = {
    "char": char_vocabulary,
    "byte": byte_vocabulary,
    "bpe": bpe_vocabulary,
}
"""Kind of tokenizer -> a function that describes it."""


def write(writer: "GGUFWriter", vocabulary: Vocabulary) -> None:
    """Write a vocabulary into the header of a file."""
    writer.add_vocab_size(len(vocabulary.tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges or [NO_MERGE])
    writer.add_bos_token_id(vocabulary.end_of_text)
    writer.add_eos_token_id(vocabulary.end_of_text)
    writer.add_add_bos_token(False)
    if vocabulary.added_end:
        writer.add_array("tokenizer.ggml.suppress_tokens", [vocabulary.end_of_text])
