"""JSON Lines and JSON, one record in memory at a time.

Example: for chunk in read_json_lines(source): ...
After a broken record, reading continues where the next record begins. Knows neither files nor archives.
"""

import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

from nanogpt.errors import first_line
from nanogpt.text import records
from nanogpt.text.documents import Chunk
from nanogpt.text.records import (
    Lines,
    LongLine,
    Source,
    note_byte_order_marks,
    open_text,
    read_record,
)

READ_CHARS = 1 << 16
"""Characters to read at a time."""

ERROR_MARGIN_CHARS = 16
"""An error this close to the end of what was read may only mean that the rest is missing."""

OVERLAP_CHARS = 1 << 10
"""Characters that are searched again with the next ones, for the start of a record that was cut."""

MAX_START_PATTERNS = 16
"""Most patterns of record starts that are remembered."""

ANY_START = r'["{\[]'
"""The pattern for the start of a record while none has been seen."""

AFTER_RECORD = r"(?<=[,\n\r}\]\ufeff])"

SPACE = r"[ \t\r\n]{0,200}"

FIRST_KEY = re.compile(r'\{\s*("(?:[^"\\]|\\.){0,100}")\s*:')

decode = json.JSONDecoder().raw_decode


def read_json_lines(source: Source) -> Iterator[Chunk]:
    """The documents in JSON Lines; a file whose first value spans several lines is read as JSON."""
    lines, begun = Lines(open_text(source)), False
    while line := lines.read():
        where = f"{source.name}:{lines.number}"
        if isinstance(line, LongLine):
            source.report.reject(where, f"longer than {records.MAX_RECORD_CHARS:,} characters")
        elif line.strip():
            first, begun = not begun, True
            try:
                line.encode("utf-8")  # fails for invalid bytes, which came in as lone surrogates
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                if first and (text := multiline_reader(lines, line)) is not None:
                    source.note("not JSON Lines but JSON over several lines: read as that")
                    yield from read_values(source, text)
                    return
                source.report.reject(where, f"not JSON ({first_line(error)})")
                continue
            yield from read_record(source, where, value)
    note_byte_order_marks(source, lines.byte_order_marks)


def multiline_reader(lines: Lines, first: str) -> Callable[[int], str] | None:
    """A function that reads the text from its first line on, if a value spans lines there; else None."""
    if not first.lstrip().startswith(("{", "[")):
        return None
    taken: list[str] = [first]

    def read(size: int) -> str:
        """Read more text, and keep it."""
        taken.append(lines.text.read(size))
        return taken[-1]

    values = JSONStream(read, first)
    try:
        values.seek_value()
        values.read_value()
    except (ValueError, RecursionError):
        goes_on = False
    else:
        goes_on = values.position > len(first) or first.rstrip().endswith(("[", "{", ","))
    text = "".join(taken)
    if not goes_on:
        text += lines.text.readline(records.MAX_RECORD_CHARS)  # up to the end of a line
        following = io.StringIO(text, newline="")
        next(following)
        lines.pushed_back.extend(map(lines.drop_byte_order_mark, following))
        return None
    beginning = io.StringIO(text, newline="")
    return lambda size: beginning.read(size) or lines.text.read(size)


def read_json(source: Source) -> Iterator[Chunk]:
    """The documents in a JSON array of records, in one record, or in several one after the other."""
    yield from read_values(source, open_text(source).read)


def read_values(source: Source, read: Callable[[int], str]) -> Iterator[Chunk]:
    """The documents in JSON values, one after the other or in an array."""
    for where, value in json_values(source, read):
        yield from read_record(source, where, value)


def json_values(source: Source, read: Callable[[int], str], text: str = "") -> Iterator[tuple[str, Any]]:
    """JSON values, one after the other or in an array, each with where it is. Broken ones are reported.

    read: returns the next characters, at most so many. text: the characters before those.
    """
    values, number = JSONStream(read, text), 0
    while values.seek_value():
        number, begin = number + 1, values.position
        where = f"{source.name}, record {number}"
        try:
            value = values.read_value()
        except (ValueError, RecursionError) as error:
            found = values.skip_broken()
            what = (
                f"characters {begin + 1:,} to {values.position:,} are" if found else "the rest of the file is"
            )
            source.report.reject(where, f"not JSON ({first_line(error)}): {what} left out")
            continue
        yield where, value
    note_byte_order_marks(source, values.byte_order_marks)


class JSONStream:
    """JSON values in a text, with a part of the text in memory.

    read: returns the next characters, at most so many. position: number of characters before that part.
    in_array: whether the values are the elements of one array; None until that is known.
    """

    def __init__(self, read: Callable[[int], str], text: str = "") -> None:
        self.read, self.text, self.position, self.complete = read, text, 0, False
        self.in_array: bool | None = None
        self.byte_order_marks = 0
        self.start_patterns: dict[str, None] = {}
        """Patterns of the starts of the records so far (a dict as an ordered set)."""
        self.separator = ""
        """The text between the last two records."""
        self.last_start = ""
        """The start of the last record. Most records start alike, and making a pattern takes time."""

    def read_more(self) -> None:
        """Read as many characters as are in memory already, so that a long record is not parsed too often."""
        following = self.read(max(READ_CHARS, len(self.text)))
        self.complete = not following
        self.text += following

    def advance(self, count: int) -> None:
        """Drop the first characters from memory."""
        self.position += count
        self.text = self.text[count:]

    def seek_value(self) -> bool:
        """Go to the start of the next value. Returns False at the end."""
        while True:
            rest = self.text.lstrip(" \t\r\n,\ufeff]" if self.in_array else " \t\r\n,\ufeff")
            space = len(self.text) - len(rest)
            self.byte_order_marks += self.text.count("\ufeff", 0, space)
            if rest and 0 < space < OVERLAP_CHARS and self.start_patterns:
                self.separator = self.text[:space]
            self.advance(space)
            if self.text and self.in_array is not None:
                return True
            if self.text:
                self.in_array = self.text.startswith("[")
                self.advance(int(self.in_array))
            elif self.complete:
                return False
            else:
                self.read_more()

    def read_value(self) -> Any:
        """Read the value here. Raises: ValueError or RecursionError if it is broken."""
        while True:
            try:
                value, end = decode(self.text)
                if (
                    end < len(self.text) or self.complete
                ):  # at the end of what was read, a number may continue
                    break
            except ValueError as error:
                if self.complete or is_final_error(error, len(self.text)):
                    raise
            if len(self.text) > records.MAX_RECORD_CHARS:
                raise ValueError(f"longer than {records.MAX_RECORD_CHARS:,} characters")
            self.read_more()
        following = self.text[end : end + ERROR_MARGIN_CHARS].lstrip()[:1]
        torn = following == ":" or (self.in_array and following not in ',]"{[\ufeff')
        if isinstance(value, str) and torn:
            raise ValueError(f"{following!r} after a string")
        self.learn_start()
        self.advance(end)
        return value

    def learn_start(self) -> None:
        """Remember how the record here starts."""
        if self.last_start and self.text.startswith(self.last_start):
            return
        match = FIRST_KEY.match(self.text)
        self.last_start = match[0] if match else self.text[:1]
        pattern = start_pattern(self.text)
        if pattern is not None and len(self.start_patterns) < MAX_START_PATTERNS:
            self.start_patterns[pattern] = None

    def skip_broken(self) -> bool:
        """Skip a broken record: go to where the next one seems to start. Returns False if none does.

        A record seems to start where a first key of other records stands, or where a brace follows another
        with the usual text between records.
        """
        own = start_pattern(self.text)
        patterns = {**self.start_patterns}
        if own is not None and own.startswith(re.escape("{")):
            patterns[own] = None
        kinds = "|".join(patterns) or ANY_START
        like_others = rf"{AFTER_RECORD}{SPACE}(?={kinds})"
        like_before = rf"(?<=\}}){re.escape(self.separator) or SPACE + ',' + SPACE}(?=\{{)"
        start = re.compile(f"{like_others}|{like_before}")
        self.advance(1)
        while not (match := start.search(self.text)) and not self.complete:
            self.advance(max(0, len(self.text) - OVERLAP_CHARS))
            self.read_more()
        match = match or re.search(AFTER_RECORD + SPACE + f"(?={ANY_START})", self.text)
        self.advance(match.end() if match else len(self.text))
        return match is not None


def start_pattern(text: str) -> str | None:
    """A pattern of records that start like this one: with the same key, or as a string or a list."""
    if match := FIRST_KEY.match(text):
        return rf"\{{\s*{re.escape(match[1])}\s*:"
    return re.escape(text[0]) if text.startswith(('"', "[")) else None


def is_final_error(error: ValueError, size: int) -> bool:
    """Whether a text of this size is broken whatever follows it."""
    if not isinstance(error, json.JSONDecodeError):
        return True
    return not error.msg.startswith("Unterminated string") and error.pos < size - ERROR_MARGIN_CHARS


def as_dict(value: object) -> dict[str, Any]:
    """A JSON object as it is; an empty one for anything else."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def as_list(value: object) -> list[Any]:
    """A JSON array as it is; an empty one for anything else."""
    return cast(list[Any], value) if isinstance(value, list) else []
