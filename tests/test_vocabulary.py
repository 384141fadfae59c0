"""A tokenizer.json is run by whichever library does what it says; anything else is refused in one line."""

import json

import pytest
import tokenizers
import torch
from exported import TEXTS, qwen3
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from nanogpt.errors import UserError
from nanogpt.tokenizer.bpe import BPETokenizer, ForeignTokenizer, byte_level_json, train_bpe
from nanogpt.tokenizer.registry import from_dict, from_file

quick = settings(deadline=None, derandomize=True, max_examples=50)
TEXT = "In the beginning, the naïve end: there's 1,234 — the other thing.\n" * 30
texts = st.text(
    st.sampled_from("the rIn'\n ,é1.<|>▁") | st.characters(exclude_categories=["Cs"]), max_size=40
)


@pytest.fixture(scope="module")
def source():
    """A byte-level tokenizer.json."""
    return train_bpe(TEXT.encode(), 300).source


def saved(tmp_path, described):
    path = tmp_path / "tokenizer.json"
    path.write_text(described if isinstance(described, str) else json.dumps(described), encoding="utf-8")
    return path


def test_a_byte_level_file_runs_in_the_fast_library(tmp_path, source):
    coder = from_file(saved(tmp_path, source))
    assert isinstance(coder, BPETokenizer)
    assert coder.to_dict() == {"kind": "bpe", "tokenizer.json": source}


def test_qwen3s_tokenizer_runs_in_the_fast_library_as_in_the_one_that_defined_it(tmp_path):
    """NFC, Qwen2's rule for words, special tokens that are text in a text, and <think>, which is a token."""
    described = qwen3().to_dict()["tokenizer.json"]
    coder = from_file(saved(tmp_path, described))
    assert isinstance(coder, BPETokenizer)
    assert not coder.keeps_text
    assert coder.tokens[coder.end_of_text] == b"<|endoftext|>"
    backend = tokenizers.Tokenizer.from_str(described)
    backend.encode_special_tokens = True

    @settings(deadline=None, derandomize=True, max_examples=200)
    @given(TEXTS)
    def check(text):
        ids = coder.encode(text).tolist()
        assert ids == backend.encode(text, add_special_tokens=False).ids
        assert coder.decode(ids) == backend.decode(ids)

    check()


def word_piece():
    vocabulary = {
        token: i for i, token in enumerate(["[UNK]", "the", "##n", "##re", "[SEP]", "t", "in", "."])
    }
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[SEP]"])
    backend.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 4)])
    return backend.to_str()


def unigram():
    scores = [("<unk>", 0.0), ("▁", -2.0), ("▁the", -1.0), ("re", -3.0), *((char, -5.0) for char in "thein'")]
    backend = tokenizers.Tokenizer(models.Unigram(scores, 0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return backend.to_str()


def changed(source, **values):
    return json.dumps({**json.loads(source), **values})


FOREIGN = {
    "WordPiece": lambda source: word_piece(),
    "Unigram": lambda source: unigram(),
    "a normalizer": lambda source: changed(source, normalizer={"type": "Lowercase"}),
    "a prefix space": lambda source: changed(
        source,
        pre_tokenizer={**json.loads(source)["pre_tokenizer"], "add_prefix_space": True},
    ),
    "Metaspace": lambda source: changed(
        source,
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        decoder={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    ),
    "added words": lambda source: changed(
        source,
        added_tokens=[
            {
                **json.loads(source)["added_tokens"][0],
                "content": "the other",
                "special": False,
                "normalized": True,
            }
        ],
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_any_other_file_runs_in_the_library_that_defined_it(tmp_path, source, kind):
    described = FOREIGN[kind](source)
    coder = from_file(saved(tmp_path, described))
    backend = tokenizers.Tokenizer.from_str(described)
    backend.encode_special_tokens = True
    if kind != "a prefix space":
        assert isinstance(coder, ForeignTokenizer)
    assert from_dict(coder.to_dict()).to_dict() == coder.to_dict()
    torch.save(coder.to_dict(), tmp_path / "saved.pt")
    again = from_dict(torch.load(tmp_path / "saved.pt", weights_only=True))

    @quick
    @given(texts)
    def check(text):
        for value in (text, TEXT[:70] + text):
            expected = backend.encode(value, add_special_tokens=False).ids
            assert coder.encode(value).tolist() == again.encode(value).tolist() == expected
            assert coder.end_of_text not in expected

    check()
    ids, lengths = coder.encode_batch([b"the", b"", b"there the"])
    assert ids.tolist() == [*coder.encode("the"), *coder.encode(""), *coder.encode("there the")]
    assert lengths.tolist() == [
        len(coder.encode("the")),
        len(coder.encode("")),
        len(coder.encode("there the")),
    ]
    assert coder.encode_batch([])[0].tolist() == []


def test_the_end_of_a_document_is_the_vocabularys_own_or_a_new_id(tmp_path, source):
    assert from_file(saved(tmp_path, word_piece())).end_of_text == 4
    coder = from_file(saved(tmp_path, unigram()))
    assert coder.end_of_text == coder.vocab_size - 1 == 10
    without = changed(source, added_tokens=[])
    coder = from_file(saved(tmp_path, without))
    assert isinstance(coder, BPETokenizer)
    assert coder.end_of_text == coder.vocab_size - 1 == 299
    other = {**json.loads(source)["added_tokens"][0], "content": "</s>"}
    assert from_file(saved(tmp_path, changed(source, added_tokens=[other]))).tokens[299] == b"</s>"


def test_text_in_a_foreign_vocabulary_comes_as_it_is_made(tmp_path):
    coder = from_file(saved(tmp_path, unigram()))
    ids = coder.encode("there the in").tolist()
    pieces = list(coder.stream([*ids, coder.end_of_text]))
    assert len(pieces) == len(ids) + 1
    assert "".join(pieces) == "there the in<|endoftext|>"
    assert coder.decode(ids) == "there the in"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is not a tokenizer.json"),
        (b"words", "is not a tokenizer.json"),
        (b"[1, 2]", "is not a tokenizer.json"),
        (b"{}", "is not a tokenizer.json"),
        (b'{"model": {"type": "BPE"}}', "is not a tokenizer.json"),
        (b'{"name": "nanogpt",\n "version": 1}', "is not a tokenizer.json"),
        (b"\x89PNG\r\n\x1a\n\xff", "cannot be read: it is not text"),
        (b"\0" * 100, "is not a tokenizer.json"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(tmp_path, raw, said):
    path = tmp_path / "tokenizer.json"
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(UserError) as raised:
        from_file(path)
    assert str(raised.value).startswith(f"--tokenizer {path} {said}")
    assert "\n" not in str(raised.value)


def test_a_folder_is_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        from_file(tmp_path)


def test_a_torn_file_is_refused(tmp_path, source):
    for size in range(0, len(source), 997):
        with pytest.raises(UserError, match=r"is not a tokenizer\.json") as raised:
            from_file(saved(tmp_path, source[:size]))
        assert "\n" not in str(raised.value)


def test_a_vocabulary_without_some_bytes_is_no_crash(tmp_path):
    coder = from_file(saved(tmp_path, byte_level_json([], alphabet=range(128))))
    assert coder.decode(coder.encode("plain").tolist()) == "plain"
    backend = tokenizers.Tokenizer.from_str(coder.to_dict()["tokenizer.json"])
    assert coder.encode("naïve").tolist() == backend.encode("naïve", add_special_tokens=False).ids
