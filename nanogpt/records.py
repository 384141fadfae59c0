"""One file to documents: text, JSON Lines, JSON, CSV, TSV, Parquet.

Use:    for piece in RECORD_READERS[".jsonl"](source): ...
A reader holds one record at a time. What is broken is reported with its file and line and left out.
"""

import codecs
import csv
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, cast

from nanogpt import encoding
from nanogpt.config import UserError, require
from nanogpt.documents import Piece, Report, cut, strings
from nanogpt.tokenizer import utf8

RECORD = 1 << 26
"""Characters in a record of JSON Lines or CSV: a longer one is broken."""

REPLACEMENT = "\ufffd".encode()

ESCAPE = "nanogpt.escape"
"""How bytes that are no text come in: as lone surrogates, which no text has (PEP 383, for every encoding)."""

ROWS = 256
"""Rows of a Parquet file in memory at a time."""

SPOOLED = 1 << 24
"""Bytes of an archive inside an archive that are kept in memory; more go to a temporary file."""


@dataclass(frozen=True)
class Source:
    """A file, or a member of an archive.

    name: what it is called. kind: a name whose end says what it is.
    """

    file: BinaryIO
    name: str
    kind: str
    text_field: str
    report: Report
    depth: int = 0


def read_text(source: Source) -> Iterator[Piece]:
    """A text file is a document. Windows line ends (CRLF) are folded to LF."""
    blocks, notes = encoding.decoded(source.file)
    source.report.notes += [f"{source.name}: {note}" for note in notes]
    yield from cut(unix_lines(blocks, source))


def unix_lines(blocks: Iterator[bytes], source: Source) -> Iterator[bytes]:
    """The text with CRLF folded to LF, and a note on how often."""
    held, folded = b"", 0
    for block in blocks:
        if held or b"\r" in block:
            text = held + block
            held = b"\r" if text.endswith(b"\r") else b""  # its LF may be about to come
            text = text[: len(text) - len(held)]
            folded += text.count(b"\r\n")
            yield text.replace(b"\r\n", b"\n")
        else:
            yield block
    yield held
    if folded:
        source.report.notes.append(f"{source.name}: {folded:,} Windows line ends (CRLF) folded to LF")


def document(source: Source, where: str, value: object) -> Iterator[Piece]:
    """The documents in a record: a string, or what text_field leads to."""
    for text in strings(value, source.text_field.split(".")):
        if isinstance(text, str):
            raw = utf8(text)
            source.report.repaired += len(raw) != len(text) and "\ufffd" not in text and REPLACEMENT in raw
            yield from cut([raw])
        else:
            names = list(cast(dict[str, object], value)) if isinstance(value, dict) else []
            known = f" (it has {listed(names)}): give --text_field" if names else ""
            source.report.reject(where, f"no text in the field {source.text_field!r}{known}")


def lines(source: Source) -> io.TextIOWrapper:
    """The file as lines of text, in the encoding that it has."""
    beginning = cast(io.BufferedReader, source.file).peek(1 << 16)[: 1 << 16]
    name, notes = encoding.encoding_of(beginning, whole=False, in_records=True)
    source.report.notes += [f"{source.name}: {note}" for note in notes]
    return io.TextIOWrapper(source.file, name, newline="", errors=ESCAPE)


def escape(error: UnicodeError) -> tuple[str, int]:
    """What stands for bytes that cannot be decoded, and where to go on."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error(ESCAPE, escape)


def read_json_lines(source: Source) -> Iterator[Piece]:
    """A JSON value a line."""
    number, following = 0, lines(source)
    while line := following.readline(RECORD):
        number += 1
        where = f"{source.name}:{number}"
        if len(line) == RECORD and not line.endswith("\n"):
            while (rest := following.readline(RECORD)) and not rest.endswith("\n"):
                pass
            source.report.reject(where, f"longer than {RECORD:,} characters")
        elif line.strip():
            try:
                line.encode("utf-8")  # bytes that are no text came in as lone surrogates
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                source.report.reject(where, f"not JSON ({reason(error)})")
                continue
            yield from document(source, where, value)


def read_json(source: Source) -> Iterator[Piece]:
    """A JSON array of records, or one record or several; no more than one is held at a time."""
    decode, text, number = json.JSONDecoder().raw_decode, lines(source), 0
    waiting, complete = "", False
    in_array: bool | None = None
    while True:
        waiting = waiting.lstrip(" \t\r\n,]" if in_array else " \t\r\n")
        if in_array is None and waiting:
            in_array = waiting.startswith("[")
            waiting = waiting[in_array:]
            continue
        try:
            value, end = decode(waiting)
            if end == len(waiting) and not complete:
                raise ValueError("a number may go on")
        except (ValueError, RecursionError) as error:
            if not complete and len(waiting) <= RECORD:
                more = text.read(max(1 << 16, len(waiting)))
                complete = not more
                waiting += more
                continue
            if waiting:
                source.report.reject(f"{source.name}, record {number + 1}", f"not JSON ({reason(error)})")
            return
        number, waiting = number + 1, waiting[end:]
        yield from document(source, f"{source.name}, record {number}", value)


def read_table(delimiter: str, source: Source) -> Iterator[Piece]:
    """CSV or TSV with a line of names: text_field says which column is the text."""
    csv.field_size_limit(RECORD)
    rows = csv.reader(lines(source), delimiter=delimiter)
    header = next(rows, list[str]())
    column = column_of(source, header)
    while True:
        where = f"{source.name}:{rows.line_num + 1}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            source.report.reject(where, str(error))
            continue
        if len(row) == len(header):
            yield from document(source, where, row[column])
        elif row:
            source.report.reject(where, f"{len(row)} fields instead of {len(header)}")


def read_parquet(source: Source) -> Iterator[Piece]:
    """A column of a Parquet file."""
    try:
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise missing("pyarrow") from error
    number = 0
    with spooled(source.file) as file:
        table: Any = ParquetFile(file)
        column = column_of(source, list(map(str, table.schema_arrow.names)))
        name: str = table.schema_arrow.names[column]
        for batch in table.iter_batches(batch_size=ROWS, columns=[name]):
            for value in batch.column(0):
                number += 1
                where = f"{source.name}, row {number}"
                try:
                    record = {name: value.as_py()}
                except UnicodeDecodeError as error:
                    source.report.reject(where, f"bytes that are no text ({reason(error)})")
                    continue
                yield from document(source, where, record)


def column_of(source: Source, header: Sequence[str]) -> int:
    """Where text_field is among the columns. Errors: UserError if it is not."""
    name = source.text_field.split(".")[0]
    require(
        name in header,
        f"has no column {name!r}: give --text_field, one of {listed(header) or 'none'}",
    )
    return list(header).index(name)


def listed(names: Sequence[str]) -> str:
    """Names, as many as there is room for, in one line."""
    return " ".join(", ".join(names).split())[:200]


def reason(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def spooled(file: BinaryIO) -> Generator[BinaryIO]:
    """The file, or a copy of it if it cannot be read from anywhere but its start."""
    if file.seekable():
        yield file
        return
    with tempfile.SpooledTemporaryFile(SPOOLED) as copy:
        shutil.copyfileobj(file, copy, 1 << 20)
        copy.seek(0)
        yield cast(BinaryIO, copy)


def missing(library: str) -> UserError:
    """How to get a library that a format needs."""
    return UserError(f"needs {library}: pip install -c constraints.txt -e '.[corpora]'")


RECORD_READERS: dict[str, Callable[[Source], Iterator[Piece]]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": partial(read_table, ","),
    ".tsv": partial(read_table, "\t"),
    ".parquet": read_parquet,
}
