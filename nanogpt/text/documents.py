"""Documents, in chunks of bounded length, and the report of records that were skipped.

Example: for chunk in split_into_chunks(blocks): chunk.raw; chunk.ends
         report.reject("dump.jsonl:17", "not JSON")
Knows neither files nor tokens.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, cast

from nanogpt.errors import require
from nanogpt.text.speakers import speaker_notes
from nanogpt.units import plural

DEFAULT_TEXT_FIELD = "text"
"""The field of a record that is its text, unless --text_field names another."""

AUTO_FORMAT = "auto"
"""The --input_format that is chosen by the name and the first bytes of each file."""

CHUNK_BYTES = 1 << 17
"""Size of a chunk in bytes: longer documents have several."""

CUT_MARGIN_BYTES = 1 << 12
"""How far before its end a chunk may be cut, so that it ends with a word."""

ASCII = bytes(range(128))

MAX_LISTED_RECORDS = 10_000
"""Broken records that are listed; further ones are only counted."""


NUMBER = re.compile(r"\d[\d,.]*")
"""A number in a message."""

MISSING: Final = object()
"""Marks a field that a record does not have. (None is a value: null.)"""


class PairFields(NamedTuple):
    """The fields of a record that are a prompt and its completion, and the text between the two."""

    prompt: str
    completion: str
    separator: str


class Chunk(NamedTuple):
    """A part of a document, in UTF-8. ends: it is the last part."""

    raw: bytes
    ends: bool

    @property
    def counts(self) -> bool:
        """Whether its tokens count for the loss."""
        return True

    @property
    def characters(self) -> int:
        """Number of characters."""
        beyond = self.raw.translate(None, ASCII)  # the multi-byte characters
        return len(self.raw) - len(beyond) + len(beyond.decode())


class PromptChunk(Chunk):
    """A part of the prompt of a pair: its tokens do not count for the loss."""

    __slots__ = ()

    @property
    def counts(self) -> bool:
        """Whether its tokens count for the loss."""
        return False


@dataclass
class SkipReport:
    """A report on one pass over a corpus: skipped records and notes.

    strict: the first broken record is an error. notes: how files were read, a line each.
    """

    strict: bool = False
    notes: list[str] = field(default_factory=list[str])
    broken: list[str] = field(default_factory=list[str])
    broken_count: int = 0
    repaired: int = 0
    """Records with half a surrogate pair or invalid bytes, which became U+FFFD."""
    files_with_fields: int = field(default=0, compare=False)
    """Number of files whose records or columns have names."""
    first_plain_file: list[str] = field(default_factory=list[str], compare=False)
    """The first file that was read as plain text, if there was one."""
    plain_files: int = field(default=0, compare=False)
    looks: "Counter[str]" = field(default_factory=Counter[str], compare=False)
    """How many files look like a format other than plain text and records, by how they are read."""
    first_looks: dict[str, str] = field(default_factory=dict[str, str], compare=False)
    """The first file of each of those."""
    speakers: "Counter[str]" = field(default_factory=Counter[str], compare=False)
    """Messages by the name of who wrote them."""
    used_rules: set[str] = field(default_factory=set[str], compare=False)
    """Names in --speakers that somebody has."""

    def reject(self, where: str, what: str) -> None:
        """Count and list a record that cannot be read. Raises: UserError if strict."""
        line = one_line(f"{where}: {what}")
        require(not self.strict, f"{line} (--strict stops at the first broken record)")
        self.broken_count += 1
        if len(self.broken) < MAX_LISTED_RECORDS:
            self.broken.append(line)

    def note(self, where: str, what: str) -> None:
        """Add a note on how a file is read."""
        self.notes.append(one_line(f"{where}: {what}"))

    def count_look(self, name: str, what: str) -> None:
        """Count a file by what it looks like and how it is read: "read as mail", say."""
        self.looks[what] += 1
        self.first_looks.setdefault(what, one_line(name))

    def all_notes(self, text_field: str) -> list[str]:
        """All lines on how the files were read. Formats, which surprise least, are the last."""
        unused = self.unused_field_note(text_field)
        return [*unused, *self.notes, *self.reading_notes(text_field)[len(unused) :]]

    def reading_notes(self, text_field: str) -> tuple[str, ...]:
        """Lines on how all files were read: their fields, the formats that they look like, who speaks."""
        looks = (
            f"{self.first_looks[what]}: {what}"
            if count == 1
            else f"{count:,} files (the first: {self.first_looks[what]}): {what}"
            for what, count in self.looks.items()
        )
        return (*self.unused_field_note(text_field), *looks, *speaker_notes(self.speakers))

    def count_plain_file(self, name: str) -> None:
        """Count a file without fields."""
        self.plain_files += 1
        if not self.first_plain_file:
            self.first_plain_file.append(one_line(name))

    def unused_field_note(self, text_field: str) -> tuple[str, ...]:
        """A note if --text_field was given, but some or all files have no fields."""
        if text_field == DEFAULT_TEXT_FIELD or not self.first_plain_file:
            return ()
        if self.files_with_fields:
            files = plural(self.plain_files, "file")
            return (
                f"{files} without fields read as plain text, whole (the first: {self.first_plain_file[0]})",
            )
        return (
            f"--text_field {text_field} does nothing: {self.first_plain_file[0]} is read as plain text, "
            "which has no fields (JSON Lines, JSON, CSV, TSV and Parquet have)",
        )


def first_of_each_kind(lines: Iterable[str]) -> list[str]:
    """The first of each kind of lines such as "a.jsonl:17: not JSON": others differ in file and numbers."""
    kinds: dict[str, list[str]] = {}
    for line in lines:
        kinds.setdefault(NUMBER.sub("", line.partition(": ")[2]), []).append(line)
    return [
        found[0] if len(found) == 1 else f"{found[0]} (and {len(found) - 1:,} more like this)"
        for found in kinds.values()
    ]


def one_line(text: str) -> str:
    """A text in one line that can be printed: file names may have line ends and invalid bytes."""
    return " ".join(text.splitlines()).encode("utf-8", "replace").decode()


def split_into_chunks(blocks: Iterable[bytes]) -> Iterator[Chunk]:
    """Split a document, given in blocks of whole UTF-8 characters, into chunks of CHUNK_BYTES.

    A chunk ends before a space that follows a word, if there is one: no token of a byte-level BPE spans
    that border, so the cut changes no token. White space alone is no document.
    """
    waiting, begun = b"", False
    for block in blocks:
        waiting = waiting + block if waiting else block
        start = 0
        while len(waiting) - start > CHUNK_BYTES:
            end = cut_position(waiting, start, start + CHUNK_BYTES)
            yield Chunk(waiting[start:end], False)
            start, begun = end, True
        waiting = waiting[start:]
    if begun or not is_blank(waiting):
        yield Chunk(waiting, True)


def cut_position(raw: bytes, start: int, stop: int) -> int:
    """Where to cut raw[start:stop]: before the last space after a word, else where a character ends."""
    least = max(start + 1, stop - CUT_MARGIN_BYTES)
    end = raw.rfind(b" ", least, stop)
    while end > 0:
        if ord("!") <= raw[end - 1] <= ord("~"):
            return end
        end = raw.rfind(b" ", least, end)
    while stop < len(raw) and raw[stop] & 0xC0 == 0x80:
        stop += 1
    return stop


def is_blank(raw: bytes) -> bool:
    """Whether a text is empty or white space alone, of any script."""
    return not raw or raw.isspace() or (len(raw) <= CUT_MARGIN_BYTES and raw.decode().isspace())


def field_values(value: object, path: Sequence[str]) -> Iterator[object]:
    """The values of a field, in every element of every list on the way; MISSING if there is no such field.

    A key that contains dots itself is tried before the path. An object in the field gives its own field of
    the same name, if it has one, as the parts of a chat message do.
    """
    waiting = [(value, tuple(path))]  # a stack, since lists may be nested deeper than recursion goes
    while waiting:
        value, left = waiting.pop()
        if isinstance(value, list):
            waiting += [(item, left) for item in reversed(cast(list[object], value))]
        elif isinstance(value, dict):
            record = cast(dict[str, object], value)
            own = [] if left else [name for name in (".".join(path), path[-1]) if name in record]
            if left:
                waiting.append(follow_path(record, left))
            elif own:
                waiting.append((record[own[0]], ()))
            else:
                yield record
        else:
            yield value


def follow_path(record: dict[str, object], path: tuple[str, ...]) -> tuple[object, tuple[str, ...]]:
    """The value of the longest beginning of `path` that is a key, and the rest of the path."""
    for size in range(len(path), 0, -1):
        key = ".".join(path[:size])
        if key in record:
            return record[key], path[size:]
    return MISSING, ()
