"""Mail becomes text: who wrote to whom about what, and the text, decoded, however it is packed."""

import base64
import io
import mailbox
import re
from email.headerregistry import Address
from email.message import EmailMessage

import pytest
from reading import documents_in, refusal

from nanogpt.text import mail
from nanogpt.text.corpus import Corpus, find_corpus
from nanogpt.text.documents import SkipReport
from nanogpt.text.options import ReadOptions
from nanogpt.text.speakers import require_known

PLAIN = b"""\
Return-Path: <anna@example.org>
From: =?utf-8?q?M=C3=BCller=2C_Anna?= <anna@example.org>
To: Ben <ben@example.org>, carla@example.org
Subject: =?iso-8859-1?Q?Gr=FC=DFe?=
 =?utf-8?B?IGFuIGFsbGU=?=
Date: Mon, 1 Jan 2024 10:00:00 +0100
Content-Type: text/plain; charset=iso-8859-1
Content-Transfer-Encoding: quoted-printable

Sch=F6ne Gr=FC=DFe, soft=
 break.

From here on: quoted.
>From there: quoted too.
"""

PLAIN_TEXT = """\
From: Müller, Anna
To: Ben, carla@example.org
Subject: Grüße an alle

Schöne Grüße, soft break.

From here on: quoted.
>From there: quoted too.
"""

FLOWED = b"""\
From: anna@example.org
Content-Type: text/plain; charset=utf-8; format=flowed

Each line \r
goes on \r
here.\r
\r
 >not a quote, \r
 From is a word.\r
> Quoted \r
> text \r
>> of another \r
>> depth\r
>\r
and after it\r
-- \r
Anna\r
"""

FLOWED_TEXT = """\
From: anna@example.org

Each line goes on here.

>not a quote, From is a word.
> Quoted text\x20
>> of another depth
>
and after it
--\x20
Anna
"""

ALTERNATIVE = b"""\
From: ben@example.org
Subject: two kinds
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary=A

--A
Content-Type: multipart/alternative; boundary=B

--B
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: base64

%b
--B
Content-Type: text/html; charset=utf-8

<p>No <b>no</b></p>
--B--
--A
Content-Type: text/plain; name="notes.txt"
Content-Disposition: attachment; filename="notes.txt"

an attachment
--A
Content-Type: text/plain

after the picture
--A--
""" % base64.b64encode("Plain → text".encode())

ALTERNATIVE_TEXT = "From: ben@example.org\nSubject: two kinds\n\nPlain → text\nafter the picture\n"

HTML = (
    b"From: News <news@example.org>\r\nTo: a@b.c\r\nSubject: html\r\nContent-Type: text/html\r\n\r\n"
    b'<html><head><meta charset="windows-1251"><style>p {}</style></head><body><p style="display: none">x</p>'
    b"<p>\xcf\xf0\xe8\xe2\xe5\xf2 &amp; <a href='x'>link</a></p><p>two</p></body></html>\r\n"
)

HTML_TEXT = "From: News\nTo: a@b.c\nSubject: html\n\nПривет & link\n\ntwo\n"  # noqa: RUF001 - Cyrillic

EMPTY = b"From: a@b.c\nSubject: nothing\nContent-Type: image/png\n\nxxx\n"

MAILS = [PLAIN, EMPTY, ALTERNATIVE, HTML]
TEXTS = [PLAIN_TEXT, ALTERNATIVE_TEXT, HTML_TEXT]


def mbox(mails=MAILS):
    """An mbox file, whose lines that begin with From are quoted (mboxrd)."""
    above = b"From anna@example.org Mon Jan  1 10:00:00 2024\n"
    return b"".join(above + re.sub(rb"(?m)^(>*From )", rb">\1", raw) + b"\n" for raw in mails)


@pytest.mark.parametrize("name", ["inbox.mbox", "Inbox", "2024-January.txt"])
def test_an_mbox_file_has_a_document_for_each_mail(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(mbox())
    report = SkipReport()
    assert documents_in(path, report) == TEXTS
    assert report.broken == []
    assert report.notes == [f"{path}: 1 mail without text, or left out by --speakers"]
    assert report.reading_notes("text")[0] == (
        f"{path}: read as a mailbox (mbox) (--input_format text: as plain text, as it is)"
    )
    raw = documents_in(path, input_format="text")
    assert len(raw) == 1
    assert raw[0].startswith("From anna@example.org Mon Jan")


def test_an_mbox_file_is_read_in_a_stream(tmp_path, monkeypatch):
    """Whatever the size of its blocks, with a few mails at a time, and a text "From " that is no mail."""
    text = (
        b"From: a@b.c\nSubject: s\n\nA text.\n\nFrom the first day on: yes\nNote no\n"
        + b"long " * 300
        + b"\n"
    )
    raw = mbox([text] * 3)

    for size in (100, 1 << 16):
        monkeypatch.setattr(mail, "LINE_BYTES", size)
        file = io.BytesIO(raw)
        mails = mail.split_mbox(file)
        assert next(mails).rstrip(b"\n") == text.rstrip(b"\n")
        assert file.tell() < 2 * len(text)
        assert len(list(mails)) == 2
    monkeypatch.setattr(mail, "MAX_MAIL_BYTES", 30)  # the rest of a longer mail is passed over
    assert [one[-8:] for one in mail.split_mbox(io.BytesIO(raw))] == [b"A text.\n"] * 3


def test_a_mail_in_a_file_of_its_own(tmp_path):
    for name, raw, text in zip(("1.eml", "2.eml", "3.eml"), (PLAIN, ALTERNATIVE, HTML), TEXTS, strict=True):
        (tmp_path / name).write_bytes(raw)
        assert documents_in(tmp_path / name) == [text]


def test_flowed_text_is_unwrapped(tmp_path):
    (tmp_path / "a.eml").write_bytes(FLOWED)
    assert documents_in(tmp_path / "a.eml") == [FLOWED_TEXT]
    syllables = b"Content-Type: text/plain; format=Flowed; DelSp=YES\n\nsyl \nla \nbles  \nthere"
    (tmp_path / "a.eml").write_bytes(b"From: a@b.c\n" + syllables)
    assert documents_in(tmp_path / "a.eml") == ["From: a@b.c\n\nsyllables there\n"]
    (tmp_path / "a.eml").write_bytes(FLOWED.replace(b"flowed", b"fixed"))
    assert "goes on \nhere." in documents_in(tmp_path / "a.eml")[0]


def test_a_maildir_is_read_with_its_subfolders_and_without_its_index(tmp_path):
    box = tmp_path / "mail"
    for folder in ("cur", "new", "tmp", ".Sent/cur", ".Sent/new", ".Sent/tmp"):
        (box / folder).mkdir(parents=True)
    (box / "cur/170.M1P2.host:2,S").write_bytes(ALTERNATIVE)
    (box / "new/171.M1P3.host").write_bytes(HTML)
    (box / "tmp/172.M1P4.host").write_bytes(PLAIN)
    (box / ".Sent/cur/173.M1P5.host:2,S").write_bytes(b"From: me@b.c\nTo: a@b.c\nSubject: s\n\nsent\n")
    (box / "dovecot.index.log").write_bytes(b"\0\1")
    (box / ".Sent/dovecot-uidlist").write_bytes(b"3 V1 N1")
    report, found = SkipReport(), b""
    for raw, _ in find_corpus([str(box)]).chunks(report):
        found += raw
    assert report.broken == report.notes == []
    assert found.decode() == "From: me@b.c\nTo: a@b.c\nSubject: s\n\nsent\n" + ALTERNATIVE_TEXT + HTML_TEXT
    assert report.looks.total() == 3


def test_a_mail_under_another_name_is_said_and_not_changed(tmp_path):
    (tmp_path / "letter.txt").write_bytes(EMPTY.replace(b"Content-Type: image/png\n", b"Date: today\n"))
    report = SkipReport()
    (text,) = documents_in(tmp_path / "letter.txt", report)
    assert text.startswith("From: a@b.c\nSubject: nothing\nDate")
    assert report.reading_notes("text") == (
        f"{tmp_path / 'letter.txt'}: looks like a mail: read as it is "
        "(--input_format mail reads its text alone)",
    )
    (tmp_path / "play.txt").write_text("From: the start\n\nSubject: none of this is mail.\n")
    report = SkipReport()
    documents_in(tmp_path / "play.txt", report)
    assert report.reading_notes("text") == ()


def test_senders_are_renamed_and_left_out_by_name_or_address(tmp_path):
    path = tmp_path / "a.mbox"
    path.write_bytes(mbox())
    rules = ["Müller, Anna=Anna", "news@example.org=", "ben@example.org=Ben"]
    report = SkipReport()
    corpus = Corpus((path,), ReadOptions(speakers=tuple(rules)))
    found = b"".join(raw for raw, _ in corpus.chunks(report)).decode()
    assert [line for line in found.splitlines() if line.startswith("From: ")] == ["From: Anna", "From: Ben"]
    assert "To: Ben, carla@example.org\n" in found
    assert report.speakers == {"Müller, Anna": 1, "ben@example.org": 1, "News": 1}
    require_known(rules, report.used_rules, report.speakers)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"Content-Type: text/plain; charset=no-such\n\n\xe9t\xe9", "été"),
        (b"Content-Type: text/plain; charset=idna\n\nxn--a", "xn--a"),
        (b"Content-Type: text/plain; charset=utf-8\n\n\xe9t\xe9", "été"),
        (b"Content-Type: text/plain\n\nna\xc3\xafve", "naïve"),
        (b"Content-Transfer-Encoding: base64\n\n!!!SGk=", "Hi"),
        (b"Content-Type: multipart/mixed\n\nno boundary", ""),
        (b"Subject: =?nonsense?Q?x?=\n\nok", "Subject: =?nonsense?Q?x?=\n\nok"),
        (b"\xff\xfe: x\n\nok", ""),
    ],
)
def test_malformed_mail_is_read_as_well_as_it_can_be(tmp_path, raw, text):
    (tmp_path / "a.eml").write_bytes(b"From: a@b.c\n" + raw)
    found = documents_in(tmp_path / "a.eml")
    if text.startswith("Subject"):
        text = text.removeprefix("Subject: ")
        assert found == [f"From: a@b.c\nSubject: {text}\n"]
    elif text:
        assert found == [f"From: a@b.c\n\n{text}\n"]


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_letters_in_a_header_that_names_no_encoding(tmp_path, encoding):
    text = "From: Jürgen <j@example.org>\nTo: Zoë <z@example.org>\nSubject: Tür\n\nGröße\n"
    (tmp_path / "a.eml").write_bytes(text.encode(encoding))
    assert documents_in(tmp_path / "a.eml") == ["From: Jürgen\nTo: Zoë\nSubject: Tür\n\nGröße\n"]


def test_a_hostile_mail_is_reported_and_the_next_one_is_read(tmp_path):
    deep = b"From: a@b.c\n"
    for n in range(3000):
        deep += b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (n, n)
    path = tmp_path / "a.mbox"
    path.write_bytes(mbox([deep + b"\n\nx\n", PLAIN]))
    report = SkipReport()
    assert documents_in(path, report)[-1].startswith("From: Müller, Anna")
    assert all("no mail that can be read" in line for line in report.broken)
    assert refusal(path, b"just text\n").endswith("has no mail: it is no mbox file")


def test_what_python_itself_writes(tmp_path):
    """EmailMessage in its encodings, in a mailbox.mbox and a mailbox.Maildir."""
    texts = ["plain\nFrom here\n.", "Grüße → 🙂 " * 40, "x" * 1500, "> quoted\n\n\nend"]
    boxes = mailbox.mbox(tmp_path / "box"), mailbox.Maildir(tmp_path / "dir")
    for number, text in enumerate(texts):
        message = EmailMessage()
        message["From"] = Address("Änne, Dr.", "a", "example.org")
        message["To"] = [Address("Ben", "b", "example.org"), Address("", "c", "example.org")]
        message["Subject"] = f"{number}: " + "lange Überschrift " * 10
        message.set_content(text, cte=["8bit", "base64", "quoted-printable", "7bit"][number])
        message.add_alternative("<p>HTML</p>", subtype="html")
        message.add_attachment(b"data", maintype="application", subtype="pdf", filename="ü.pdf")
        for box in boxes:
            box.add(message)
    for box in boxes:
        box.close()
    expected = sorted(
        f"From: Änne, Dr.\nTo: Ben, c@example.org\nSubject: {number}: "
        + ("lange Überschrift " * 10).strip()
        + f"\n\n{text.strip()}\n"
        for number, text in enumerate(texts)
    )
    assert sorted(documents_in(tmp_path / "box")) == expected
    report = SkipReport()
    corpus = find_corpus([str(tmp_path / "dir")])
    assert sorted(raw.decode() for raw, _ in corpus.chunks(report)) == expected
    assert report.broken == report.notes == []


def test_headers_made_to_take_for_ever_take_little(tmp_path):
    for value in (b"=?a?q?" * 100_000, b"(" * 100_000, b"a@b.c, " * 100_000, b'"' * 100_001):
        (tmp_path / "a.eml").write_bytes(b"From: " + value + b"\nSubject: " + value + b"\n\ntext\n")
        report = SkipReport()
        found = documents_in(tmp_path / "a.eml", report)
        assert len(found) + report.broken_count == 1
