"""The registries: every format and every tokenizer has a row, and its line in the documentation."""

from pathlib import Path

import pytest

from nanogpt.data.config import PrepareConfig
from nanogpt.errors import UserError
from nanogpt.text.archives import CONTAINERS
from nanogpt.text.formats import FORMATS
from nanogpt.tokenizer.registry import PUBLISHED, TOKENIZERS, from_dict

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text("utf-8")


def test_every_format_is_documented_with_its_suffixes_in_lower_case():
    for name, row in FORMATS.items():
        assert f"`{name}`" in PAGE
        assert all(f"`{suffix}`" in PAGE and suffix == suffix.lower() for suffix in row.suffixes)
        assert row.suffixes or row.sniff, name  # else no file would ever be read so by itself
    suffixes = [suffix for row in FORMATS.values() for suffix in row.suffixes]
    assert len(set(suffixes)) == len(suffixes)
    assert not set(suffixes) & set(CONTAINERS)


def test_an_unknown_format_is_refused_in_a_line_that_lists_the_known_ones():
    with pytest.raises(UserError) as raised:
        PrepareConfig(input_format="htm")
    assert str(raised.value).startswith("--input_format htm is unknown: use auto, text, jsonl, json, ")


def test_every_tokenizer_is_documented_and_known_by_its_kind():
    for kind, cls in TOKENIZERS.items():
        assert f"`{kind}`" in PAGE
        assert cls.kind == kind
    assert all(f"`{name}`" in PAGE for name in PUBLISHED)
    assert not set(PUBLISHED) & set(TOKENIZERS)


def test_an_unknown_tokenizer_is_refused_in_a_line_that_lists_the_known_ones():
    with pytest.raises(UserError) as raised:
        PrepareConfig(tokenizer="chars")
    message = str(raised.value)
    assert message.startswith("--tokenizer chars is unknown: use char, byte, bpe, ")
    assert message.endswith(", gpt2 or the path of a .json, .pt or .safetensors")
    with pytest.raises(UserError, match="unknown tokenizer 'chars'"):
        from_dict({"kind": "chars"})


def test_the_default_needs_no_check():
    assert PrepareConfig.tokenizer in TOKENIZERS
    assert TOKENIZERS[PrepareConfig.tokenizer].min_vocab_size is None
