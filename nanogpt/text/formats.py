"""The text formats: a row for each, with the function that reads it, and the choice of one for a file.

Example: chunks = read_document(source)

To add a format, write a function that takes a `Source` and yields `Chunk`s in a file of its own, and give it
a row here. `--input_format` names a row; without it, a file's suffix does, or its first bytes. Anything else
is read as plain text. Archives and compressed files, which hold files of these formats, are in archives.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nanogpt.errors import require
from nanogpt.text import chats, mail, markup, pdf, subtitles
from nanogpt.text.books import read_docx, read_epub
from nanogpt.text.documents import AUTO_FORMAT, Chunk
from nanogpt.text.json_formats import read_json, read_json_lines
from nanogpt.text.notebooks import read_notebook
from nanogpt.text.records import Beginning, Certainty, Source, read_text
from nanogpt.text.tables import read_parquet, read_table

Reader = Callable[[Source], Iterator[Chunk]]
"""A function that reads the documents in a file."""


@dataclass(frozen=True)
class Format:
    """A text format.

    title: its name in messages, for one that is made into text; "" for plain text and records. read: reads a
    file. suffixes: of its files, in lower case. sniff: how sure it is, by its beginning, that a file of
    another suffix or none has this format.
    """

    title: str
    read: Reader
    suffixes: tuple[str, ...] = ()
    sniff: Callable[[Beginning], Certainty] | None = None


FORMATS: dict[str, Format] = {
    "text": Format("", read_text, (".txt",)),
    "jsonl": Format("", read_json_lines, (".jsonl", ".ndjson")),
    "json": Format("", read_json, (".json",)),
    "csv": Format("", partial(read_table, ","), (".csv",)),
    "tsv": Format("", partial(read_table, "\t"), (".tsv",)),
    "parquet": Format("", read_parquet, (".parquet",)),
    "pdf": Format("PDF", pdf.read_pdf, (".pdf",), pdf.sniff_pdf),
    "epub": Format("an EPUB book", read_epub, (".epub",)),
    "docx": Format("a Word file", read_docx, (".docx",)),
    "notebook": Format("a Jupyter notebook", read_notebook, (".ipynb",)),
    "mbox": Format("a mailbox (mbox)", mail.read_mbox, (".mbox", ".mbx"), mail.sniff_mbox),
    "mail": Format("a mail", mail.read_mail, (".eml",), mail.sniff_mail),
    "html": Format("HTML", markup.read_html, (".html", ".htm", ".xhtml"), markup.sniff_html),
    "subtitles": Format("subtitles", subtitles.read_subtitles, (".srt", ".vtt"), subtitles.sniff_subtitles),
    "whatsapp": Format("a WhatsApp chat", chats.read_whatsapp, (), chats.sniff_whatsapp),
    "telegram": Format("Telegram chats", chats.read_telegram, (), chats.sniff_telegram),
    "signal": Format("Signal chats", chats.read_signal, (), chats.sniff_signal),
    "discord": Format("a Discord channel", chats.read_discord, (), chats.sniff_discord),
    "twitter": Format("a Twitter archive", chats.read_twitter, (), chats.sniff_twitter),
}
"""The formats by name. Of several whose sniffing is certain, the first is chosen."""

FIELD_FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
"""Formats of records: with the flag of a field they are read as such, whatever else they look like."""

BINARY_FORMATS = ("pdf", "epub", "docx")
"""Formats whose files are no plain text."""

UNREAD: dict[str, str] = {
    "{\\rtf": "looks like RTF: read as it is, with its markup; save it as .docx, or as plain text",
    "<?xml": "looks like XML: read as it is, with its tags",
}
"""Beginnings of files in formats that cannot be made into text, and what is said about them."""


def read_document(source: Source) -> Iterator[Chunk]:
    """The documents in a file that is neither compressed nor an archive.

    Raises: UserError if pairs are wanted, and it has no records.
    """
    given = source.options.input_format
    name = choose_format(source) if given == AUTO_FORMAT else given
    chosen = FORMATS[name]
    require(
        source.options.pair is None or name in FIELD_FORMATS,
        f"is read as {chosen.title or 'plain text'}, which has no pairs: give JSON Lines, JSON, CSV, TSV or "
        "Parquet (--input_format jsonl, if that is what it is)",
    )
    if chosen.title:
        raw = "" if name in BINARY_FORMATS else " (--input_format text: as plain text, as it is)"
        source.report.count_look(source.name, f"read as {chosen.title}{raw}")
    yield from chosen.read(source)


def choose_format(source: Source) -> str:
    """The name of a file's format: by its suffix, or, if that says little, by its beginning.

    A format that is only likely is not chosen, but it is said how to read the file so.
    """
    suffix = Path(source.file_name).suffix.lower()
    usual = next((name for name, row in FORMATS.items() if suffix in row.suffixes), "text")
    if FORMATS[usual].title or (usual in FIELD_FORMATS and source.options.has_fields):
        return usual
    beginning = Beginning(source.file_name, source.beginning().decode("utf-8-sig", "replace"))
    certainty = {name: row.sniff(beginning) for name, row in FORMATS.items() if row.sniff}
    if certain := [name for name, found in certainty.items() if found == "certain"]:
        return certain[0]
    if usual == "text":
        likely = [name for name, found in certainty.items() if found == "likely"]
        looks = [
            f"looks like {FORMATS[name].title}: read as it is (--input_format {name} reads its text alone)"
            for name in likely
        ]
        looks += [what for start, what in UNREAD.items() if beginning.text.startswith(start)]
        if looks:
            source.report.count_look(source.name, looks[0])
    return usual


def check_format(name: str) -> None:
    """Raise UserError if there is no format of that name."""
    require(
        name == AUTO_FORMAT or name in FORMATS,
        f"--input_format {name} is unknown: use {AUTO_FORMAT}, {', '.join(FORMATS)}",
    )
