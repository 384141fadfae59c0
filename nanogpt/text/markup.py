"""HTML as plain text, and XML read without entities.

Example: for chunk in read_html(source): ...
         text = "".join(html_text(["<p>One<p>two"]))  # One, an empty line, two
HTML is read with lxml (the extra `documents`) as a stream of tags, with no tree: neither its size nor its
depth takes memory. Scripts, styles, forms, navigation and what is hidden are left out.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, BinaryIO, cast
from xml.parsers import expat

from nanogpt.errors import UserError, require
from nanogpt.text import encoding
from nanogpt.text.documents import Chunk, split_into_chunks
from nanogpt.text.records import Beginning, Certainty, Source, in_blocks, missing_library

READ_BYTES = 1 << 16
"""Bytes of HTML to parse at a time."""

XML_BYTES = 1 << 20
"""Bytes of XML to parse at a time: older versions of expat scan an unfinished tag again with each block."""

ENCODING_BYTES = 1 << 12
"""Bytes at the start of a page that may name its encoding."""

LEFT_OUT = frozenset(
    [
        "button",
        "datalist",
        "dialog",
        "head",
        "iframe",
        "input",
        "nav",
        "noscript",
        "object",
        "rp",
        "rt",
        "script",
        "select",
        "style",
        "svg",
        "template",
        "textarea",
    ]
)
"""Elements without text for a reader: code, forms, links to other pages, the pronunciation in ruby."""

LINE_BREAKS: dict[str, int] = {
    **dict.fromkeys(["address", "article", "aside", "body", "caption", "center", "dd", "div", "dt"], 1),
    **dict.fromkeys(
        [
            "fieldset",
            "figcaption",
            "figure",
            "footer",
            "form",
            "header",
            "legend",
            "li",
            "main",
            "section",
            "summary",
            "tr",
        ],
        1,
    ),
    **dict.fromkeys(
        [
            "blockquote",
            "dl",
            "details",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
            "hr",
            "ol",
            "p",
            "pre",
            "table",
            "ul",
        ],
        2,
    ),
}
"""Line ends around an element: 2 leave an empty line."""

SPACES = re.compile(r"[ \t\r\n\f]+")

BULLET = "- "
"""What stands before the text of a list item."""

SOFT_HYPHEN = "\xad"
"""Where a word may be hyphenated. It is invisible."""

NAMED_ENCODING = re.compile(
    rb"""<(?:meta|\?xml)\b[^>]{0,200}?(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE
)

HTML_START = re.compile(
    r"\s*(?:<\?xml[^>]*>\s*)?(?:<!--(?:(?!-->).){0,2000}-->\s*)*<(?:!doctype\s+html|html)\b",
    re.IGNORECASE | re.DOTALL,
)


def read_html(source: Source) -> Iterator[Chunk]:
    """The text of a page as one document."""
    yield from split_into_chunks(
        in_blocks(
            html_text(decode_html(source.file, source.beginning(), source.note, source.options.encoding))
        )
    )


def sniff_html(beginning: Beginning) -> Certainty:
    """Whether a file is HTML: only likely in a file whose name has a suffix that means something else."""
    if not HTML_START.match(beginning.text):
        return "no"
    return "likely" if PurePath(beginning.name).suffix else "certain"


def decode_html(
    file: BinaryIO, beginning: bytes, note: Callable[[str], object] = str, otherwise: str = encoding.DETECT
) -> Iterator[str]:
    """The characters of a page, in blocks, in the encoding that its bytes show or that it names.

    otherwise: the encoding if they do neither, in place of a detected one.
    Raises: UserError if it is binary.
    """
    name, notes = html_encoding(beginning, otherwise)
    for line in notes:
        note(line)
    decoder = codecs.getincrementaldecoder(name)("replace")
    while block := file.read(READ_BYTES):
        text = decoder.decode(block)
        require("\0" not in text, encoding.NOT_TEXT)
        yield text
    yield decoder.decode(b"", final=True)


def html_encoding(beginning: bytes, otherwise: str) -> tuple[str, tuple[str, ...]]:
    """The encoding of a page, and notes on it: UTF-8 if valid, else the one it names, else `otherwise`."""
    valid, cut_off = encoding.valid_utf8(beginning)
    named = NAMED_ENCODING.search(beginning[:ENCODING_BYTES])
    if valid + cut_off < len(beginning) and named and encoding.is_encoding(name := named[1].decode()):
        return name, (f"read as {name}, as the page says",)
    return encoding.find_encoding(beginning, whole=False, in_records=True, otherwise=otherwise)


def html_text(blocks: Iterable[str]) -> Iterator[str]:
    """The text of HTML that comes in blocks of characters. Raises: UserError if lxml is not installed."""
    try:
        from lxml import etree  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
    except ModuleNotFoundError as error:
        raise missing_library("lxml", "documents") from error
    target = PlainText()
    parser: Any = cast(Any, etree).HTMLParser(target=target)
    for block in blocks:
        if block:
            parser.feed(block)
            target.begun = True
            yield target.take()
    if target.begun:
        parser.close()
        yield target.take()


class PlainText:
    """The text of elements, from a stream of tags (the interface that lxml calls).

    White space is folded as in a browser; `pre` keeps it. Paragraphs are separated by an empty line, other
    blocks by a line end, cells of a table by a tab.
    """

    def __init__(self) -> None:
        self.begun = False
        """Whether the parser has been fed."""
        self.parts: list[str] = []
        self.some_text = False
        self.line_ends, self.tab, self.space, self.bullet = 0, False, False, ""
        """What stands before the next text."""
        self.left_out, self.preformatted, self.pre_begins = 0, 0, False
        self.row_begun = self.cell_begins = False
        """Whether the row of a table has text so far, and whether its cell has none."""

    def take(self) -> str:
        """The text since the last call."""
        text = "".join(self.parts)
        self.parts.clear()
        return text

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        """An element begins."""
        if self.left_out or tag in LEFT_OUT or is_hidden(attributes):
            self.left_out += 1
            return
        self.separate(tag)
        self.preformatted += tag == "pre"
        self.pre_begins = tag == "pre"
        if tag in ("li", "ul", "ol"):
            self.bullet = BULLET if tag == "li" else ""
        if tag == "br":
            self.line_ends = min(2, self.line_ends + 1)
        elif tag in ("td", "th"):
            self.cell_begins = True
            if self.row_begun:
                self.line_ends, self.tab = 0, True

    def end(self, tag: str) -> None:
        """An element ends."""
        if self.left_out:
            self.left_out -= 1
            return
        self.separate(tag)
        self.preformatted -= tag == "pre"
        if tag == "tr":
            self.line_ends = 1  # whatever blocks the last cell ended with

    def separate(self, tag: str) -> None:
        """Note how an element is separated from what stands before or after it."""
        if tag in ("tr", "table"):
            self.tab = self.row_begun = self.cell_begins = False
        if not self.cell_begins:  # at the start of a cell, a block needs no line of its own
            self.line_ends = max(self.line_ends, LINE_BREAKS.get(tag, 0))

    def data(self, text: str) -> None:
        """Characters of an element."""
        if self.left_out:
            return
        text = text.replace(SOFT_HYPHEN, "")
        if self.preformatted:
            text = text.removeprefix("\n" if self.pre_begins else "")
            self.pre_begins = False
            words = text.rstrip("\n")
            self.write(words)
            self.line_ends += len(text) - len(words)
            return
        words = SPACES.sub(" ", text)
        self.space |= words.startswith(" ")
        self.write(words.strip(" "))
        self.space |= words.endswith(" ")

    def write(self, text: str) -> None:
        """Write characters, and before them what separates them from the text so far."""
        if not text:
            return
        before = "\n" * self.line_ends or ("\t" if self.tab else " " * self.space)
        self.parts.append((before if self.some_text else "") + self.bullet + text)
        self.some_text = self.row_begun = True
        self.line_ends, self.tab, self.space, self.bullet, self.cell_begins = 0, False, False, "", False

    def close(self) -> None:
        """The end of the document."""


def is_hidden(attributes: Mapping[str, str]) -> bool:
    """Whether an element is not shown, as the preview line of a newsletter."""
    return "hidden" in attributes or "display:none" in attributes.get("style", "").replace(" ", "").lower()


def parse_xml(
    file: BinaryIO,
    start: Callable[[str, dict[str, str]], object],
    end: Callable[[str], object] = str,
    data: Callable[[str], object] = str,
) -> Iterator[None]:
    """Parse XML in blocks, and pause after each. Names come without their namespaces.

    Raises: UserError at a declaration of an entity: entities can be bombs, or name files to read.
    """

    def refuse(*_: object) -> None:
        """Refuse an entity."""
        raise UserError("declares XML entities: refused, as a possible bomb")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = lambda name, attributes: start(local(name), attributes)
    parser.EndElementHandler = lambda name: end(local(name))
    parser.CharacterDataHandler = data
    while block := file.read(XML_BYTES):
        parser.Parse(block, False)
        yield
    parser.Parse(b"", True)
    yield


def local(name: str) -> str:
    """A name without its namespace."""
    return name.rpartition(" ")[2]
