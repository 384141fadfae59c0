"""CSV, TSV and Parquet: the column of a table that is its text.

Example: for chunk in read_table(",", source): ...
The header line tells the delimiter of a CSV file and the column. A quote that is never closed costs its own
row and no other. Knows neither files nor archives.
"""

import csv
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from nanogpt.errors import UserError, first_line
from nanogpt.text import records
from nanogpt.text.documents import Chunk
from nanogpt.text.records import (
    Lines,
    LongLine,
    Source,
    join_names,
    missing_library,
    note_byte_order_marks,
    open_text,
    read_record,
    seekable_copy,
)
from nanogpt.units import plural

PARQUET_BATCH_ROWS = 256
"""Rows of a Parquet file in memory at a time."""

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}

MAX_REREAD_RATIO = 4
"""Characters that unclosed quotes may have read again, for each one of the file: time stays linear."""

SEPARATOR_LINE = re.compile(r"sep=([^\"\r\n])[\r\n]*", re.IGNORECASE)
"""The line above the header in which spreadsheets name the delimiter."""

MAX_TRIED_LINES = 32
"""Lines at the start and end of a broken row that are tried as the first line of another row."""

SENTINEL_LINE = "end\n"
"""A line that is appended to others to see whether they are complete."""

MAX_HEADER_CHARS = 1 << 20
"""Longest header that may span several lines."""

LINE_END = re.compile(r"\r\n|\r|\n")


def read_table(delimiter: str, source: Source) -> Iterator[Chunk]:
    """The documents in a CSV or TSV file with a header: text_field names the column, or a pair's two."""
    with long_fields():
        rows = TableRows(Lines(open_text(source)), source)
        columns = rows.read_header(delimiter)
        for where, row in whole_rows(rows, source):
            yield from read_record(source, where, {name: row[index] for name, index in columns.items()})


@contextmanager
def long_fields() -> Generator[None]:
    """Let csv read fields as long as a record may be. Its limit is the whole process's, so it is restored."""
    before = csv.field_size_limit(records.MAX_RECORD_CHARS)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def whole_rows(rows: "TableRows", source: Source) -> Iterator[tuple[str, list[str]]]:
    """The rows of a table with the right number of fields, each with where it is. Others are reported."""
    for number, row in rows:
        where = f"{source.name}:{number}"
        if len(row) == rows.width:
            yield where, row
        elif row:
            source.report.reject(where, f"{plural(len(row), 'field')} instead of {rows.width}")
    note_byte_order_marks(source, rows.lines.byte_order_marks)


class HeaderLayout(NamedTuple):
    """How a header is split. spaced: spaces around names and after delimiters are ignored."""

    delimiter: str
    spaced: bool
    names: list[str]


class RowFeed:
    """The lines of one row, as an iterator for csv.reader.

    row_lines: the lines taken so far. size: characters in them. limit: most characters before the last line.
    ended: whether the file ended inside the row.
    """

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self.start_row(0)

    def start_row(self, limit: int) -> None:
        """Begin a row."""
        self.row_lines: list[str] = []
        self.size, self.limit, self.ended = 0, limit, False

    def __iter__(self) -> "RowFeed":
        """Itself. It may continue after its end, once lines are given back."""
        return self

    def __next__(self) -> str:
        """The next line. Raises: csv.Error if the row or the line is too long."""
        if self.row_lines and self.size > self.limit:
            raise csv.Error(f"longer than {self.limit:,} characters")
        line = self.lines.read()
        if not line:
            self.ended = True
            raise StopIteration
        self.row_lines.append(line)
        self.size += len(line)
        if isinstance(line, LongLine):
            raise csv.Error(f"longer than {records.MAX_RECORD_CHARS:,} characters")
        return line

    def give_back(self) -> None:
        """Give the lines of the row back, to be read again."""
        self.lines.give_back(self.row_lines)


class TableRows:
    """The rows of a table, each with the number of its first line.

    names: of the columns. width: number of columns. reread_chars: characters that unclosed quotes have had
    read again.
    """

    def __init__(self, lines: Lines, source: Source) -> None:
        self.lines, self.source, self.feed = lines, source, RowFeed(lines)
        self.delimiter, self.spaced, self.width, self.reread_chars = ",", False, 0, 0
        self.names: list[str] = []

    def read_header(self, delimiter: str) -> dict[str, int]:
        """Read the header. Returns the index of each wanted column by its name.

        Raises: UserError if one is missing.
        """
        while (line := self.lines.read()) and not line.strip():
            pass
        match = SEPARATOR_LINE.fullmatch(line)
        if line and not match:
            self.lines.give_back([line])
        layout = self.find_layout(match[1] if match else delimiter)
        columns = find_columns(self.source, layout.names)
        self.delimiter, self.spaced, self.width = layout.delimiter, layout.spaced, len(layout.names)
        self.names = layout.names
        if layout.delimiter != delimiter:
            words = DELIMITERS.get(layout.delimiter, repr(layout.delimiter))
            self.source.note(f"columns separated by {words}, as the line of names shows")
        return columns

    def find_layout(self, delimiter: str) -> HeaderLayout:
        """The layout in which the header has the wanted fields; if none does, the one with the most names."""
        wanted, layouts = set(self.source.options.fields.values()), list[HeaderLayout]()
        for candidate in (delimiter, *(other for other in DELIMITERS if other != delimiter)):
            for spaced in (False, True):
                names = self.split_header(candidate, spaced)
                layouts.append(HeaderLayout(candidate, spaced, names))
                self.feed.give_back()
        found = [layout for layout in layouts if wanted <= {*layout.names}]
        beginnings = {field.split(".")[0] for field in wanted}
        found += [layout for layout in layouts if beginnings <= {*layout.names}]
        best = found[0] if found else max(layouts[1::2], key=lambda layout: len(layout.names))
        self.split_header(best.delimiter, best.spaced)
        return best

    def split_header(self, delimiter: str, spaced: bool) -> list[str]:
        """The names in the header for one layout. Raises: csv.Error if it is too long."""
        self.feed.start_row(MAX_HEADER_CHARS)
        names = next(csv.reader(self.feed, delimiter=delimiter, skipinitialspace=spaced), list[str]())
        return [name.strip() for name in names] if spaced else names

    def csv_reader(self, lines: Iterable[str], *, strict: bool = False) -> Iterator[list[str]]:
        """A csv.reader of lines. strict: csv.Error at a quote that is open or inside a field."""
        return csv.reader(lines, delimiter=self.delimiter, skipinitialspace=self.spaced, strict=strict)

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        """Every row with the number of its first line. Broken rows are reported."""
        strict = self.csv_reader(self.feed, strict=True)
        while True:
            number = self.lines.number + 1
            self.start_row()
            try:
                row = next(strict)
            except StopIteration:
                return
            except csv.Error:
                self.feed.give_back()
                found = self.read_tolerantly(number)
            else:
                following = self.find_swallowed_row(row, closed=True)
                found = self.report_open_quote(number, 0, following) if following else row
            if found is not None:
                yield number, found

    def start_row(self) -> None:
        """Begin a row. Its longest length depends on how much has been read, so that time stays linear."""
        limit = records.MAX_RECORD_CHARS + MAX_REREAD_RATIO * self.lines.chars_read - self.reread_chars
        self.feed.start_row(max(0, min(records.MAX_RECORD_CHARS, limit)))

    def read_tolerantly(self, number: int) -> list[str] | None:
        """Read a row that may have quotes anywhere. If it is no row, report it and return None."""
        self.start_row()
        feed = self.feed
        try:
            row = next(self.csv_reader(feed))
        except csv.Error as error:
            if len(feed.row_lines) == 1:
                self.source.report.reject(f"{self.source.name}:{number}", first_line(error))
                return None
            opened = self.find_open_quote(feed.row_lines[:-1])
            return self.report_open_quote(number, opened, opened + 1)
        if feed.ended:
            opened = self.find_open_quote(feed.row_lines)
            return self.report_open_quote(number, opened, opened + 1)
        following = self.find_swallowed_row(row, closed=False)
        return self.report_open_quote(number, 0, following) if following else row

    def find_open_quote(self, lines: list[str]) -> int:
        """The index of the line of an unfinished row in which its last quote opens."""
        *_, row = self.csv_reader(lines)
        ends = lines[-1].endswith(("\n", "\r"))
        return len(lines) - len(LINE_END.findall(row[-1])) - (not ends)

    def find_swallowed_row(self, row: list[str], *, closed: bool) -> int:
        """The index of the line where other rows begin, which an open quote swallowed; 0 if it is one row.

        closed: every quote ends where its field does. Then only a wrong number of fields is suspicious.
        """
        held, fits = self.feed.row_lines, len(row) == self.width
        if len(held) == 1 or (fits and (closed or self.width == 1)):
            return 0
        firsts = [
            first
            for first in range(1, len(held))
            if first <= MAX_TRIED_LINES or first >= len(held) - MAX_TRIED_LINES
        ]
        return next((first for first in firsts if self.are_rows(held[first:])), 0)

    def are_rows(self, lines: list[str]) -> bool:
        """Whether lines are rows of the table by themselves; the last one may be unfinished.

        The end of a text over several lines is not a row: it has a closing quote without the opening one.
        """
        try:
            *rows, last = self.csv_reader([*lines, SENTINEL_LINE])
        except csv.Error:
            return False
        if last == [SENTINEL_LINE.strip()]:
            whole = sum(line.count('"') for line in lines) % 2 == 0
        else:
            whole = len(last) <= self.width
        return whole and all(len(row) == self.width for row in rows)

    def report_open_quote(self, number: int, opened: int, first: int) -> None:
        """Report a row with a quote that is never closed, and give back the lines after it if some are rows.

        number: of its first line. opened: index of the line with the quote. first: index of the next line.
        """
        held, where = self.feed.row_lines, f"{self.source.name}:{number + opened}"
        following, what = held[first:], "a quote that opens here is not closed"
        self.reread_chars += self.feed.size
        if self.has_row(following):
            self.lines.give_back(following)
            what += ": its row is left out, the lines after it are read as rows of their own"
        elif following:
            what += f": {plural(len(held), 'line')} left out, up to line {number + len(held) - 1}"
        self.source.report.reject(where, what)

    def has_row(self, lines: list[str]) -> bool:
        """Whether some row in lines has the right number of fields."""
        try:
            return any(len(row) == self.width for row in self.csv_reader(lines))
        except csv.Error:
            return True  # reported when it is read


def read_parquet(source: Source) -> Iterator[Chunk]:
    """The documents in a column of a Parquet file, or in a pair's two."""
    try:
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise missing_library("pyarrow") from error
    source.report.files_with_fields += 1
    number = 0
    with seekable_copy(source.file) as file:
        table: Any = ParquetFile(file)
        names = list(map(str, table.schema_arrow.names))
        wanted = list(find_columns(source, names))
        for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=wanted):
            columns = [batch.column(batch.schema.names.index(name)) for name in wanted]
            for row in zip(*columns, strict=True):
                number += 1
                where = f"{source.name}, row {number}"
                try:
                    record = {name: value.as_py() for name, value in zip(wanted, row, strict=True)}
                except UnicodeDecodeError as error:
                    source.report.reject(where, f"bytes that are not text ({first_line(error)})")
                    continue
                yield from read_record(source, where, record)


def find_columns(source: Source, names: Sequence[str]) -> dict[str, int]:
    """The columns that the wanted fields name or lead into: the index of each by its name.

    Raises: UserError if one is missing.
    """
    found: dict[str, int] = {}
    for flag, field in source.options.fields.items():
        path = field.split(".")
        beginnings = [".".join(path[:size]) for size in range(len(path), 0, -1)]
        name = next((beginning for beginning in beginnings if beginning in names), None)
        if name is None:
            known = join_names(names) or "none"
            raise UserError(f"has no column {field!r}: give {flag}, one of {known}")
        if names.count(name) > 1:
            source.note(f"several columns {name!r}: the first is read")
        found[name] = list(names).index(name)
    return found
