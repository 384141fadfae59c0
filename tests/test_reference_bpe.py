"""The BPE that is written to be read and the fast one are the same: merges and ids."""

import argparse
import inspect
import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanogpt.errors import UserError
from nanogpt.tokenizer import reference_bpe
from nanogpt.tokenizer.bpe import train_bpe, unspell

quick = settings(deadline=None, derandomize=True, max_examples=200)

texts = st.text(
    # Which kind an unassigned character will be, each Unicode version says anew.
    st.characters(exclude_categories=["Cs", "Cn"])
    | st.sampled_from(" \n\t\r'012aaabsdté.,\u0301\u200d\u00a0\u0085\x1c\0🙂🏽👩日ёß²Ⅷ"),
    max_size=60,
) | st.lists(
    st.sampled_from([" ", "\n", "  ", "'ll", "'s", "the", "aaaa", "ababab", " def", "12", "é", "\r\n", "<|"])
).map("".join)

SAMPLE = (
    inspect.getsource(argparse)[:40_000] + "Zwölf Boxkämpfer jagen Viktor. Мороз и солнце; 日本語 🙂\n" * 50
)
"""Code, and some languages."""


def learned(text: str, most: int):
    """The fast tokenizer with as many merges as it finds, at most so many, and those merges."""
    try:
        coder = train_bpe(text.encode(), 257 + most)
    except UserError as error:
        found = int(str(error).rpartition("at most ")[2].partition(",")[0])
        assume(found > 257)
        coder = train_bpe(text.encode(), found)
    merges = json.loads(coder.source)["model"]["merges"]
    return coder, [(unspell(left), unspell(right)) for left, right in merges]


@pytest.fixture(scope="module")
def sample():
    """The fast tokenizer and the merges, of a real text."""
    return learned(SAMPLE, 400)


def test_merges_of_a_real_text_are_equal(sample):
    assert reference_bpe.train(SAMPLE, 657) == sample[1]


def test_ids_of_a_real_text_are_equal_and_decode_to_it(sample):
    coder, merges = sample
    ids = reference_bpe.encode(SAMPLE, merges)
    assert ids == coder.encode(SAMPLE).tolist()
    assert reference_bpe.decode(ids, merges) == SAMPLE


def test_tokens_are_equal(sample):
    coder, merges = sample
    assert reference_bpe.vocabulary(merges) == coder.tokens[:-1]


@quick
@given(text=texts, most=st.integers(1, 40))
def test_merges_of_any_text_are_equal_until_the_text_has_no_more_pairs(text, most):
    """Then the fast one appends pairs that have become part of longer tokens: encoding never gets to them."""
    coder, merges = learned(text, most)
    expected = reference_bpe.train(text, 257 + most)
    assert merges[: len(expected)] == expected
    assert reference_bpe.encode(text, expected) == coder.encode(text).tolist()


@quick
@given(text=texts)
def test_ids_of_any_text_are_equal_and_decode_to_it(sample, text):
    coder, merges = sample
    ids = reference_bpe.encode(text, merges)
    assert ids == coder.encode(text).tolist()
    assert reference_bpe.decode(ids, merges) == text


@quick
@given(text=texts)
def test_words_are_the_text(text):
    assert "".join(reference_bpe.split_words(text)) == text


def test_a_text_without_pairs_has_no_merges():
    assert reference_bpe.train("a b c\n", 300) == [(b" ", b"b"), (b" ", b"c")]
    assert reference_bpe.train("", 300) == []
