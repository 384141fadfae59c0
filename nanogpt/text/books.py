"""EPUB books and Word files (.docx): packages of XML in a zip archive, each read as one document.

Example: for chunk in read_epub(source): ...
Nothing is unpacked to the disk: a part is found by its name in the archive, wherever that name would lead. A
decompression bomb is refused. Knows neither flags nor folders.
"""

import posixpath
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from io import BufferedReader, RawIOBase
from typing import IO, BinaryIO, cast
from urllib.parse import unquote
from zipfile import ZipFile

from nanogpt.errors import require
from nanogpt.text.compressed import refuse_bomb
from nanogpt.text.documents import Chunk, split_into_chunks
from nanogpt.text.markup import PlainText, decode_html, html_text, local, parse_xml
from nanogpt.text.records import BEGINNING_BYTES, Source, in_blocks, seekable_copy
from nanogpt.text.word_lists import WordLists

CONTAINER, ENCRYPTION, RELATIONS = "META-INF/container.xml", "META-INF/encryption.xml", "_rels/.rels"

PAGES = ("application/xhtml+xml", "text/html")
"""Media types of chapters."""

OLD_OFFICE_FILE = b"\xd0\xcf\x11\xe0"
"""The first bytes of a .doc file, and of a .docx file with a password."""

HTML_TAGS = {
    "p": "div", "tbl": "table", "tr": "tr", "tc": "td", "br": "br", "cr": "br",
    "Fallback": "template", "moveFrom": "template", "rt": "template",
}  # fmt: skip
"""Elements of WordprocessingML as HTML. A template is left out: there the text stands a second time."""

SYMBOLS = {"tab": "\t", "noBreakHyphen": "-"}

LIST_PROPERTIES = ("pStyle", "numId", "ilvl")
"""Elements that say which list a paragraph belongs to."""


class Package:
    """The parts of a package."""

    def __init__(self, archive: ZipFile) -> None:
        self.archive, self.names = archive, set(archive.namelist())

    def open(self, name: str) -> BinaryIO:
        """Open a part. Raises: UserError if it is not there."""
        require(name in self.names, f"has no part {name}: it is incomplete, or not what its suffix says")
        return cast(BinaryIO, self.archive.open(name))

    def elements(self, name: str) -> list[tuple[str, dict[str, str]]]:
        """The elements of a small XML part: names without namespaces, attributes."""
        found: list[tuple[str, dict[str, str]]] = []
        with self.open(name) as file:
            for _ in parse_xml(file, lambda tag, attributes: found.append((tag, attributes))):
                pass
        return found


@contextmanager
def open_package(source: Source) -> Generator[Package]:
    """Open a package. Raises: UserError if it is a decompression bomb."""
    require(
        not source.beginning().startswith(OLD_OFFICE_FILE),
        "is an old .doc file, or has a password: save it as a .docx file without one",
    )
    with seekable_copy(source.file) as file, ZipFile(cast(IO[bytes], file)) as archive:
        # A part is never read beyond the size that the archive gives for it.
        refuse_bomb(sum(part.file_size for part in archive.infolist()), file.seek(0, 2))
        yield Package(archive)


def read_epub(source: Source) -> Iterator[Chunk]:
    """The chapters of a book, in reading order, as one document."""
    with open_package(source) as package:
        yield from split_into_chunks(in_blocks(book_text(package, source)))


def book_text(package: Package, source: Source) -> Iterator[str]:
    """The text of all chapters. A chapter that is not there is reported."""
    before = ""
    for chapter in chapters(package):
        if chapter not in package.names:
            source.report.reject(f"{source.name}/{chapter}", "a chapter that is not in the book")
            continue
        with package.open(chapter) as file:
            buffered = BufferedReader(cast(RawIOBase, file), BEGINNING_BYTES)
            for text in html_text(decode_html(cast(BinaryIO, buffered), buffered.peek(BEGINNING_BYTES))):
                if text:
                    yield before + text
                    before = ""
        before = "\n\n"


def chapters(package: Package) -> list[str]:
    """The names of the chapters in reading order. Raises: UserError if they are encrypted."""
    roots = [values for tag, values in package.elements(CONTAINER) if tag == "rootfile"]
    require(bool(roots) and "full-path" in roots[0], "names no contents: it is no EPUB book")
    contents = roots[0]["full-path"]
    elements = package.elements(contents)
    items = {values["id"]: values for tag, values in elements if tag == "item" and "id" in values}
    order = [items.get(values.get("idref", ""), {}) for tag, values in elements if tag == "itemref"]
    found = dict.fromkeys(  # once each: a book that repeats a chapter a million times would be a bomb
        posixpath.normpath(posixpath.join(posixpath.dirname(contents), unquote(item["href"].split("#")[0])))
        for item in order
        if item.get("media-type") in PAGES
        and "href" in item
        and "nav" not in item.get("properties", "").split()
    )
    if ENCRYPTION in package.names:
        locked = {unquote(values.get("URI", "")) for _, values in package.elements(ENCRYPTION)}
        require(not locked & set(found), "is encrypted (DRM): its text cannot be read")
    return list(found)


def read_docx(source: Source) -> Iterator[Chunk]:
    """The text of a Word file as one document: a line for a paragraph, notes last, no deletions.

    A paragraph of a list has its bullet or its number before it.
    """
    with open_package(source) as package:
        relations = package.elements(RELATIONS)
        mains = [values for _, values in relations if values.get("Type", "").endswith("/officeDocument")]
        require(bool(mains) and "Target" in mains[0], "has no text: it is no Word file")
        main = mains[0]["Target"].lstrip("/")
        lists, others = WordLists(), dict[str, str]()
        for kind in ("numbering", "styles", "footnotes", "endnotes"):
            name = posixpath.join(posixpath.dirname(main), f"{kind}.xml")
            if name in package.names:
                others[kind] = name
        for kind in ("numbering", "styles"):
            if kind in others:
                with package.open(others.pop(kind)) as file:
                    for _ in parse_xml(file, lists.start):
                        pass
        yield from split_into_chunks(in_blocks(word_text(package, [main, *others.values()], lists)))


def word_text(package: Package, parts: list[str], lists: WordLists) -> Iterator[str]:
    """The text of the parts of a Word file."""
    text = WordText(lists)
    for part in parts:
        with package.open(part) as file:
            for _ in parse_xml(file, text.start, text.end, text.data):
                yield text.plain.take()


class WordText:
    """The text of WordprocessingML, from a stream of tags, by way of the HTML that they stand for."""

    def __init__(self, lists: WordLists) -> None:
        self.lists, self.plain = lists, PlainText()
        self.plain.preformatted = 1
        self.in_text = self.in_tab_stops = self.in_old_properties = False
        self.properties: dict[str, str] = {}
        """The style and the list of the paragraph."""

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """An element begins."""
        self.in_text = tag == "t"
        self.in_tab_stops |= tag == "tabs"
        self.in_old_properties |= tag == "pPrChange"
        if tag == "p":
            self.properties, self.plain.bullet = {}, ""
        elif tag in LIST_PROPERTIES and not self.in_old_properties:
            self.properties[tag] = next(
                (value for name, value in attributes.items() if local(name) == "val"), ""
            )
        if tag in SYMBOLS and not self.in_tab_stops:
            self.plain.data(SYMBOLS[tag])
        elif tag in HTML_TAGS:
            self.plain.start(HTML_TAGS[tag], {})

    def end(self, tag: str) -> None:
        """An element ends."""
        self.in_text = False
        self.in_tab_stops &= tag != "tabs"
        self.in_old_properties &= tag != "pPrChange"
        if tag == "pPr" and not self.in_old_properties and not self.plain.left_out:
            self.plain.bullet = self.lists.marker(self.properties)
        if tag in HTML_TAGS:
            self.plain.end(HTML_TAGS[tag])

    def data(self, text: str) -> None:
        """Characters."""
        if self.in_text:
            self.plain.data(text)
