"""What the readers of formats share: a source, its lines, and the text in a record. And plain text.

Example: for chunk in read_text(source): ...
         lines = Lines(open_text(source))
         for chunk in read_record(source, "a.jsonl:17", {"text": "..."}): ...
Broken records are reported with file and line, and left out. Knows no format of records.
"""

import codecs
import io
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, Literal, NamedTuple, cast

from nanogpt.errors import UserError
from nanogpt.text import encoding
from nanogpt.text.documents import (
    MISSING,
    Chunk,
    PromptChunk,
    SkipReport,
    field_values,
    is_blank,
    split_into_chunks,
)
from nanogpt.text.encoding import utf8
from nanogpt.text.options import DEFAULT_OPTIONS, ReadOptions
from nanogpt.units import plural

MAX_NAME_DEPTH = 3
"""How deep in a record a message names fields."""

MAX_RECORD_CHARS = 1 << 26
"""Longest record of JSON Lines or CSV: a longer one counts as broken."""

BLOCK_CHARS = 1 << 16
"""Characters of short texts that are joined to a block."""

BEGINNING_BYTES = 1 << 16
"""Bytes at the start of a file that show its encoding and its format."""

REPLACEMENT = "\ufffd".encode()

BYTE_ORDER_MARK = "\ufeff"
"""The byte order mark. In files that were joined, it stands at the start of a line and means nothing."""

LATER_BYTE_ORDER_MARKS = re.compile(rb"(?<=[\r\n])(?:%b)+" % BYTE_ORDER_MARK.encode())

ESCAPE_ERRORS = "nanogpt.escape"
"""Error handler that decodes invalid bytes to lone surrogates, which no text has (as PEP 383 does)."""

SPOOL_BYTES = 1 << 24
"""Bytes of a nested archive that are kept in memory; a larger one goes to a temporary file."""


class ReadProgress:
    """How far the reading of a file is, for a progress bar.

    advance: called with the number of bytes that are done since the last call.
    """

    def __init__(self, advance: Callable[[int], object] = int) -> None:
        self.advance, self.holds_back, self.held = advance, False, 0

    def add(self, size: int) -> None:
        """Count bytes that were read from the disk: they are done, unless they are held back."""
        if self.holds_back:
            self.held += size
        else:
            self.advance(size)

    @contextmanager
    def hold_back(self) -> Generator[Callable[[float], None]]:
        """Hold back what is read in here, for a reader that copies a file and then works on it for long.

        Gives a function that says which fraction of it is done. At the end, all of it is.
        """
        told = 0
        self.holds_back, self.held = True, 0

        def tell(fraction: float) -> None:
            """Advance to a fraction of what is held back."""
            nonlocal told
            done = max(told, int(self.held * min(fraction, 1.0)))
            self.advance(done - told)
            told = done

        try:
            yield tell
        finally:
            tell(1.0)
            self.holds_back = False


@dataclass(frozen=True)
class Source:
    """A file, or a member of an archive.

    name: its name in messages. file_name: a name whose suffix is that of its format. depth: of nested
    archives.
    """

    file: BinaryIO
    name: str
    file_name: str
    report: SkipReport
    options: ReadOptions = DEFAULT_OPTIONS
    progress: ReadProgress = field(default_factory=ReadProgress)
    depth: int = 0

    def note(self, what: str) -> None:
        """Add a note on how the file is read."""
        self.report.note(self.name, what)

    def beginning(self) -> bytes:
        """The first bytes of the file, which are read again."""
        return cast(io.BufferedReader, self.file).peek(BEGINNING_BYTES)[:BEGINNING_BYTES]

    def speaker(self, name: str, address: str = "") -> str | None:
        """Count a message, and return the name of who wrote it as --speakers has it; None: leave it out."""
        self.report.speakers[name or address] += 1
        rules = self.options.speaker_rules
        if (rule := rules.rule_for(name, address)) is not None:
            self.report.used_rules.add(rule)
        return rules.rename(name, address)


Certainty = Literal["no", "likely", "certain"]
"""How sure it is, by its beginning, that a file has a format."""


class Beginning(NamedTuple):
    """What a format is recognized by: the name of a file, and its first characters."""

    name: str
    text: str


def read_text(source: Source) -> Iterator[Chunk]:
    """The text of a file as one document. Line ends of Windows and of old Macs (CR alone) become LF."""
    source.report.count_plain_file(source.name)
    beginning = source.beginning()
    blocks, notes = encoding.decode_file(
        source.file, lambda what: source.report.reject(source.name, what), source.options.encoding
    )
    for note in notes:
        source.note(note)
    if b"\r" in beginning and b"\n" not in beginning:
        source.note("line ends of an old Mac (CR) became LF")
        blocks = replace_carriage_returns(blocks)
    yield from split_into_chunks(drop_byte_order_marks(normalize_line_ends(blocks, source), source))


def drop_byte_order_marks(blocks: Iterator[bytes], source: Source) -> Iterator[bytes]:
    """Drop the byte order marks at the start of a line, and note how many."""
    mark, dropped, last = BYTE_ORDER_MARK.encode(), 0, b"\n"
    for block in blocks:
        if mark in block:
            text = LATER_BYTE_ORDER_MARKS.sub(b"", last + block)[len(last) :]
            dropped += (len(block) - len(text)) // len(mark)
        else:
            text = block
        last = text[-1:] or last
        yield text
    note_byte_order_marks(source, dropped)


def note_byte_order_marks(source: Source, dropped: int) -> None:
    """Add a note on how many byte order marks were in the middle of a file."""
    if dropped:
        source.note(
            f"{plural(dropped, 'byte order mark')} at the start of a later line dropped (were files joined?)"
        )


def normalize_line_ends(blocks: Iterator[bytes], source: Source) -> Iterator[bytes]:
    """Replace CRLF by LF, and note how often."""
    held, folded = b"", 0
    for block in blocks:
        if held or b"\r" in block:
            text = held + block
            held = b"\r" if text.endswith(b"\r") else b""  # its LF may be in the next block
            text = text[: len(text) - len(held)]
            folded += text.count(b"\r\n")
            yield text.replace(b"\r\n", b"\n")
        else:
            yield block
    yield held
    if folded:
        source.note(f"{plural(folded, 'Windows line end')} (CRLF) folded to LF")


def replace_carriage_returns(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Replace CR by LF, and CRLF too: files may have been joined."""
    after_return = False
    for block in blocks:
        text = block.removeprefix(b"\n") if after_return else block
        after_return = block.endswith(b"\r")
        yield text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def read_record(source: Source, where: str, value: object) -> Iterator[Chunk]:
    """The documents in a record: the record itself if it is a string, else the values of text_field.

    If pairs are wanted: its pair.
    """
    if (pair := source.options.pair) is not None:
        yield from read_pair(source, where, value, pair.separator)
        return
    text_field = source.options.text_field
    for text in field_values(value, text_field.split(".")):
        if isinstance(text, str):
            yield from split_into_chunks([record_bytes(source, text)])
        else:
            source.report.reject(where, explain_missing_text("--text_field", text_field, text, value))


def record_bytes(source: Source, text: str) -> bytes:
    """A text of a record in UTF-8. What is no character becomes U+FFFD, and is counted."""
    raw = utf8(text)
    source.report.repaired += len(raw) != len(text) and "\ufffd" not in text and REPLACEMENT in raw
    return raw


def read_pair(source: Source, where: str, record: object, separator: str) -> Iterator[Chunk]:
    """A record as one document: prompt and separator, which do not count for the loss, and completion."""
    try:
        prompt, completion = (text_of_pair(source, record, flag) for flag in source.options.fields)
    except ValueError as error:
        source.report.reject(where, str(error))
        return
    for chunk in split_into_chunks([prompt + utf8(separator)]):
        yield PromptChunk(chunk.raw, ends=False)
    yield from split_into_chunks([completion])


def text_of_pair(source: Source, record: object, flag: str) -> bytes:
    """The text in the field that `flag` names, in UTF-8. Raises: ValueError that says why there is none."""
    name = source.options.fields[flag]
    if isinstance(record, str):
        raise ValueError(f"a text, not a record with the field {name!r}")
    found = list(field_values(record, name.split(".")))
    if len(found) != 1:
        raise ValueError(f"the field {name!r} holds {plural(len(found), 'value')}, a pair has one")
    if not isinstance(found[0], str):
        raise ValueError(explain_missing_text(flag, name, found[0], record))
    raw = record_bytes(source, found[0])
    if is_blank(raw):
        raise ValueError(f"the field {name!r} is empty")
    return raw


def explain_missing_text(flag: str, text_field: str, found: object, record: object) -> str:
    """The reason why a record has no text: the field, which `flag` names, is missing or is not a string."""
    if found is MISSING:
        names = list(field_names(record))
        known = f" (it has {join_names(names)}): give {flag}" if names else ""
        return f"no text in the field {text_field!r}{known}"
    if not isinstance(record, (dict, list)):
        return f"{describe_value(found)}, neither text nor a record with the field {text_field!r}"
    if found is None:
        return f"the field {text_field!r} is null"
    return f"the field {text_field!r} holds {describe_value(found)}, not text"


def field_names(record: object, depth: int = 0) -> Iterator[str]:
    """The names of the fields of a record, as --text_field takes them: with dots into nested records."""
    while isinstance(record, list) and record:
        record = cast(list[object], record)[0]
    for name, value in cast(dict[str, object], record).items() if isinstance(record, dict) else ():
        nested = list(field_names(value, depth + 1)) if depth < MAX_NAME_DEPTH else []
        yield from (f"{name}.{inner}" for inner in nested) if nested else [name]


def describe_value(value: object) -> str:
    """A value that is not text, in a few words."""
    if isinstance(value, dict):
        return (
            f"an object (it has {join_names(list(map(str, cast(dict[object, object], value)))) or 'nothing'})"
        )
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    kind = "a number" if isinstance(value, (int, float)) else f"a value of type {type(value).__name__}"
    shown = (
        str(value) if isinstance(value, float) or (isinstance(value, int) and abs(value) < 1e15) else "..."
    )
    return f"{kind} ({shown})" if isinstance(value, (int, float)) else kind


def open_text(source: Source) -> io.TextIOWrapper:
    """Open a file of records as text, in the encoding that it has."""
    source.report.files_with_fields += 1
    return decode_text(source, ESCAPE_ERRORS)


def decode_text(source: Source, errors: str = "replace", newline: str | None = "") -> io.TextIOWrapper:
    """Open a file as text, in the encoding that it has. newline: as of open()."""
    name, notes = encoding.find_encoding(
        source.beginning(), whole=False, in_records=True, otherwise=source.options.encoding
    )
    for note in notes:
        source.note(note)
    return io.TextIOWrapper(source.file, name, newline=newline, errors=errors)


def in_blocks(texts: Iterable[str]) -> Iterator[bytes]:
    """Join short texts to blocks of UTF-8, which are split into chunks in less time."""
    waiting: list[str] = []
    size = 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size >= BLOCK_CHARS:
            yield utf8("".join(waiting))
            waiting, size = [], 0
    yield utf8("".join(waiting))


def escape_bytes(error: UnicodeError) -> tuple[str, int]:
    """Lone surrogates in place of invalid bytes, and the position after them (a codecs error handler)."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error(ESCAPE_ERRORS, escape_bytes)


class LongLine(str):
    """The first MAX_RECORD_CHARS characters of a longer line, whose rest is dropped."""

    __slots__ = ()


class Lines:
    """The lines of a text. Lines can be given back, to be read again.

    number: lines read so far. chars_read: characters in them. byte_order_marks: those at the start of a line,
    which are dropped.
    """

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text, self.number, self.chars_read, self.byte_order_marks = text, 0, 0, 0
        self.pushed_back: deque[str] = deque()

    def read(self) -> str:
        """The next line with its line end; "" after the last line."""
        line = self.pushed_back.popleft() if self.pushed_back else self.read_new()
        self.number += bool(line)
        return line

    def read_new(self) -> str:
        """The next line that has not been read before."""
        line = self.text.readline(MAX_RECORD_CHARS)
        self.chars_read += len(line)
        line = self.drop_byte_order_mark(line)
        if len(line) < MAX_RECORD_CHARS or line.endswith(("\n", "\r")):
            return line
        while (rest := self.text.readline(MAX_RECORD_CHARS)) and not rest.endswith(("\n", "\r")):
            pass
        return LongLine(line)

    def drop_byte_order_mark(self, line: str) -> str:
        """Drop the byte order mark at the start of a line, and count it."""
        self.byte_order_marks += line.startswith(BYTE_ORDER_MARK)
        return line.removeprefix(BYTE_ORDER_MARK)

    def give_back(self, lines: Sequence[str]) -> None:
        """Give back the last lines: the next calls of read return them again."""
        self.pushed_back.extendleft(reversed(lines))
        self.number -= len(lines)


def join_names(names: Sequence[str]) -> str:
    """Names in one line, cut after 200 characters."""
    return " ".join(", ".join(names).split())[:200]


@contextmanager
def seekable_copy(file: BinaryIO) -> Generator[BinaryIO]:
    """The file itself if it is seekable, else a copy that is."""
    if file.seekable():
        yield file
        return
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as copy:
        shutil.copyfileobj(file, copy, 1 << 20)
        copy.seek(0)
        yield cast(BinaryIO, copy)


def missing_library(library: str, extra: str = "corpora") -> UserError:
    """The error for a library that a format needs and that is not installed. extra: the one that has it."""
    return UserError(f"needs the package {library}: pip install nanogpt[{extra}]")
