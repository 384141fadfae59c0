"""The registries: every format and every tokenizer has a row, and its line in the documentation."""

from pathlib import Path

import pytest

from nanogpt.data.config import PrepareConfig
from nanogpt.errors import UserError
from nanogpt.text.archives import READERS
from nanogpt.text.formats import FORMATS
from nanogpt.tokenizer.registry import PUBLISHED, TOKENIZERS, from_dict

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text("utf-8")


def test_every_suffix_is_documented_in_lower_case():
    for suffix in FORMATS:
        assert f"`{suffix}`" in PAGE
        assert suffix == suffix.lower()
    assert set(FORMATS) < set(READERS)


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
    assert message.endswith(", gpt2 or the path of a .json")
    with pytest.raises(UserError, match="unknown tokenizer 'chars'"):
        from_dict({"kind": "chars"})


def test_the_default_needs_no_check():
    assert PrepareConfig.tokenizer in TOKENIZERS
    assert TOKENIZERS[PrepareConfig.tokenizer].min_vocab_size is None
