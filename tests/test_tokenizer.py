"""The tokenizer loses nothing: any text comes back, ids are narrow, and what is unknown is named."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt import tokenizer
from nanogpt.config import UserError
from nanogpt.tokenizer import CharTokenizer, code_points, from_dict, narrowest

quick = settings(deadline=None, derandomize=True, max_examples=60)
texts = st.text(st.characters(), max_size=60)  # surrogates and NUL too
EMOJI = "\N{GRINNING FACE}"


def by_dict(text):
    """The encoder everyone writes first: a dict from character to its rank."""
    table = {char: i for i, char in enumerate(sorted(set(text)))}
    return [table[char] for char in text]


@quick
@given(texts)
def test_any_text_comes_back(text):
    coder = CharTokenizer.train(text)
    assert coder.decode(coder.encode(text)) == text
    assert coder.decode(coder.encode(text).tolist()) == text


@quick
@given(texts)
def test_equals_the_plain_encoder(text):
    coder = CharTokenizer.train(text)
    assert coder.encode(text).tolist() == by_dict(text)
    assert coder.vocab_size == len(set(text))


@quick
@given(texts, st.integers(1, 7))
def test_cutting_into_chunks_changes_nothing(text, size):
    whole = CharTokenizer.train(text)
    ids = whole.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "CHUNK", size)
        assert "".join(tokenizer.chunks(text)) == text
        assert CharTokenizer.train(text).chars == whole.chars
        assert whole.encode(text).tolist() == ids.tolist()


def test_ids_are_in_order_of_code_point():
    text = EMOJI + "zaA\n\x00\u00e9\u4e2d\uffff\U0010ffff"
    coder = CharTokenizer.train(text)
    assert coder.chars == "".join(sorted(text))
    assert coder.encode(coder.chars).tolist() == list(range(len(text)))


def test_code_points_are_those_of_python():
    text = "a\u00e9\ud800" + EMOJI
    assert code_points(text).tolist() == [ord(char) for char in text]


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (1, np.uint8),
        (255, np.uint8),
        (256, np.uint8),
        (257, np.uint16),
        (65535, np.uint16),
        (65536, np.uint16),
        (65537, np.uint32),
        (0x110000, np.uint32),
    ],
)
def test_the_narrowest_type_holds_every_id(size, dtype):
    assert narrowest(size) is dtype
    assert np.iinfo(dtype).max >= size - 1


@pytest.mark.parametrize(
    ("size", "dtype"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)]
)
def test_borders_of_the_types_with_real_vocabularies(size, dtype):
    text = "".join(map(chr, range(size)))
    coder = CharTokenizer.train(text)
    ids = coder.encode(text)
    assert ids.dtype == dtype
    assert coder.dtype is dtype
    assert np.array_equal(ids, np.arange(size))
    assert coder.decode(ids) == text


def test_empty_text():
    coder = CharTokenizer.train("abc")
    assert coder.encode("").tolist() == []
    assert coder.decode([]) == ""


@pytest.mark.parametrize(
    ("char", "code"), [("c", "U+0063"), ("\n", "U+000A"), (EMOJI, "U+1F600"), ("\ud800", "U+D800")]
)
def test_the_unknown_character_is_named(char, code):
    coder = CharTokenizer.train("ab")
    with pytest.raises(UserError) as raised:
        coder.encode("abba" + char + "b" + char)
    message = str(raised.value)
    assert f"character {char!r} ({code}) at position 4 " in message
    assert "vocabulary of 2 characters" in message
    assert "\n" not in message


def test_the_position_counts_from_the_start_of_the_text_not_of_the_chunk(monkeypatch):
    monkeypatch.setattr(tokenizer, "CHUNK", 4)
    coder = CharTokenizer.train("ab")
    with pytest.raises(UserError, match=r"'x' \(U\+0078\) at position 9 "):
        coder.encode("abababab" + "bx" + "y")


def test_an_unknown_character_does_not_shadow_an_earlier_one():
    with pytest.raises(UserError, match=r"'x' \(U\+0078\) at position 1 "):
        CharTokenizer.train("a").encode("axyz")


def test_saved_and_back():
    text = "to be \u00e9\ud800" + EMOJI
    coder = CharTokenizer.train(text)
    saved = json.loads(json.dumps(coder.to_dict()))  # plain types alone survive JSON
    again = from_dict(saved)
    assert again.chars == coder.chars
    assert again.encode(text).tolist() == coder.encode(text).tolist()


@pytest.mark.parametrize("saved", [{"kind": "bpe"}, {}, {"kind": None, "chars": "ab"}])
def test_an_unknown_kind_is_refused(saved):
    with pytest.raises(UserError, match="unknown tokenizer"):
        from_dict(saved)
