"""The text formats: the function that reads a file, by the end of the file's name.

Example:
    chunks = FORMATS[".jsonl"](source)

To add a format, write a function that takes a `Source` and yields `Chunk`s in a file of its own, and give it
a row here. A file whose name ends in anything else is read as plain text. Archives and compressed files,
which hold files of these formats, are in archives.py.

"""

from collections.abc import Callable, Iterator
from functools import partial

from nanogpt.text.documents import Chunk
from nanogpt.text.json_formats import read_json, read_json_lines
from nanogpt.text.records import Source, read_text
from nanogpt.text.tables import read_parquet, read_table

Reader = Callable[[Source], Iterator[Chunk]]
"""A function that reads the documents in a file."""

FORMATS: dict[str, Reader] = {
    ".txt": read_text,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": partial(read_table, ","),
    ".tsv": partial(read_table, "\t"),
    ".parquet": read_parquet,
}
"""Readers by suffix, in lower case."""
