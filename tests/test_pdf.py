"""A PDF gives its text, page by page; one that is damaged, locked, or exhausts the machine is refused."""

import random
import sys
import zlib

import pytest
from reading import documents_in, refusal

from nanogpt.errors import UserError
from nanogpt.text import pdf
from nanogpt.text.corpus import find_corpus
from nanogpt.text.documents import SkipReport


def lines(*texts):
    """The content of a page with lines of text."""
    shown = " ".join(f"({text}) Tj T*" for text in texts)
    return f"BT /F1 12 Tf 72 720 Td 14 TL {shown} ET".encode("cp1252")


def pdf_of(*pages, compression=0, trailer=""):
    """A PDF with these page contents; compression: how many times each is compressed."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>".encode(),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>",
    ]
    filters = f"/Filter[{'/FlateDecode' * compression}]"
    for number, content in enumerate(pages):
        raw = content
        for _ in range(compression):
            raw = zlib.compress(raw, 9)
        objects += [
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<</Font<</F1 3 0 R>>>>"
            b"/Contents %d 0 R>>" % (5 + 2 * number),
            f"<</Length {len(raw)}{filters}>>stream\n".encode() + raw + b"\nendstream",
        ]
    out, places = bytearray(b"%PDF-1.4\n"), list[int]()
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n" % number + content + b"\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    count = len(objects) + 1
    ending = f"xref\n0 {count}\n0000000000 65535 f \n{table}trailer<</Size {count}/Root 1 0 R{trailer}>>\n"
    return bytes(out) + f"{ending}startxref\n{len(out)}\n%%EOF".encode()


BOOK = pdf_of(lines("Gr\xfc\xdfe from", "a hyphen-", "ated word."), lines("Page two."), compression=1)
BOOK_TEXT = "Grüße from\na hyphenated word.\nPage two.\n"


@pytest.mark.parametrize("name", ["a.pdf", "A.PDF", "download"])
def test_the_text_of_all_pages(tmp_path, name):
    report = SkipReport()
    (tmp_path / name).write_bytes(BOOK)
    assert documents_in(tmp_path / name, report) == [BOOK_TEXT]
    assert report.broken == []
    assert report.reading_notes("text") == (f"{tmp_path / name}: read as PDF",)


def test_headers_footers_and_page_numbers_are_left_out(tmp_path):
    """A header on the left and another on the right, a footer of two lines, all but on the first page."""
    pages = [lines("A LONG TALE", "Once there was", "an ant.")]
    for number in range(2, 10):
        head = f"{number} A Long Tale" if number % 2 == 0 else f"Chapter {number // 4} {number}"
        body = "It rained", f"in the year {1900 + 7 * number}."
        pages.append(lines(head, f"Part {number**2}.", *body, "Draft of May", f"- {number} of 9 -"))
    (tmp_path / "a.pdf").write_bytes(pdf_of(*pages))
    report = SkipReport()
    (text,) = documents_in(tmp_path / "a.pdf", report)
    expected = ["A LONG TALE", "Once there was", "an ant."]
    for number in range(2, 10):
        left_out = number % 2 == 0
        expected += [] if left_out else [f"Chapter {number // 4} {number}"]
        expected += [f"Part {number**2}.", "It rained", f"in the year {1900 + 7 * number}."]
    assert text.splitlines() == expected
    says = "20 lines left out that come again on many pages (headers, footers, page numbers)"
    assert report.notes == [f"{tmp_path / 'a.pdf'}: {says}"]


@pytest.mark.parametrize(
    "pages",
    [
        [["The Tale", f"page {n} of it", str(n)] for n in range(3)],  # too few
        [["The Tale"] for n in range(9)],  # nothing else is there
        [[f"{n * n} 1.5", f"{3 * n} 2.5", f"{100 - n} 0.5"] for n in range(9)],  # rows of a table
        [
            [("Anna:", "Ben:", "Carla:")[n % 3], f"line {n * n}", "Well."[: n % 4 + 1]] for n in range(12)
        ],  # a play
    ],
)
def test_lines_that_may_be_text_stay(tmp_path, pages):
    (tmp_path / "a.pdf").write_bytes(pdf_of(*[lines(*page) for page in pages]))
    report = SkipReport()
    (text,) = documents_in(tmp_path / "a.pdf", report)
    assert text.splitlines() == [line for page in pages for line in page]
    assert report.notes == []


def test_progress_comes_page_by_page(tmp_path):
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf_of(*[b"%" + b"x" * 30_000 + b"\n" + lines(f"word {n * n}") for n in range(40)]))
    told = []
    assert list(find_corpus([str(path)]).chunks(SkipReport(), told.append))
    assert sum(told) == path.stat().st_size
    assert sum(count > 0 for count in told) >= 40


def test_several_with_a_damaged_one_among_them(tmp_path):
    (tmp_path / "1.pdf").write_bytes(BOOK)
    (tmp_path / "2.pdf").write_bytes(b"%PDF-1.4 and nothing more")
    (tmp_path / "3.txt").write_text("three")
    report, found = SkipReport(), b""
    for raw, _ in find_corpus([str(tmp_path)]).chunks(report):
        found += raw
    assert found.decode() == BOOK_TEXT + "three"
    assert report.broken == [f"{tmp_path / '2.pdf'}: is damaged: no PDF that PDFium can read"]


def test_a_pdf_without_text_or_with_a_password(tmp_path):
    assert "has no text, only pictures of it perhaps" in refusal(tmp_path / "a.pdf", pdf_of(b"0 0 9 9 re f"))
    keys = f"/O<{'41' * 32}>/U<{'42' * 32}>"
    locked = f"/Encrypt<</Filter/Standard/V 1/R 2/P -1{keys}>>/ID[<00><00>]"
    message = refusal(tmp_path / "a.pdf", pdf_of(lines("x"), trailer=locked))
    assert message.endswith("needs a password: remove it first (qpdf --decrypt in.pdf out.pdf)")


def test_it_needs_its_library_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    message = refusal(tmp_path / "a.pdf", BOOK)
    assert message.endswith("needs the package pypdfium2: pip install nanogpt[documents]")


def test_a_page_that_is_a_bomb_ends_the_file_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(pdf, "MAX_PAGE_CHARS", 1000)
    letters = b"BT /F1 12 Tf " + b"(aaaaaaaaaa) Tj " * 200 + b" ET"
    message = refusal(tmp_path / "a.pdf", pdf_of(lines("x"), letters))
    assert message.endswith("has more than 1,000 characters on page 2: refused, as a bomb")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not bound a process's memory")
def test_a_page_that_takes_all_memory_ends_the_file_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(pdf, "MAX_MEMORY", 1 << 28)
    bomb = pdf_of(lines("x"), b" " * (200 << 20), compression=2)
    assert len(bomb) < 10_000
    assert "makes PDFium fail at page" in refusal(tmp_path / "a.pdf", bomb)


def test_a_page_that_takes_too_long_ends_the_file_in_one_line(tmp_path, monkeypatch):
    """It takes a minute, and gigabytes, without a limit."""
    monkeypatch.setattr(pdf, "MAX_PAGE_SECONDS", 1)
    slow = pdf_of(lines("x"), b"BT /F1 12 Tf " + b"(aaaaaaaaaaaaaaaaaaaaaaaa) Tj " * 1_000_000, compression=1)
    assert "it is damaged, or needs more than 1 seconds or 2 GiB" in refusal(tmp_path / "a.pdf", slow)


def test_a_process_that_dies_within_a_line_loses_that_line_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(pdf, "WORKER", tmp_path / "worker.py")
    pdf.WORKER.write_text(
        """print('{"text": "one"}'); print('{"te', end="", flush=True); raise SystemExit(1)"""
    )
    (tmp_path / "a.pdf").write_bytes(BOOK)
    (tmp_path / "b.txt").write_text("two")
    report = SkipReport()
    found = find_corpus([str(tmp_path / "a.pdf"), str(tmp_path / "b.txt")])
    assert [raw for raw, _ in found.chunks(report)] == [b"two"]  # what was read was shorter than a chunk
    assert "makes PDFium fail at page 2" in report.broken[0]


def test_a_reader_that_stops_early_leaves_no_process(tmp_path, monkeypatch):
    started = []

    class Watched(pdf.subprocess.Popen):
        """A process that is remembered."""

        def __init__(self, *args, **settings):
            started.append(self)
            super().__init__(*args, **settings)

    monkeypatch.setattr(pdf.subprocess, "Popen", Watched)
    (tmp_path / "a.pdf").write_bytes(pdf_of(*[lines("word " * 10)] * 50))
    with (tmp_path / "a.pdf").open("rb") as file:
        pages = pdf.page_texts(pdf.Source(file, "a.pdf", "a.pdf", SkipReport()))
        assert next(pages).startswith("word word")
        pages.close()
    assert [process.returncode is not None for process in started] == [True]


def test_damaged_files_are_documents_or_are_refused(tmp_path):
    chance = random.Random(1)
    for _ in range(8):
        raw = bytearray(BOOK[: chance.randrange(200, len(BOOK))] if chance.random() < 0.3 else BOOK)
        for _ in range(20):
            raw[chance.randrange(10, len(raw))] = chance.randrange(256)
        (tmp_path / "a.pdf").write_bytes(raw)
        try:
            assert all(isinstance(text, str) for text in documents_in(tmp_path / "a.pdf"))
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either is right
