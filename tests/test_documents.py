"""Cutting a document into pieces loses nothing, changes no token, and leaves white space alone out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.errors import UserError
from nanogpt.text import documents
from nanogpt.text.documents import MISSING, Chunk, SkipReport, field_values, split_into_chunks
from nanogpt.units import plural

quick = settings(deadline=None, derandomize=True, max_examples=150)
prose = st.text(st.sampled_from("ab  \n\t'é.1") | st.characters(exclude_categories=["Cs"]), max_size=80)


def pieces_of(*texts):
    """The pieces of a document that comes in these blocks, as text."""
    return [raw.decode() for raw, _ in split_into_chunks([text.encode() for text in texts])]


@quick
@given(st.lists(prose, max_size=5), st.integers(4, 30), st.integers(0, 30))
def test_the_pieces_of_a_document_are_the_document(texts, piece, margin):
    """Each of whole characters, and no longer than asked but for the rest of one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHUNK_BYTES", piece)
        patch.setattr(documents, "CUT_MARGIN_BYTES", max(margin, 1))
        pieces = list(split_into_chunks([text.encode() for text in texts]))
    whole = "".join(texts)
    if whole.strip():
        assert "".join(raw.decode() for raw, _ in pieces) == whole
        assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
        assert all(len(raw) <= piece + 3 for raw, _ in pieces)
        assert all(raw for raw, ends in pieces if not ends)


@quick
@given(st.lists(prose, max_size=5), st.integers(10, 30))
def test_how_the_text_comes_does_not_matter(texts, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHUNK_BYTES", piece)
        assert pieces_of(*texts) == pieces_of("".join(texts))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_characters_are_counted(text):
    assert Chunk(text.encode(), True).characters == len(text)


def test_a_cut_is_before_a_space_behind_a_word(monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 10)
    assert pieces_of("a word or two  and on") == ["a word or", " two  and", " on"]
    assert pieces_of("abc   \n   defghijk") == ["abc", "   \n   def", "ghijk"]
    assert pieces_of("x" * 25) == ["x" * 10, "x" * 10, "x" * 5]
    assert pieces_of("日" * 7) == ["日" * 4, "日" * 3]


def test_no_cut_far_from_the_end(monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 10)
    monkeypatch.setattr(documents, "CUT_MARGIN_BYTES", 4)
    assert pieces_of("ab cdefghijkl") == ["ab cdefghi", "jkl"]


@pytest.mark.parametrize("text", ["", " ", "\n\t\r\n  ", "\u2003\n"])
def test_white_space_alone_is_no_document(text):
    assert pieces_of(text) == pieces_of(text, text) == []


@pytest.mark.parametrize(
    ("value", "path", "found"),
    [
        ("x", "text", ["x"]),
        ({"text": "x"}, "text", ["x"]),
        ({"a": {"b": "x"}}, "a.b", ["x"]),
        ({"a": [{"b": "x"}, {"b": "y"}]}, "a.b", ["x", "y"]),
        ({"a": ["x", "y"]}, "a", ["x", "y"]),
        (["x", {"text": "y"}], "text", ["x", "y"]),
        ({"text": "x"}, "body", [MISSING]),
        ({"text": None}, "text", [None]),
        ({"a": {"b": "x"}}, "a", [{"b": "x"}]),
        ({"a": {"b": "x"}}, "a.b.c", ["x"]),
        ({"a": {}}, "a.b", [MISSING]),
        ({"a.b": "x", "a": {"b": "y"}}, "a.b", ["x"]),  # the literal name first
        ({"a": {"b.c": "x"}}, "a.b.c", ["x"]),
        ({"a.b": {"c": "x"}, "a": "y"}, "a.b.c", ["x"]),
        (
            {"text": ["see ", {"type": "link", "text": "http://x"}, " now"]},
            "text",
            ["see ", "http://x", " now"],
        ),
        ({"a": {"b": ["x", {"b": ["y", {"b": "z"}]}, {"a.b": "w"}]}}, "a.b", ["x", "y", "z", "w"]),
        ({"text": ["x", {"href": "y"}]}, "text", ["x", {"href": "y"}]),
        ({"text": []}, "text", []),
        ([], "text", []),
        (3, "text", [3]),
    ],
)
def test_what_a_field_leads_to(value, path, found):
    assert list(field_values(value, path.split("."))) == found


def test_broken_records_are_counted_and_so_many_are_kept(monkeypatch):
    monkeypatch.setattr(documents, "MAX_LISTED_RECORDS", 3)
    report = SkipReport()
    for number in range(5):
        report.reject(f"a.jsonl:{number}", "not JSON")
    assert report.broken_count == 5
    assert report.broken == ["a.jsonl:0: not JSON", "a.jsonl:1: not JSON", "a.jsonl:2: not JSON"]
    with pytest.raises(UserError, match=r"a\.jsonl:7: not JSON .*--strict"):
        SkipReport(strict=True).reject("a.jsonl:7", "not JSON")


def test_a_number_and_its_noun():
    assert [plural(number, "byte") for number in (0, 1, 2, 1000)] == [
        "0 bytes",
        "1 byte",
        "2 bytes",
        "1,000 bytes",
    ]


def test_a_name_with_a_line_end_is_one_line_of_the_report():
    report = SkipReport()
    report.reject("a\nb\r\nc.jsonl:1", "not JSON")
    assert report.broken == ["a b c.jsonl:1: not JSON"]
