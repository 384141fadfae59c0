"""Byte-pair encoding gives any text back, and equals the libraries that defined it, token for token."""

import argparse
import inspect
import io
import json

import numpy as np
import pytest
import tiktoken
import tokenizers
import torch
from exported import qwen3
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from nanogpt.data.config import PrepareConfig
from nanogpt.errors import UserError
from nanogpt.text import documents
from nanogpt.tokenizer.base import END_OF_TEXT, ByteTokenizer, CharTokenizer
from nanogpt.tokenizer.bpe import ForeignTokenizer, gpt2_tokenizer, spell, train_bpe, unspell
from nanogpt.tokenizer.registry import from_dict

quick = settings(deadline=None, derandomize=True, max_examples=100)

LEARNED_FROM = "".join(inspect.getsource(module) for module in (argparse, inspect, json, io)) + (
    "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. Мороз и солнце; день чудесный! 日本語 🙂\n"
    * 200
)
"""A few hundred KB of text."""

texts = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(" \n\t\r'012aeintsd.,\u0301\u200d\u00a0\u0085\x1c\0🙂🏽👩日ёß"),
    ),
    max_size=80,
) | st.lists(
    st.sampled_from(
        [" ", "\n", "  ", "'ll", "'s", "the", "The", " def", "self", "123", "é", "e\u0301", "\r\n", "<|"]
    )
).map("".join)

SIZE = 2000


@pytest.fixture(scope="module")
def learned():
    """A BPE learned from a text."""
    return train_bpe(LEARNED_FROM.encode(), SIZE)


@pytest.fixture(scope="module")
def published(learned):
    """A tokenizer in the form of GPT-2's, from a file of merges."""
    merges = json.loads(learned.source)["model"]["merges"]
    return gpt2_tokenizer("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))


@pytest.fixture(scope="module", params=["byte", "bpe", "gpt2"])
def coder(request, learned, published):
    return {"byte": ByteTokenizer(), "bpe": learned, "gpt2": published}[request.param]


def theirs(coder):
    """The same tokenizer in the library that defined the format."""
    backend = tokenizers.Tokenizer.from_str(coder.source)
    backend.encode_special_tokens = True
    return backend


def in_tiktoken(coder):
    """The same tokenizer in tiktoken."""
    ranks = {token: i for i, token in enumerate(coder.tokens[:-1])}
    rule = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    return tiktoken.Encoding("test", pat_str=rule, mergeable_ranks=ranks, special_tokens={})


# Any text comes back


@quick
@given(text=texts)
def test_any_text_comes_back(coder, text):
    ids = coder.encode(text)
    assert ids.dtype == coder.dtype
    assert coder.decode(ids.tolist()) == text
    assert "".join(coder.stream(ids.tolist())) == text


@pytest.mark.parametrize("unit", [" ", "\n", "a", "é", "🙂", "0", "\0", "'s", "\r\n", " \n"])
def test_a_million_of_the_same_come_back(coder, unit):
    text = unit * (1_000_000 // len(unit.encode()))
    ids = coder.encode(text)
    assert b"".join([coder.tokens[i] for i in ids.tolist()]) == text.encode()


def test_every_character_comes_back(coder):
    text = "".join(chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000)
    assert coder.decode(coder.encode(text).tolist()) == text


@quick
@given(text=texts)
def test_text_that_spells_the_end_of_a_document_is_text(coder, text):
    for spelled in (END_OF_TEXT, text + END_OF_TEXT, f"{END_OF_TEXT}{END_OF_TEXT} {text}"):
        ids = coder.encode(spelled).tolist()
        assert coder.end_of_text not in ids
        assert coder.decode(ids) == spelled
    assert coder.decode([*coder.encode("a"), coder.end_of_text]) == "a" + END_OF_TEXT


def test_half_a_surrogate_pair_becomes_the_replacement_character(coder):
    assert coder.decode(coder.encode("a\ud800b").tolist()) == "a\ufffdb"
    assert coder.decode(coder.encode("\ud83d\ude42\udc00").tolist()) == "🙂\ufffd"


@quick
@given(some=st.lists(texts, max_size=6))
def test_a_batch_is_its_texts_one_after_the_other(coder, some):
    for one in (coder, CharTokenizer.train("".join(some))):
        ids, lengths = one.encode_batch([text.encode() for text in some])
        each = [one.encode(text) for text in some]
        assert lengths.tolist() == list(map(len, each))
        assert ids.tolist() == [i for one in each for i in one]
        assert ids.dtype == one.dtype


@quick
@given(ids=st.lists(st.integers(0, SIZE - 1), max_size=20))
def test_what_a_model_makes_up_is_shown_the_same_at_once_and_as_it_comes(learned, ids):
    assert "".join(learned.stream(ids)) == learned.decode(ids)


def test_saved_and_back(coder, tmp_path):
    torch.save(coder.to_dict(), tmp_path / "saved.pt")
    again = from_dict(torch.load(tmp_path / "saved.pt", weights_only=True))
    assert type(again) is type(coder)
    assert again.tokens == coder.tokens
    assert again.end_of_text == coder.end_of_text
    assert again.encode(LEARNED_FROM).tolist() == coder.encode(LEARNED_FROM).tolist()


@quick
@given(parts=st.lists(texts, max_size=8), piece=st.integers(8, 40))
def test_pieces_that_end_with_a_word_have_the_tokens_of_the_whole(learned, parts, piece):
    text = " ".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHUNK_BYTES", piece)
        pieces = [raw for raw, _ in documents.split_into_chunks([text.encode()])]
    ends_with_word = (earlier[-1:].isascii() and not earlier[-1:].isspace() for earlier in pieces[:-1])
    if all(ends_with_word) and all(later.startswith(b" ") for later in pieces[1:]):
        assert learned.encode_batch(pieces)[0].tolist() == learned.encode(b"".join(pieces).decode()).tolist()


def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(learned, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 1000)
    pieces = [raw for raw, _ in documents.split_into_chunks([LEARNED_FROM.encode()])]
    assert len(pieces) > 100
    for coder in (learned, qwen3()):
        assert coder.encode_batch(pieces)[0].tolist() == coder.encode(LEARNED_FROM).tolist()


# The same as elsewhere


@pytest.fixture(scope="module")
def libraries(learned, published):
    """Each tokenizer with its copies in the two libraries."""
    return [(coder, theirs(coder), in_tiktoken(coder)) for coder in (learned, published)]


@quick
@given(text=texts)
def test_ids_equal_those_of_other_libraries(libraries, text):
    for coder, hugging_face, openai in libraries:
        ids = coder.encode(text).tolist()
        assert ids == hugging_face.encode(text, add_special_tokens=False).ids
        assert ids == openai.encode(text, disallowed_special=())


def test_ids_of_a_long_text_equal_those_of_other_libraries(libraries):
    for coder, hugging_face, openai in libraries:
        ids = coder.encode(LEARNED_FROM).tolist()
        assert len(ids) < len(LEARNED_FROM) / 2
        assert ids == hugging_face.encode(LEARNED_FROM, add_special_tokens=False).ids
        assert ids == openai.encode(LEARNED_FROM, disallowed_special=())


@pytest.mark.parametrize("size", [300, 700, SIZE])
def test_merges_equal_those_that_hugging_face_learns(size):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = [spell(bytes([byte])) for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([LEARNED_FROM], trainer)
    expected = json.loads(backend.to_str())["model"]["merges"]
    found = json.loads(train_bpe(LEARNED_FROM.encode(), size).source)["model"]["merges"]
    assert [tuple(merge) for merge in found] == [tuple(merge) for merge in expected]


# Learning


def test_ids_are_bytes_then_merges_then_the_end(learned):
    assert learned.vocab_size == SIZE == len(set(learned.tokens))
    assert learned.tokens[:256] == [bytes([byte]) for byte in range(256)]
    assert learned.end_of_text == SIZE - 1
    assert learned.dtype is np.uint16


def test_gpt2s_ids_are_in_its_own_order(published):
    assert published.tokens[0] == b"!"
    assert published.tokens[93:95] == [b"~", b"\xa1"]
    assert published.tokens[188:190] == [b"\0", b"\1"]
    assert published.end_of_text == SIZE - 1


def test_nothing_is_merged_across_a_separator():
    coder = train_bpe(b"ab ab ab\xffx" * 50 + b"cd cd cd", 260)
    assert not any(b"\xff" in token or b"bx" in token for token in coder.tokens[256:-1])


def test_learning_is_silent_and_leaves_the_streams_alone(capfd):
    train_bpe(b"some words and some more words " * 20, 262)
    assert capfd.readouterr() == ("", "")
    print("still here")
    assert capfd.readouterr().out == "still here\n"


@pytest.mark.parametrize("size", [1, 256, 257])
def test_a_vocabulary_without_room_for_merges_is_refused(size):
    with pytest.raises(UserError, match=f"--vocab_size {size} is too small") as raised:
        PrepareConfig(tokenizer="bpe", vocab_size=size)
    assert "\n" not in str(raised.value)


def test_the_smallest_vocabulary_has_one_merge():
    PrepareConfig(tokenizer="bpe", vocab_size=258)
    coder = train_bpe(b"some some", 258)
    assert len(coder.encode("some")) == 3
    assert coder.end_of_text == 257


def test_a_vocabulary_too_large_for_the_text_is_refused_and_the_largest_works():
    with pytest.raises(UserError, match=r"--vocab_size 1000 is too large .* use at most (\d+)") as raised:
        train_bpe(b"abcd abcd", 1000)
    most = int(str(raised.value).rpartition("at most ")[2].partition(",")[0])
    assert train_bpe(b"abcd abcd", most).vocab_size == most


@given(st.binary(max_size=20))
def test_spelling_of_bytes(token):
    assert unspell(spell(token)) == token
    assert all(char.isprintable() and not char.isspace() for char in spell(token))


# Others


def test_a_foreign_tokenizer_that_makes_something_up_never_fails():
    backend = tokenizers.Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁", -2.0), ("▁a", -1.0), ("b", -3.0)], 0)
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    coder = ForeignTokenizer(backend.to_str())

    @quick
    @given(st.lists(st.integers(0, coder.vocab_size - 1), max_size=12))
    def check(ids):
        assert coder.decode(ids).count(END_OF_TEXT) == ids.count(coder.end_of_text)

    check()
    assert coder.end_of_text == 4


def test_a_result_that_memory_had_no_room_for_is_no_bug():
    tokenizer = train_bpe(b"the other thing " * 20, 260)

    class Short:
        def encode_batch(self, texts, parallel):
            return [[1, 2]]

    tokenizer.backend = Short()
    with pytest.raises(MemoryError):
        tokenizer.encode_batch([b"the"])
