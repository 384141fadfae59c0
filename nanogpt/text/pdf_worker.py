"""The process that reads a PDF (pdf.py starts it): the file on stdin, a line of JSON for each page on stdout.

Run:    python pdf_worker.py SECONDS CHARACTERS BYTES < in.pdf
Lines:  {"pages": 9}, {"text": "..."} or {"broken": true} for each page, {"end": true}; or {"error": "..."}
SECONDS and CHARACTERS bound a page, BYTES the memory; over a limit, it dies. It imports nothing of NanoGPT:
so it starts in little time.
"""

import faulthandler
import json
import sys
from collections.abc import Iterator
from typing import Any


def main(seconds: int, characters: int, memory: int) -> None:
    """Print the text of each page."""
    limit_memory(memory)
    for answer in answers(seconds, characters):
        print(json.dumps(answer), flush=True)


def limit_memory(size: int) -> None:
    """Bound the memory of this process, where the system can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, ValueError, OSError):  # Windows, macOS
        pass


def answers(seconds: int, characters: int) -> Iterator[dict[str, Any]]:
    """What to print, line by line."""
    import pypdfium2

    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        document: Any = pypdfium2.PdfDocument(sys.stdin.buffer)
    except pypdfium2.PdfiumError as error:
        locked = "password" in str(error).lower()
        yield {
            "error": "needs a password: remove it first (qpdf --decrypt in.pdf out.pdf)"
            if locked
            else "is damaged: no PDF that PDFium can read"
        }
        return
    yield {"pages": len(document)}
    for number in range(len(document)):
        faulthandler.dump_traceback_later(seconds, exit=True)  # replaces that of the last page
        try:
            page = document[number]
            text = page.get_textpage()
        except pypdfium2.PdfiumError:
            yield {"broken": True}
            continue
        if text.count_chars() > characters:
            yield {
                "error": f"has more than {characters:,} characters on page {number + 1}: refused, as a bomb"
            }
            return
        yield {"text": text.get_text_range()}
        text.close()
        page.close()
    yield {"end": True}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
