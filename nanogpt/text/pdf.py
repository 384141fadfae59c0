"""PDF as text, read by PDFium in a process of its own; without headers, footers and page numbers.

Example: for chunk in read_pdf(source): ...
PDFium (the extra `documents`) is fast and exact, but a small hostile file can make it take gigabytes, hours,
or crash: the other process (pdf_worker.py) has limits, so that such a file ends in one line.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nanogpt.errors import UserError, require
from nanogpt.text.compressed import refuse_bomb
from nanogpt.text.documents import Chunk, split_into_chunks
from nanogpt.text.records import SPOOL_BYTES, Beginning, Certainty, Source, in_blocks, missing_library
from nanogpt.units import plural

WORKER = Path(__file__).with_name("pdf_worker.py")

MAX_PAGE_SECONDS, MAX_PAGE_CHARS = 60, 1 << 22
"""Limits of a page: a longer one ends the file."""

MAX_MEMORY = 1 << 31
"""Bytes of memory for PDFium, where the system can bound them (not on Windows or macOS)."""

LINE_HYPHEN = "\ufffe"
"""PDFium's mark for a hyphen at the end of a line within a word."""

EDGE_LINES = 3
"""Lines at the top of a page, and at its bottom, that may be a header or a footer."""

MIN_REPEATS = 4
"""Pages that have a line before it counts as a header or a footer."""

MAX_RUNNING_CHARS = 200
"""Longest line that may be a header or a footer."""

MAX_COUNTED_PAGES = 10_000
"""Pages in which headers and footers are looked for; later pages have the same ones."""

NUMBER = re.compile(r"\d{1,6}")


def read_pdf(source: Source) -> Iterator[Chunk]:
    """The text of all pages as one document, with the lines of the page; words cut at their ends are joined.

    Headers, footers and page numbers are left out. Raises: UserError if it cannot be read, or holds pictures
    of text.
    """
    if find_spec("pypdfium2") is None:
        raise missing_library("pypdfium2", "documents")
    some_text = False
    for chunk in split_into_chunks(in_blocks(without_running_lines(source))):
        some_text = True
        yield chunk
    require(
        some_text, "has no text, only pictures of it perhaps: recognize it first (ocrmypdf in.pdf out.pdf)"
    )


def sniff_pdf(beginning: Beginning) -> Certainty:
    """Whether a file is a PDF, whatever its name."""
    return "certain" if beginning.text.startswith("%PDF-") else "no"


def without_running_lines(source: Source) -> Iterator[str]:
    """The text of each page without its header and footer. The pages before an error come first."""
    running, failure = RunningLines(), None
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as pages:
        try:
            for text in page_texts(source):
                running.count(text)
                pages.write(json.dumps(text).encode() + b"\n")
        except UserError as error:
            failure = error
        pages.seek(0)
        for number, line in enumerate(pages):
            yield running.strip(number, json.loads(line))
    if running.stripped:
        lines = plural(running.stripped, "line")
        source.note(f"{lines} left out that come again on many pages (headers, footers, page numbers)")
    if failure is not None:
        raise failure


class RunningLines:
    """The headers and footers of pages, page numbers among them. stripped: lines left out so far.

    A line is one if it stands in the same place, counted from the top or the bottom, on MIN_REPEATS pages and
    on half of the left pages or half of the right ones. A number in it may grow with the pages. All lines
    between it and the edge have to be such lines too, and a page of nothing else keeps them.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[bool, int, int, str]] = Counter()
        """Pages that have a line, by edge, distance from it, side and signature."""
        self.pages = [0, 0]
        """Pages counted on each side."""
        self.stripped = 0

    def count(self, text: str) -> None:
        """Count the lines at the edges of the next page."""
        number = sum(self.pages)
        if number < MAX_COUNTED_PAGES:
            self.pages[number % 2] += 1
            lines = [line for line in text.split("\n") if line.strip()]
            for at_top, edge in ((True, lines[:EDGE_LINES]), (False, lines[: -EDGE_LINES - 1 : -1])):
                for distance, line in enumerate(edge):
                    self.counts.update(
                        (at_top, distance, number % 2, one) for one in signatures(line, number)
                    )

    def strip(self, number: int, text: str) -> str:
        """The text of a page, by its number from 0, without running lines."""
        lines = text.split("\n")
        filled = [i for i, line in enumerate(lines) if line.strip()]
        top = self.run(number, True, [lines[i] for i in filled])
        bottom = self.run(number, False, [lines[i] for i in reversed(filled)])
        if top + bottom == 0 or top + bottom >= len(filled):
            return text
        self.stripped += top + bottom
        return "\n".join(lines[filled[top] : filled[len(filled) - bottom - 1] + 1]) + "\n"

    def run(self, number: int, at_top: bool, lines: list[str]) -> int:
        """How many of the lines of a page, from an edge on, are running lines."""
        for distance, line in enumerate(lines[:EDGE_LINES]):
            if not any(self.is_running(number, at_top, distance, one) for one in signatures(line, number)):
                return distance
        return min(len(lines), EDGE_LINES)

    def is_running(self, number: int, at_top: bool, distance: int, signature: str) -> bool:
        """Whether enough pages have a line with this signature in this place."""
        on_sides = [self.counts[at_top, distance, side, signature] for side in (0, 1)]
        side = number % 2
        return sum(on_sides) >= MIN_REPEATS and 2 * on_sides[side] >= self.pages[side]


def signatures(line: str, page: int) -> set[str]:
    """What a line has in common with those of other pages: its words, or all but a growing number.

    Any other number has to be the same: the rows of a table differ.
    """
    words = " ".join(line.split())
    if len(words) > MAX_RUNNING_CHARS:
        return set()
    numbers = list(NUMBER.finditer(words))
    ends = numbers[:1] + numbers[1:][-1:]
    grown = {f"{words[: n.start()]}\0{int(n[0]) - page}\0{words[n.end() :]}" for n in ends}
    return {words, *grown}


def page_texts(source: Source) -> Iterator[str]:
    """The text of each page, "" for a damaged one. Raises: UserError if the limits stop one."""
    limits = [str(limit) for limit in (MAX_PAGE_SECONDS, MAX_PAGE_CHARS, MAX_MEMORY)]
    with source.progress.hold_back() as tell, tempfile.TemporaryFile() as copy:  # the worker seeks in it
        shutil.copyfileobj(source.file, copy, 1 << 20)
        size, characters = copy.tell(), 0
        copy.seek(0)
        worker = subprocess.Popen(
            [sys.executable, str(WORKER), *limits],
            stdin=copy,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        page, pages, done = 0, 1, False
        with worker:
            try:
                assert worker.stdout is not None
                for line in worker.stdout:
                    if not line.endswith(b"\n"):  # it died on the way
                        break
                    answer: Any = json.loads(line)
                    if "error" in answer:
                        raise UserError(answer["error"])
                    if "pages" in answer:
                        pages = max(1, answer["pages"])
                        continue
                    done, page = "end" in answer, page + 1
                    tell(page / pages)
                    if "text" in answer:
                        characters += len(answer["text"])
                        refuse_bomb(characters, size)  # a file may show the same page again and again
                        yield answer["text"].replace(LINE_HYPHEN, "").replace("\r\n", "\n") + "\n"
                    elif not done:
                        source.report.reject(f"{source.name}, page {page}", "damaged")
                        yield ""
            finally:
                worker.kill()
    require(
        done,
        f"makes PDFium fail at page {page + 1}: it is damaged, or needs more than {MAX_PAGE_SECONDS} seconds "
        f"or {MAX_MEMORY >> 30} GiB",
    )
