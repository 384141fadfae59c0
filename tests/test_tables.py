"""A table of any make gives its texts; a quote that is never closed costs its own row and no other."""

import contextlib
import csv
import io
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import texts_in
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.errors import UserError
from nanogpt.text import records
from nanogpt.text.corpus import Corpus
from nanogpt.text.documents import SkipReport

quick = settings(deadline=None, derandomize=True, max_examples=60)


def written(rows, **dialect):
    file = io.StringIO(newline="")
    csv.writer(file, **dialect).writerows(rows)
    return file.getvalue()


# The line of names


@pytest.mark.parametrize(
    "names",
    [
        "id, text",
        'id, "text"',
        '"id" , "text" ',
        " id ,text\t",
        '\ufeff"id","text"',
        "\ufeffid,text",
        "\n\nid,text",
    ],
)
def test_spaces_and_marks_around_the_names_of_columns_are_no_part_of_them(tmp_path, names):
    found, report = texts_in(tmp_path / "a.csv", f"{names}\n1,one\n2,two\n")
    assert (found, report.broken) == (["one", "two"], [])


def test_a_table_with_spaces_behind_its_commas_keeps_its_quotes(tmp_path):
    found, report = texts_in(tmp_path / "a.csv", 'id, "text", n\n1, "one, and ""more""", 3\n2, two, 4\n')
    assert (found, report.broken) == (['one, and "more"', "two"], [])


def test_a_column_whose_name_has_spaces_is_found_by_that_name(tmp_path):
    assert texts_in(tmp_path / "a.csv", "id, text\n1, one\n", " text")[0] == [
        " one"
    ]  # as written, to the letter


@pytest.mark.parametrize(
    ("delimiter", "said"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars"), (",", "commas")]
)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_another_delimiter_is_found_and_said(tmp_path, name, delimiter, said):
    texts = ["one, two; three\tfour | five", 'a "quoted"\nline', " spaces "]
    rows = [["id", "text"], *([i, text] for i, text in enumerate(texts))]
    found, report = texts_in(tmp_path / name, written(rows, delimiter=delimiter))
    usual = {"a.csv": ",", "a.tsv": "\t"}[name]
    assert (found, report.broken) == (texts, [])
    assert report.notes == (
        [] if delimiter == usual else [f"columns separated by {said}, as the line of names shows"]
    )


def test_the_delimiter_that_a_spreadsheet_says_is_taken(tmp_path):
    assert texts_in(tmp_path / "a.csv", "sep=;\r\nid;text\r\n1;a, b\r\n")[0] == ["a, b"]
    assert texts_in(tmp_path / "a.csv", "sep=:\nid:text\n1:a, b\n")[0] == ["a, b"]


def test_delimiters_in_the_text_of_a_single_column_are_text(tmp_path):
    found, report = texts_in(tmp_path / "a.tsv", "text\na, b; c | d\n")
    assert (found, report.notes) == (["a, b; c | d"], [])


def test_an_unknown_column_is_told_by_the_names_of_the_likeliest_delimiter(tmp_path):
    with pytest.raises(UserError, match=r"has no column 'body\.x': give --text_field, one of id, text, n$"):
        texts_in(tmp_path / "a.csv", "id;text;n\n1;one;2\n", "body.x")


def test_of_two_columns_with_one_name_the_first_is_read_and_that_is_said(tmp_path):
    found, report = texts_in(tmp_path / "a.csv", "text,text\none,two\n")
    assert (found, report.notes) == (["one"], ["several columns 'text': the first is read"])


def test_a_dot_in_the_name_of_a_column_is_a_dot(tmp_path):
    assert texts_in(tmp_path / "a.csv", "review,review.body\nno,yes\n", "review.body")[0] == ["yes"]
    assert texts_in(tmp_path / "a.tsv", "review\treview.body\nno\tyes\n", "review.body")[0] == ["yes"]


def test_a_dot_in_a_parquet_file_is_part_of_a_name_or_leads_into_a_structure(tmp_path):
    def parquet(**columns):
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file)
        return file.getvalue()

    inner = [{"body": "inner", "x.y": "deep"}]
    for raw, field, text in (
        (parquet(**{"review": inner, "review.body": ["yes"]}), "review.body", "yes"),
        (parquet(**{"review.body": ["yes"], "review": inner}), "review.body", "yes"),
        (parquet(review=inner), "review.body", "inner"),
        (parquet(review=inner), "review.x.y", "deep"),
        (parquet(**{"a.b": inner}), "a.b.body", "inner"),
    ):
        assert texts_in(tmp_path / "a.parquet", raw, field)[0] == [text]


def test_nulls_and_numbers_in_a_parquet_file_are_counted_as_what_they_are(tmp_path):
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", None], "n": [1, 2], "raw": [b"a", b"b"]}), file)
    found, report = texts_in(tmp_path / "a.parquet", file.getvalue())
    assert (found, report.broken) == (["one"], [", row 2: the field 'text' is null"])
    found, report = texts_in(tmp_path / "a.parquet", file.getvalue(), "n")
    assert report.broken[0] == ", row 1: the field 'n' holds a number (1), not text"
    found, report = texts_in(tmp_path / "a.parquet", file.getvalue(), "raw")
    assert report.broken[0] == ", row 1: the field 'raw' holds a value of type bytes, not text"


def test_a_number_in_a_column_of_a_csv_file_is_text_as_everything_there(tmp_path):
    assert texts_in(tmp_path / "a.csv", "text\n42\n")[0] == ["42"]


# Quotes that are never closed

BROKEN = {
    "to the end": 'id,text\n1,one\n2,"two\n3,three\n4,four\n',
    "to the next quote": 'id,text\n1,one\n2,"two\n3,three\n4,"four"\n',
    "all quoted": '"id","text"\n"1","one"\n"2","two\n"3","three"\n"4","four"\n',
    "to a comma": 'id,text\n1,one\n2,"two\n3,three\n4,"four"\n5,", five"\n',
    "no end of line": 'id,text\n1,one\n2,"two\n3,three\n4,four',
    "over lines": 'id,text\n1,one\n2,"two\nmore\n3,three\n4,"four"\n',
    "into a quote": 'id,text\n1,one\n2,"two\nmore\n3,three\n4,"fo""ur"\n',
    "windows": 'id,text\r\n1,one\r\n2,"two\r\n3,three\r\n4,four\r\n',
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_unclosed_quote_costs_its_own_row_and_no_other(tmp_path, kind):
    found, report = texts_in(tmp_path / "a.csv", BROKEN[kind])
    assert [text.replace('"', "") for text in found[:3]] == ["one", "three", "four"]
    assert report.broken == [
        ":3: a quote that opens here is not closed: its row is left out, "
        "the lines after it are read as rows of their own"
    ]


def test_an_unclosed_quote_is_named_by_the_line_where_it_opens(tmp_path):
    raw = 'id,a,text\n1,"two\nlines",one\n2,"two\nlines","runs away\n3,x,three\n'
    found, report = texts_in(tmp_path / "a.csv", raw)
    assert found == ["one", "three"]
    assert [line.partition(": ")[0] for line in report.broken] == [":5"]


def test_a_table_of_one_column_survives_an_unclosed_quote_too(tmp_path):
    found, report = texts_in(tmp_path / "a.csv", 'text\none\n"two\nthree\nfour\n')
    assert found == ["one", "three", "four"]
    assert report.broken_count == 1


def test_a_quoted_text_that_is_cut_off_is_one_broken_row(tmp_path):
    found, report = texts_in(tmp_path / "a.csv", 'id,text\n1,one\n2,"a text\nof lines\nthat breaks off')
    assert found == ["one"]
    assert report.broken == [":3: a quote that opens here is not closed: 3 lines left out, up to line 5"]


def test_quotes_inside_a_text_are_kept_as_they_were(tmp_path):
    """Sloppy but whole: nothing of it is lost, so nothing is broken."""
    found, report = texts_in(
        tmp_path / "a.csv", 'id,text\n1,"say ""hi""\nand go"\n2,so "he" said\n3,"a "b" c"\n'
    )
    assert (found, report.broken) == (['say "hi"\nand go', 'so "he" said', 'a b" c"'], [])
    found, report = texts_in(tmp_path / "a.csv", 'id,text\n1,"first\nsays "hi" there"\n2,two\n')
    assert (found, report.broken) == (['first\nsays hi" there"', "two"], [])


def test_reading_behind_unclosed_quotes_stays_linear_and_counts_every_row(tmp_path, monkeypatch):
    """Every row but the last opens a quote that runs to the end of the file, if it may."""
    taken = []
    fresh = records.Lines.read
    monkeypatch.setattr(records.Lines, "read", lambda self: taken.append(1) or fresh(self))
    monkeypatch.setattr(records, "MAX_RECORD_CHARS", 1000)
    raw = (
        "id\ttext\n"
        + "".join(f'{i}\t"row {i} `\n'.replace("`", "x" * (i % 7)) for i in range(2001))
        + "n\tlast\n"
    )
    found, report = texts_in(tmp_path / "a.tsv", raw)
    assert found[-1] == "last"
    assert len(found) + report.broken_count == 2002
    assert len(taken) < 40 * 2000


def test_strict_stops_at_an_unclosed_quote(tmp_path):
    (tmp_path / "a.csv").write_text(BROKEN["to the end"])
    with pytest.raises(UserError, match=r"a\.csv:3: a quote that opens here .*--strict") as raised:
        list(Corpus((tmp_path / "a.csv",)).chunks(SkipReport(strict=True)))
    assert "\n" not in str(raised.value)


def test_a_byte_order_mark_at_a_later_line_is_dropped_and_said(tmp_path):
    found, report = texts_in(tmp_path / "a.csv", "\ufefftext\none\n\ufefftwo\n")
    assert found == ["one", "two"]
    assert report.notes[-1] == "1 byte order mark at the start of a later line dropped (were files joined?)"


texts = st.text(st.sampled_from("ab ,;\n\"'é🙂"), min_size=1, max_size=12).map(lambda text: f"t{text}t")
"""Each begins and ends with a letter: none is blank."""


@quick
@given(st.lists(texts, min_size=1, max_size=8), st.integers(0, 3), st.randoms(use_true_random=False))
def test_every_row_comes_out_or_is_counted_whatever_quote_is_lost(tmp_path_factory, rows, quoting, chance):
    """A row loses a quote, if it has one; all that come before it are whole."""
    path = tmp_path_factory.getbasetemp() / "lost.csv"
    lines = [written([[i, text]], quoting=[0, 1, 2, 0][quoting]) for i, text in enumerate(rows)]
    number = chance.randrange(len(rows))
    quotes = [place for place, char in enumerate(lines[number]) if char == '"']
    if quotes:
        place = chance.choice(quotes)
        lines[number] = lines[number][:place] + lines[number][place + 1 :]
    found, report = texts_in(path, "id,text\n" + "".join(lines))
    assert found[:number] == rows[:number]
    assert len(found) + report.broken_count >= len(rows)


@pytest.mark.parametrize("text", ["id,text\n1,one\n", "text\n", "id;name\n1;2\n"])
def test_the_limit_of_csv_is_as_it_was_before(tmp_path, text):
    before = csv.field_size_limit()
    with contextlib.suppress(UserError):  # the last one has no such column
        texts_in(tmp_path / "a.csv", text)
    assert csv.field_size_limit() == before


def test_random_tables_are_read_or_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_CHARS", 60)
    chance = random.Random(5)
    for _ in range(300):
        body = "".join(chance.choices('ab",;\t|\r\n\ufeff\x00 ', k=chance.randrange(120)))
        try:
            texts_in(tmp_path / "a.csv", chance.choice(["text\n", "id,text\n", "id; text\r\n", ""]) + body)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either is right
