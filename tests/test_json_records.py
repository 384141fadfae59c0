"""JSON in any layout gives its texts; a broken record is counted and loses no other."""

import json
import random

import pytest
from conftest import texts_in
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.errors import UserError
from nanogpt.text import json_formats, records
from nanogpt.text.corpus import Corpus
from nanogpt.text.documents import SkipReport

quick = settings(deadline=None, derandomize=True, max_examples=60)

MARKS = "byte order marks at the start of a later line dropped (were files joined?)"


RECORDS = [{"id": i, "text": f"text {i}", "tags": [{"id": i, "name": "x"}]} for i in range(6)]
LAYOUTS = {
    "compact array": json.dumps(RECORDS, separators=(",", ":")),
    "array": json.dumps(RECORDS),
    "indented array": json.dumps(RECORDS, indent=2),
    "values": "\n".join(map(json.dumps, RECORDS)),
    "indented values": "\n".join(json.dumps(record, indent=4) for record in RECORDS),
}
WOUNDS = {
    "a quote lost": ('"text 2"', '"text 2'),
    "another quote lost": ('"text 2"', 'text 2"'),
    "a brace lost": ('{"name": "x", "id": 2}', '{"name": "x", "id": 2'),
    "a comma lost": ('"text 2",', '"text 2"'),
    "a colon lost": ('"text": "text 2"', '"text" "text 2"'),
    "a bare word": ('"text 2"', "text"),
    "a line end in a text": ("text 2", "text\n2"),
    "a deep list": ('"text 2"', "[" * 100_000 + "]" * 100_000),
    "a huge number": ('"text 2"', "1" * 10_000),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wound", WOUNDS)
def test_behind_a_broken_record_the_reading_goes_on(tmp_path, layout, wound):
    whole, broken = WOUNDS[wound]
    if whole not in LAYOUTS[layout]:
        whole, broken = (part.replace(" ", "").replace("text2", "text 2") for part in (whole, broken))
    raw = LAYOUTS[layout].replace(whole, broken)
    found, report = texts_in(tmp_path / "a.json", raw)
    assert [text for text in found if text != "text 2"] == [f"text {i}" for i in (0, 1, 3, 4, 5)]
    if raw != LAYOUTS[layout]:
        assert report.broken
        assert report.broken[0].startswith(", record 3: not JSON (")


def test_how_much_a_broken_record_takes_with_it_is_said(tmp_path):
    raw = '[{"text": "one"}, {"text": two}, {"text": "three"}]'
    found, report = texts_in(tmp_path / "a.json", raw)
    assert found == ["one", "three"]
    assert len(report.broken) == 1
    assert report.broken[0].endswith("): characters 19 to 33 are left out")
    assert raw[18:33] == '{"text": two}, '


def test_behind_the_last_record_the_rest_is_said_to_be_lost(tmp_path):
    found, report = texts_in(tmp_path / "a.json", '[{"text": "one"}, {"text": two}, 3]')
    assert found == ["one"]
    assert len(report.broken) == 1
    assert report.broken[0].endswith("): the rest of the file is left out")


@pytest.mark.parametrize(
    "raw", ['["one", "tw"o", "three"]', '["one", "two, "three"]', '["one", two", "three"]']
)
def test_behind_a_broken_string_the_reading_goes_on(tmp_path, raw):
    found, report = texts_in(tmp_path / "a.json", raw)
    assert (found[0], found[-1]) == ("one", "three")
    assert len(found) + report.broken_count == 3


def test_a_record_that_is_too_long_loses_no_other_and_little_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_CHARS", 1000)
    monkeypatch.setattr(json_formats, "READ_CHARS", 100)
    sizes = []
    more = json_formats.JSONStream.read_more
    monkeypatch.setattr(
        json_formats.JSONStream, "read_more", lambda self: sizes.append(len(self.text)) or more(self)
    )
    raw = json.dumps([{"text": "one"}, {"text": "x" * 50_000}, {"text": "three"}])
    found, report = texts_in(tmp_path / "a.json", raw)
    assert found == ["one", "three"]
    assert report.broken_count == 1
    assert "longer than 1,000 characters" in report.broken[0]
    assert max(sizes) < 5000


def test_strict_stops_at_a_broken_record(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text": two}, {"text": "three"}]')
    with pytest.raises(UserError, match=r"a\.json, record 2: not JSON .*--strict"):
        list(Corpus((tmp_path / "a.json",)).chunks(SkipReport(strict=True)))


# Several lines in a .jsonl

OVER_LINES = "not JSON Lines but JSON over several lines: read as that"


@pytest.mark.parametrize("layout", ["indented array", "indented values"])
@pytest.mark.parametrize("before", ["", "\n \n", "\ufeff"])
def test_json_over_several_lines_is_known_in_a_file_of_json_lines(tmp_path, layout, before):
    found, report = texts_in(tmp_path / "a.jsonl", before + LAYOUTS[layout])
    assert found == [record["text"] for record in RECORDS]
    assert report.broken == []
    assert report.notes[-1] == OVER_LINES


def test_an_array_with_a_record_a_line_is_known_too(tmp_path):
    for raw in ('[\n{"text": "one"},\n{"text": "two"}\n]', '[{"text": "one"},\n{"text": "two"}]'):
        found, report = texts_in(tmp_path / "a.jsonl", raw)
        assert (found, report.broken, report.notes) == (["one", "two"], [], [OVER_LINES])
    found, report = texts_in(tmp_path / "a.jsonl", '{"text": "one"},\n{"text": "two"},\n')
    assert (found, report.broken) == (["one", "two"], [])


@pytest.mark.parametrize(
    "first",
    [
        '{"text": "torn',
        "{",
        "[",
        "[" * 100_000,
        '{"text": "a"} {"text": "b"}',
        '[{"text": "a"}, {"te',
        '{"a": [1,',
    ],
)
def test_a_broken_first_line_is_a_broken_line(tmp_path, first):
    rest = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(5000))  # more than is looked ahead
    found, report = texts_in(tmp_path / "a.jsonl", f"{first}\n\ufeff{rest}")
    assert found == [f"text {i}" for i in range(5000)]
    assert [line.partition(": ")[0] for line in report.broken] == ([] if first == "[" else [":1"])
    assert report.notes[-1:] == [
        "1 byte order mark at the start of a later line dropped (were files joined?)"
    ]


# Marks, fields, values


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_byte_order_marks_between_records_are_dropped_and_said(tmp_path, name):
    found, report = texts_in(tmp_path / name, '\ufeff"one"\n\ufeff"two"\n\ufeff"th\ufeffree"\n')
    assert (found, report.broken) == (["one", "two", "th\ufeffree"], [])
    assert report.notes[-1] == f"2 {MARKS}"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_with_a_dot_can_be_named(tmp_path, name):
    record = {"review": {"body": "path"}, "review.body": "literal"}
    assert texts_in(tmp_path / name, json.dumps(record), "review.body")[0] == ["literal"]
    del record["review.body"]
    assert texts_in(tmp_path / name, json.dumps(record), "review.body")[0] == ["path"]


def test_a_message_in_parts_loses_none_without_a_word(tmp_path):
    message = {"text": ["see ", {"type": "link", "text": "http://x"}, {"type": "photo"}, 3, None, " now"]}
    found, report = texts_in(tmp_path / "a.jsonl", json.dumps(message))
    assert found == ["see ", "http://x", " now"]
    assert report.broken == [
        ":1: the field 'text' holds an object (it has type), not text",
        ":1: the field 'text' holds a number (3), not text",
        ":1: the field 'text' is null",
    ]


# What goes in comes out or is counted

VALUES = st.one_of(
    st.text(st.sampled_from('ab {}[]",:\n\\é🙂'), max_size=12).map(lambda text: {"text": f"t{text}t"}),
    st.sampled_from(
        [{"text": None}, {"text": 3}, {"text": {"a": 1}}, {"body": "x"}, {"text": ["x", {"b": 1}]}]
    ),
)


@quick
@given(st.lists(VALUES, min_size=1, max_size=8), st.sampled_from(["json", "jsonl"]), st.data())
def test_every_record_comes_out_or_is_counted(tmp_path_factory, values, kind, draw):
    """A record loses a byte, or all behind it."""
    parts = [json.dumps(value).encode() for value in values]
    number = draw.draw(st.integers(0, len(parts) - 1))
    place = draw.draw(st.integers(0, len(parts[number]) - 1))
    torn = draw.draw(st.booleans()) and all("text" in value for value in values)
    parts[number] = parts[number][:place] + (b"" if torn else parts[number][place + 1 :])
    path = tmp_path_factory.getbasetemp() / f"lost.{kind}"
    raw = b"[" + b", ".join(parts) + b"]" if kind == "json" else b"\n".join(parts) + b"\n"
    found, report = texts_in(path, raw)
    whole = [value.get("text") for value in values[:number]]
    expected = ["x" if isinstance(text, list) else text for text in whole if isinstance(text, (str, list))]
    assert found[: len(expected)] == expected
    blank = torn and place == 0  # nothing is left of it
    assert len(found) + report.broken_count >= len(values) - blank


def test_random_json_is_read_or_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_CHARS", 60)
    monkeypatch.setattr(json_formats, "READ_CHARS", 7)
    chance = random.Random(5)
    for trial in range(300):
        raw = "".join(chance.choices('ab"",,::{}[]\\\n\r\ufeff\x00 1', k=chance.randrange(150)))
        texts_in(tmp_path / ("a.json" if trial % 2 else "a.jsonl"), raw)
