"""Characters and bytes lose nothing: any text comes back, ids are narrow, and what is unknown is named."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.errors import UserError
from nanogpt.text.encoding import utf8
from nanogpt.tokenizer import base
from nanogpt.tokenizer.base import (
    END_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    code_points,
    narrowest_dtype,
)
from nanogpt.tokenizer.registry import from_dict

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
        patch.setattr(base, "ENCODE_CHARS", size)
        assert "".join(base.split_text(text)) == text
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
    assert narrowest_dtype(size) is dtype
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
    monkeypatch.setattr(base, "ENCODE_CHARS", 4)
    coder = CharTokenizer.train("ab")
    with pytest.raises(UserError, match=r"'x' \(U\+0078\) at position 9 "):
        coder.encode("abababab" + "bx" + "x")


def test_several_unknown_characters_are_named_in_the_order_they_come():
    coder = CharTokenizer.train("ab")
    with pytest.raises(UserError) as raised:
        coder.encode("axyxzab")
    message = str(raised.value)
    assert "characters 'x' (U+0078), 'y' (U+0079), 'z' (U+007A) (the first at position 1)" in message
    assert "vocabulary of 2 characters" in message
    assert coder.unknown_characters("axyxzab") == ["x", "y", "z"]
    with pytest.raises(UserError, match=r"\), \.\.\. \(the first at position 0\)") as raised:
        coder.encode("0123456789")
    assert str(raised.value).count("U+") == 5
    assert "\n" not in str(raised.value)


def test_saved_and_back():
    text = "to be \u00e9\ud800" + EMOJI
    coder = CharTokenizer.train(text)
    saved = json.loads(json.dumps(coder.to_dict()))  # plain types alone survive JSON
    again = from_dict(saved)
    assert again.chars == coder.chars
    assert again.encode(text).tolist() == coder.encode(text).tolist()


@pytest.mark.parametrize("saved", [{"kind": "words"}, {}, {"kind": None, "chars": "ab"}])
def test_an_unknown_kind_is_refused(saved):
    with pytest.raises(UserError, match="unknown tokenizer"):
        from_dict(saved)


@quick
@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters()), st.booleans())
def test_the_fast_way_for_ascii_equals_the_general_one(text, more, end_of_text):
    """Also where a vocabulary has so many characters, or one less, that an id needs another type."""
    for size in (0, 255, 256, 300):
        letters = "".join(map(chr, range(0x400, 0x400 + size)))
        known = text + more
        coder = CharTokenizer.train(
            known + letters[: max(0, size - len(set(known)))], end_of_text=end_of_text
        )
        ids = coder.encode(text)
        assert ids.dtype == coder.dtype
        assert ids.tolist() == [coder.chars.index(char) for char in text]


def test_unknown_ascii_is_named_the_fast_way_too():
    for text in ("ab", "abé", "ab" + "".join(map(chr, range(0x400, 0x600)))):
        with pytest.raises(UserError, match=r"character 'x' \(U\+0078\) at position 2 "):
            CharTokenizer.train(text).encode("abxa")


@pytest.mark.parametrize("size", [3, 255, 256, 300])
def test_the_end_of_a_document_is_an_id_behind_all_characters(size):
    text = "".join(map(chr, range(size)))
    coder = CharTokenizer.train(text, end_of_text=True)
    assert coder.end_of_text == size
    assert coder.vocab_size == size + 1
    assert coder.dtype is narrowest_dtype(size + 1)
    assert coder.encode(text).tolist() == list(range(size))
    assert coder.decode([0, size]) == text[0] + END_OF_TEXT
    assert from_dict(coder.to_dict()).end_of_text == size
    assert CharTokenizer.train(text).end_of_text is None


def test_characters_keep_half_a_surrogate_pair():
    text = "a\ud800b\udc00"
    coder = CharTokenizer.train(text)
    assert coder.decode(coder.encode(text)) == text
    assert "".join(coder.stream(coder.encode(text).tolist())) == text


# Bytes


@quick
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_are_those_of_utf8(text):
    coder = ByteTokenizer()
    assert bytes(coder.encode(text)) == text.encode()
    assert coder.decode(coder.encode(text)) == text
    assert coder.end_of_text not in coder.encode(text)


def test_bytes_have_no_half_a_surrogate_pair():
    coder = ByteTokenizer()
    assert coder.decode(coder.encode("a\ud800b\udc00")) == "a\ufffdb\ufffd"
    assert coder.decode(coder.encode("\ud83d\ude42")) == "\U0001f642"  # two halves that belong together


def test_bytes_that_are_no_text_are_shown_all_the_same():
    coder = ByteTokenizer()
    assert coder.decode([0x61, 0xC3, 0x62]) == "a\ufffdb"
    assert "".join(coder.stream([0x61, 0xC3, 0xA4, 0xC3])) == "aä\ufffd"
    assert coder.decode([0x61, 0xFF]) == "a" + END_OF_TEXT


@quick
@given(texts)
def test_half_pairs_become_the_replacement_character_and_whole_ones_what_they_stand_for(text):
    pair = re.compile("[\ud800-\udbff][\udc00-\udfff]")
    whole = pair.sub(lambda two: two[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
    assert utf8(text).decode() == re.sub("[\ud800-\udfff]", "\ufffd", whole)
