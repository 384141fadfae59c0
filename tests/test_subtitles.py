"""Subtitles give what is said, notebooks their text and code: no times, no tags, no output."""

import json

import pytest
from reading import documents_in, refusal

from nanogpt.text import records
from nanogpt.text.documents import SkipReport

SRT = """\
\ufeff1
00:00:01,000 --> 00:00:02,500
<i>In the beginning</i>
there was {\\an8}a line.

2
00:00:03,000 --> 00:00:04,000 X1:1 X2:2
- Really?
- Yes.
3
00:00:05,000 --> 00:00:06,000
42 < 43 &amp; 7

4
00:00:07,000 --> 00:00:08,000

5
00:00:09,000 --> 00:00:10,000
Yes.
"""

SRT_TEXT = "In the beginning there was a line.\n- Really?\n- Yes.\n42 < 43 & 7\nYes.\n"

VTT = """\
WEBVTT - a title
Kind: captions

STYLE
::cue { color: red }

NOTE a comment
over two lines

intro
00:01.000 --> 00:02.000 align:start
<v Anna Müller>Hi <b>there</b>
<v.loud Bot>beep</v>

00:03.000 --> 01:00:04.000
<c.yellow>again</c>
"""

LIVE = """\
WEBVTT

00:00:00.000 --> 00:00:02.000
hello<00:00:00.500><c> world</c>

00:00:02.000 --> 00:00:02.010
hello world

00:00:02.010 --> 00:00:04.000
hello world
and<00:00:02.500><c> more</c>

00:00:04.000 --> 00:00:04.010
and more
"""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_an_srt_file(tmp_path, end):
    (tmp_path / "a.srt").write_bytes(SRT.replace("\n", end).encode())
    report = SkipReport()
    assert documents_in(tmp_path / "a.srt", report) == [SRT_TEXT]
    assert report.broken == []
    (tmp_path / "a.srt").write_bytes(SRT.replace("there", "dört").encode("utf-16"))
    assert documents_in(tmp_path / "a.srt") == [SRT_TEXT.replace("there", "dört")]


def test_a_vtt_file_has_speakers(tmp_path):
    (tmp_path / "a.vtt").write_text(VTT, "utf-8")
    assert documents_in(tmp_path / "a.vtt") == ["Anna Müller: Hi there\nBot: beep\nagain\n"]
    assert documents_in(tmp_path / "a.vtt", rules=["Anna Müller=Anna", "Bot="]) == ["Anna: Hi there\nagain\n"]


def test_live_captions_say_each_line_once(tmp_path):
    (tmp_path / "a.vtt").write_text(LIVE)
    assert documents_in(tmp_path / "a.vtt") == ["hello world\nand more\n"]


def test_subtitles_under_another_name_are_said(tmp_path):
    for text in (SRT, LIVE):
        (tmp_path / "a.txt").write_text(text, "utf-8")
        report = SkipReport()
        documents_in(tmp_path / "a.txt", report)
        assert (
            "looks like subtitles: read as it is (--input_format subtitles" in report.reading_notes("text")[0]
        )
    assert documents_in(tmp_path / "a.txt", input_format="subtitles") == ["hello world\nand more\n"]
    (tmp_path / "a.txt").write_text("1\nplain\n")
    report = SkipReport()
    documents_in(tmp_path / "a.txt", report)
    assert report.reading_notes("text") == ()


def test_tags_that_never_end_take_little(tmp_path):
    text = "<v " * 50_000 + "{\\an" * 50_000 + "<b" * 50_000
    (tmp_path / "a.srt").write_text(f"1\n00:00:01,000 --> 00:00:02,000\n{text}\n")
    assert documents_in(tmp_path / "a.srt") == [text + "\n"]


# Notebooks


def notebook(cells, **more):
    return json.dumps({"cells": cells, "nbformat": 4, **more}, ensure_ascii=False).encode()


CELLS = [
    {"cell_type": "markdown", "source": ["# Title\n", "Ünter text"]},
    {"cell_type": "code", "source": "x = 1\nprint(x)\n", "outputs": [{"text": ["1\n"]}]},
    {"cell_type": "raw", "source": "left out"},
    {"cell_type": "code", "source": []},
    {"cell_type": "markdown", "source": "The end."},
    "nonsense",
]


def test_a_notebook_is_markdown(tmp_path):
    path = tmp_path / "a.ipynb"
    path.write_bytes(notebook(CELLS, metadata={"language_info": {"name": "python"}}))
    assert documents_in(path) == ["# Title\nÜnter text\n\n```python\nx = 1\nprint(x)\n```\n\nThe end."]
    old = {
        "worksheets": [{"cells": [{"cell_type": "code", "input": ["x = 1"], "language": "python"}]}],
        "nbformat": 3,
    }
    path.write_text(json.dumps(old))
    assert documents_in(path) == ["```\nx = 1\n```"]


def test_what_is_no_notebook_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.ipynb"
    assert "is no notebook: not JSON" in refusal(path, b"{")
    assert "is no notebook: not JSON" in refusal(path, b"[" * 100_000)
    for raw in (b"[]", b'{"cells": {}}', b'{"worksheets": 3}', b"null"):
        assert "has no cells: it is no notebook" in refusal(path, raw)
    monkeypatch.setattr(records, "MAX_RECORD_CHARS", 100)
    assert "is longer than 100 characters: clear its outputs" in refusal(path, notebook(CELLS))
