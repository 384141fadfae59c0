"""tokenizer.json and tokenizer_config.json: our tokenizers for Hugging Face's libraries.

Example: described = tokenizer_json(tokenizer); config = tokenizer_config(described, tokenizer, 256)
Both sides encode and decode a text alike, with two differences. Characters that a character vocabulary lacks
are dropped there; here they are an error. A text that spells <|endoftext|> is the end of a text there, unless
it is encoded with split_special_tokens=True; here it is text.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, cast

from nanogpt.tokenizer.base import END_OF_TEXT, ByteTokenizer, CharTokenizer, Tokenizer
from nanogpt.tokenizer.bpe import (
    CHAR_OF,
    WORDS,
    BPETokenizer,
    ForeignTokenizer,
    added_tokens,
    byte_level,
    spell,
)

BYTE_LEVEL = WORDS | {"use_regex": False}
"""Writes each byte as a visible character, and splits nothing."""

EACH_CHARACTER = {
    "type": "Split",
    "pattern": {"Regex": r"[\s\S]"},  # Oniguruma, which reads it, refuses (?s:.)
    "behavior": "Isolated",
    "invert": False,
}
"""Splits a text into its characters."""


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of the tokenizer.json of a tokenizer."""
    described = MAKERS[tokenizer.kind](tokenizer)
    end = tokenizer.end_of_text
    if end is not None and end_of_text_name(described, tokenizer) is None:
        name, known = END_OF_TEXT, vocabulary_of(described)
        while name in known:
            name = f"<{name}>"
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        described["added_tokens"] = [
            *(described.get("added_tokens") or []),
            {"id": end, "content": name, **flags, "special": True},
        ]
    return described


def tokenizer_config(described: Mapping[str, Any], tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    """The content of tokenizer_config.json. context: tokens that the model can take.

    The class is named since transformers 5 would guess it from the model's type, and the tokenizers of GPT-2
    and Qwen3 ignore the tokenizer.json but for its vocabulary: they lose characters.
    """
    name = end_of_text_name(described, tokenizer)
    ends = {} if name is None else {"bos_token": name, "eos_token": name}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        **ends,
    }


def end_of_text_name(described: Mapping[str, Any], tokenizer: Tokenizer) -> str | None:
    """What a tokenizer.json calls the token that ends a text; None if it has none."""
    names = {i: name for name, i in added_tokens(described).items()}
    return None if tokenizer.end_of_text is None else names.get(tokenizer.end_of_text)


def vocabulary_of(described: Mapping[str, Any]) -> set[str]:
    """Every token in a tokenizer.json, as it is written there."""
    vocabulary: Any = described["model"].get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram has pairs
        vocabulary = [word for word, _ in cast(list[tuple[str, float]], vocabulary)]
    return {*vocabulary, *added_tokens(described)}


def char_json(tokenizer: CharTokenizer) -> dict[str, Any]:
    """Each character is a word, and each word a token: its bytes, spelled as in GPT-2's vocabulary.

    Characters as they are would do too, but onnxruntime-genai then loses line breaks.
    """
    vocabulary = {spell(tokenizer.tokens[i]): i for i in range(len(tokenizer.chars))}
    words = {"type": "Sequence", "pretokenizers": [EACH_CHARACTER, BYTE_LEVEL]}
    return byte_level(vocabulary, [], pre_tokenizer=words, decoder=BYTE_LEVEL, ignore_merges=True)


def byte_json(tokenizer: ByteTokenizer) -> dict[str, Any]:
    """Each byte is a token."""
    vocabulary = {CHAR_OF[i]: i for i in range(tokenizer.vocab_size) if i != tokenizer.end_of_text}
    return byte_level(vocabulary, [], pre_tokenizer=BYTE_LEVEL, decoder=BYTE_LEVEL)


def own_json(tokenizer: BPETokenizer | ForeignTokenizer) -> dict[str, Any]:
    """The tokenizer.json that the tokenizer was made from."""
    return json.loads(tokenizer.source)


MAKERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "char": char_json,
    "byte": byte_json,
    "bpe": own_json,
    "tokenizer.json": own_json,
}
"""Kind of tokenizer -> a function that describes it."""
