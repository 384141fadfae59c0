"""PDF as text, page by page, read by PDFium in a process of its own.

Example:
    for chunk in read_pdf(source): ...
PDFium (the extra `documents`) is fast and exact, but a small hostile file can make it take gigabytes, hours,
or crash: the other process (pdf_worker.py) has limits, so that such a file ends in one line.

"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nanogpt.errors import UserError, require
from nanogpt.text.compressed import refuse_bomb
from nanogpt.text.documents import Chunk, split_into_chunks
from nanogpt.text.records import Beginning, Source, in_blocks, missing_library

WORKER = Path(__file__).with_name("pdf_worker.py")

MAX_PAGE_SECONDS, MAX_PAGE_CHARS = 60, 1 << 22
"""Limits of a page: a longer one ends the file."""

MAX_MEMORY = 1 << 31
"""Bytes of memory for PDFium, where the system can bound them (not on Windows or macOS)."""

LINE_HYPHEN = "\ufffe"
"""PDFium's mark for a hyphen at the end of a line within a word."""


def read_pdf(source: Source) -> Iterator[Chunk]:
    """The text of all pages as one document, with the lines of the page; words cut at their ends are joined.

    Raises: UserError if it cannot be read, or holds pictures of text.
    """
    if find_spec("pypdfium2") is None:
        raise missing_library("pypdfium2", "documents")
    some_text = False
    for chunk in split_into_chunks(in_blocks(page_texts(source))):
        some_text = True
        yield chunk
    require(
        some_text, "has no text, only pictures of it perhaps: recognize it first (ocrmypdf in.pdf out.pdf)"
    )


def looks_like_pdf(beginning: Beginning) -> str:
    """Whether a file is a PDF, whatever its name."""
    return "certain" if beginning.text.startswith("%PDF-") else "no"


def page_texts(source: Source) -> Iterator[str]:
    """The text of each page. Raises: UserError if one cannot be read within the limits."""
    limits = [str(limit) for limit in (MAX_PAGE_SECONDS, MAX_PAGE_CHARS, MAX_MEMORY)]
    with tempfile.TemporaryFile() as copy:  # the worker seeks in it
        shutil.copyfileobj(source.file, copy, 1 << 20)
        size, characters = copy.tell(), 0
        copy.seek(0)
        worker = subprocess.Popen(
            [sys.executable, str(WORKER), *limits],
            stdin=copy,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        page, done = 0, False
        with worker:
            try:
                assert worker.stdout is not None
                for line in worker.stdout:
                    if not line.endswith(b"\n"):  # it died on the way
                        break
                    answer: Any = json.loads(line)
                    if "error" in answer:
                        raise UserError(answer["error"])
                    done, page = "end" in answer, page + 1
                    if "text" in answer:
                        characters += len(answer["text"])
                        refuse_bomb(characters, size)  # a file may show the same page again and again
                        yield answer["text"].replace(LINE_HYPHEN, "").replace("\r\n", "\n") + "\n"
                    elif not done:
                        source.report.reject(f"{source.name}, page {page}", "damaged")
            finally:
                worker.kill()
    require(
        done,
        f"makes PDFium fail at page {page + 1}: it is damaged, or needs more than {MAX_PAGE_SECONDS} seconds "
        f"or {MAX_MEMORY >> 30} GiB",
    )
