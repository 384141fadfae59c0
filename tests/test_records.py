"""The same documents come out of every format; what is broken is counted, named, and loses nothing else."""

import csv
import io
import json
import random
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.errors import UserError
from nanogpt.text import documents, encoding, records
from nanogpt.text.corpus import Corpus
from nanogpt.text.documents import SkipReport
from nanogpt.text.options import ReadOptions
from nanogpt.units import plural

quick = settings(deadline=None, derandomize=True, max_examples=50)
RUSSIAN = "Мой дядя самых честных правил, когда не в шутку занемог"


def documents_in(path, text_field="text", report=None):
    """The documents of one file."""
    return joined(Corpus((path,), ReadOptions(text_field)).chunks(report or SkipReport()))


def joined(pieces):
    found, waiting = [], b""
    for raw, ends in pieces:
        waiting += raw
        if ends:
            found.append(waiting.decode())
            waiting = b""
    assert waiting == b""  # no document without an end
    return found


def table(delimiter, texts):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(["id", "text"])
    writer.writerows(enumerate(texts))
    return file.getvalue().encode()


def parquet(texts):
    file = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string())}), file)
    return file.getvalue()


def as_lines(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


WRITERS = {
    "a.jsonl": as_lines,
    "b.ndjson": lambda texts: "\r\n".join(json.dumps(text, ensure_ascii=False) for text in texts).encode(),
    "c.json": lambda texts: json.dumps([{"text": text} for text in texts], indent=1).encode(),
    "d.json": lambda texts: json.dumps(texts, ensure_ascii=False).encode(),
    "e.json": lambda texts: json.dumps({"text": texts}).encode(),
    "f.json": lambda texts: " \n".join(json.dumps({"text": text}) for text in texts).encode(),
    "g.csv": partial(table, ","),
    "h.tsv": partial(table, "\t"),
    "i.parquet": parquet,
}
"""What a file of each format holds, whose documents are these texts."""

some_texts = st.lists(
    st.text(
        st.sampled_from("ab ,\t\"'\n\r\\{}[]é🙂") | st.characters(exclude_categories=["Cs"]), max_size=30
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_documents_in_every_format(tmp_path, name):
    path = tmp_path / name

    @quick
    @given(some_texts, st.integers(1, 40))
    def check(texts, piece):
        path.write_bytes(WRITERS[name](texts))
        report = SkipReport()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(documents, "CHUNK_BYTES", piece)
            found = documents_in(path, report=report)
        expected = [text for text in texts if text.strip() or len(text.encode()) > piece]
        assert found == expected
        assert (report.broken, report.repaired, report.notes) == ([], 0, [])

    check()


@pytest.mark.parametrize("name", ["a.jsonl", "c.json", "f.json", "g.csv", "i.parquet"])
def test_many_documents_and_long_ones(tmp_path, name):
    chance = random.Random(1)
    texts = [f"{i} {RUSSIAN} {'word ' * chance.randrange(200)}end" for i in range(1000)]
    texts[500] = "long word " * 40_000  # spans many reads
    (tmp_path / name).write_bytes(WRITERS[name](texts))
    assert documents_in(tmp_path / name) == texts


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("encoding_name", ["utf-8-sig", "utf-16", "utf-16-be", "shift_jis"])
def test_other_encodings_of_every_text_format(tmp_path, name, encoding_name):
    if name == "i.parquet":
        pytest.skip("not a text format")
    texts = ["吾輩は猫である。名前はまだ無い。" * 3, "どこで生れたかとんと見当がつかぬ。" * 3]
    plain = json.dumps(texts, ensure_ascii=False).encode() if name == "e.json" else WRITERS[name](texts)
    mark = b"\xfe\xff" if encoding_name == "utf-16-be" else b""
    (tmp_path / name).write_bytes(mark + plain.decode().encode(encoding_name))
    assert documents_in(tmp_path / name) == texts


def test_detecting_the_encoding_of_a_long_table_may_cut_a_character_in_half(tmp_path):
    texts = [
        f"{'x' * (i % 2)}吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"
        for i in range(3000)
    ]
    for shift in ("", "y"):  # so that the limit is inside a character in one of them
        (tmp_path / "a.csv").write_bytes(("text\n" + shift + "\n".join(texts)).encode("shift_jis"))
        assert documents_in(tmp_path / "a.csv")[1:] == texts[1:]


# Fields


def test_dots_lead_into_nested_records(tmp_path):
    record = {"meta": {"id": 1}, "body": {"parts": [{"text": "one"}, {"text": "two"}]}}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        assert documents_in(tmp_path / name, "body.parts.text") == ["one", "two"]


@pytest.mark.parametrize("name", ["g.csv", "h.tsv", "i.parquet"])
def test_a_table_without_the_column_names_those_it_has(tmp_path, name):
    (tmp_path / name).write_bytes(WRITERS[name](["x"]))
    with pytest.raises(
        UserError, match=r"has no column 'body': give --text_field, one of id, text$"
    ) as raised:
        documents_in(tmp_path / name, "body")
    assert str(raised.value).startswith(f"--input_file {tmp_path / name} has no column")


def test_a_record_without_the_field_names_those_it_has(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(as_lines(["x"]))
    report = SkipReport()
    assert documents_in(tmp_path / "a.jsonl", "body", report) == []
    assert report.broken == [
        f"{tmp_path / 'a.jsonl'}:1: no text in the field 'body' (it has id, text): give --text_field"
    ]


# Broken records


def broken(tmp_path, name, raw):
    """Documents, and the broken records by file and line."""
    report = SkipReport()
    (tmp_path / name).write_bytes(raw)
    found = documents_in(tmp_path / name, report=report)
    assert report.broken_count == len(report.broken)
    assert all("\n" not in line for line in report.broken)
    return found, [line.removeprefix(str(tmp_path / name)) for line in report.broken]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "torn', "not JSON"),
        (b"plain words", "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b'{"body": "x"}', "no text in the field 'text' (it has body): give --text_field"),
        (b'{"text": 3}', "the field 'text' holds a number (3), not text"),
        (b'{"text": [2.5]}', "the field 'text' holds a number (2.5), not text"),
        (b'{"text": ' + b"9" * 4000 + b"}", "the field 'text' holds a number (...), not text"),
        (b'{"text": true}', "the field 'text' holds true, not text"),
        (b'{"text": null}', "the field 'text' is null"),
        (b'{"text": {"a": 1, "b": 2}}', "the field 'text' holds an object (it has a, b), not text"),
        (b'{"text": {}}', "the field 'text' holds an object (it has nothing), not text"),
        (b"3", "a number (3), neither text nor a record with the field 'text'"),
        (b"null", "null, neither text nor a record with the field 'text'"),
        (b"[" * 100_000, "not JSON"),
        (b"1" * 10_000, "not JSON"),
        (b'{"text": "a \x01 control character"}', "not JSON"),
    ],
)
def test_a_broken_line_is_counted_with_its_place_and_loses_no_other(tmp_path, line, what):
    raw = b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n'
    found, lines = broken(tmp_path, "a.jsonl", raw)
    assert found == ["one", "two"]
    assert len(lines) == 1
    assert lines[0].startswith(f":3: {what}")


@pytest.mark.parametrize("depth", [50, 200, 400, 600, 800, 900, 950, 990, 2000])
def test_lists_in_lists_are_read_or_counted_whatever_their_depth(tmp_path, depth):
    line = b"[" * depth + b'"deep"' + b"]" * depth
    found, lines = broken(tmp_path, "a.jsonl", b'"one"\n' + line + b'\n"two"\n')
    assert (found, len(lines)) in ((["one", "deep", "two"], 0), (["one", "two"], 1))


@pytest.mark.parametrize("before", [0, 100_000])
def test_bytes_that_are_no_text_break_their_own_line_alone(tmp_path, before):
    good = json.dumps({"text": RUSSIAN}, ensure_ascii=False).encode() + b"\n"
    count = 1 + before // len(good)
    raw = good * count + b'{"text": "caf\xe9"}\n' + good
    found, lines = broken(tmp_path, "a.jsonl", raw)
    assert found == [RUSSIAN] * (count + 1)
    assert len(lines) == 1
    assert lines[0].startswith(f":{count + 1}: not JSON")


@pytest.mark.parametrize("size", [39, 40, 41, 79, 80, 81, 120, 500])
def test_a_line_that_is_too_long_loses_no_other(tmp_path, monkeypatch, size):
    monkeypatch.setattr(records, "MAX_RECORD_CHARS", 40)
    long = b'"' + b"x" * (size - 2) + b'"'
    found, lines = broken(tmp_path, "a.jsonl", b'"one"\n' + long + b'\n"two"\n"three"\n')
    assert [text for text in found if "x" not in text] == ["one", "two", "three"]
    assert len(found) + len(lines) == 4
    if size > 40:
        assert lines == [":2: longer than 40 characters"]


def test_a_json_record_that_is_too_long_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_CHARS", 100_000)
    raw = json.dumps(["one", "x" * 500_000, "two"]).encode()
    found, lines = broken(tmp_path, "a.json", raw)
    assert found[0] == "one"
    assert len(lines) == 1 or len(found) == 3


@pytest.mark.parametrize(
    ("name", "row", "line"),
    [
        ("a.csv", "2", ":3: 1 field instead of 2"),
        ("a.csv", "2,x,y", ":3: 3 fields instead of 2"),
        ("a.tsv", "2", ":3: 1 field instead of 2"),
    ],
)
def test_a_row_of_another_length_is_counted_with_its_line(tmp_path, name, row, line):
    separator = "," if name == "a.csv" else "\t"
    rows = [separator.join(words) for words in (("id", "text"), ("1", "one"))]
    raw = "\n".join([*rows, row, separator.join(("3", "two")), ""]).encode()
    assert broken(tmp_path, name, raw) == (["one", "two"], [line])


def test_a_field_that_is_too_long_loses_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_CHARS", 100)
    found, lines = broken(tmp_path, "a.csv", b"text\none\n" + b"x" * 200 + b"\ntwo\n")
    assert found == ["one", "two"]
    assert len(lines) == 1
    assert lines[0].startswith(":3: ")


def test_a_line_of_names_that_is_too_long_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_CHARS", 100)
    with pytest.raises(UserError) as raised:
        broken(tmp_path, "a.csv", b"x" * 200 + b"\none\n")
    assert "\n" not in str(raised.value)


def test_strict_stops_at_the_first_broken_record(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'"one"\nno\n"two"\nno\n')
    pieces = Corpus((tmp_path / "a.jsonl",)).chunks(SkipReport(strict=True))
    assert next(pieces).raw == b"one"
    with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON .*--strict") as raised:
        next(pieces)
    assert "\n" not in str(raised.value)


def test_a_json_array_that_is_torn_keeps_what_was_whole_and_says_so(tmp_path):
    raw = json.dumps([{"text": "one"}, {"text": "two"}, {"text": "three"}]).encode()
    found, lines = broken(tmp_path, "a.json", raw[:-8])
    assert found == ["one", "two"]
    assert len(lines) == 1
    assert lines[0].startswith(", record 3: not JSON")


# What text may hold


@pytest.mark.parametrize("name", ["a.jsonl", "c.json", "i.parquet"])
def test_a_nul_in_a_string_is_a_character(tmp_path, name):
    (tmp_path / name).write_bytes(WRITERS[name](["a\0b"]))
    assert documents_in(tmp_path / name) == ["a\0b"]


def test_a_nul_in_a_text_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\0b")
    with pytest.raises(UserError, match=r"^--input_file .*a\.txt is not a text file"):
        documents_in(tmp_path / "a.txt")


def test_half_a_surrogate_pair_becomes_the_replacement_character_and_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'"a\\ud83d"\n"\\ud83d\\ude42"\n"\\udc00b"\n')
    report = SkipReport()
    assert documents_in(tmp_path / "a.jsonl", report=report) == ["a\ufffd", "🙂", "\ufffdb"]
    assert report.repaired == 2


# Text files


@quick
@given(st.text(st.sampled_from("ab\r\n é"), max_size=40), st.integers(4, 9), st.integers(1, 4))
def test_windows_line_ends_fold_even_across_a_border(tmp_path_factory, text, beginning, size):
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_bytes(text.encode())
    report = SkipReport()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "HEAD_BYTES", beginning)
        patch.setattr(encoding, "READ_BYTES", size)
        found = documents_in(path, report=report)
    folded = text.replace("\r\n", "\n")
    of_old_mac = "\r" in text and "\n" not in text
    if of_old_mac:
        folded = folded.replace("\r", "\n")
    assert found == ([folded] if text.strip() else [])
    if found:
        count = text.count("\r\n")
        said = [f"{path}: {plural(count, 'Windows line end')} (CRLF) folded to LF"] if count else []
        said += [f"{path}: line ends of an old Mac (CR) became LF"] * of_old_mac
        assert report.notes == said


def test_old_mac_line_ends_go_on_behind_the_beginning(tmp_path):
    path = tmp_path / "mac.txt"
    lines = [f"line {number}" for number in range(40_000)]
    path.write_bytes("\r".join(lines).encode() + b"\r\nlast\r")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "READ_BYTES", 1000)
        assert documents_in(path) == ["\n".join([*lines, "last", ""])]


def test_notes_name_the_file(tmp_path):
    (tmp_path / "a.txt").write_bytes("é un café\r\n".encode("utf-16"))
    report = SkipReport()
    documents_in(tmp_path / "a.txt", report=report)
    assert report.notes == [
        f"{tmp_path / 'a.txt'}: read as UTF-16, by its byte order mark",
        f"{tmp_path / 'a.txt'}: 1 Windows line end (CRLF) folded to LF",
    ]
