"""Jupyter notebooks (.ipynb) as Markdown: text as it is, code between fences, no output.

Example: for chunk in read_notebook(source): ...
"""

import json
from collections.abc import Iterator
from typing import Any

from nanogpt.errors import UserError, first_line, require
from nanogpt.text import records
from nanogpt.text.documents import Chunk, split_into_chunks
from nanogpt.text.json_formats import as_dict, as_list
from nanogpt.text.records import Source, decode_text, in_blocks

TEXT_CELLS = ("markdown", "heading")


def read_notebook(source: Source) -> Iterator[Chunk]:
    """A notebook as one document. Raises: UserError if it is none."""
    text = decode_text(source).read(records.MAX_RECORD_CHARS + 1)
    require(
        len(text) <= records.MAX_RECORD_CHARS,
        f"is longer than {records.MAX_RECORD_CHARS:,} characters: clear its outputs in Jupyter",
    )
    try:
        content = as_dict(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise UserError(f"is no notebook: not JSON ({first_line(error)})") from error
    sheets = as_list(content.get("worksheets")) or [content]  # format 3 had sheets, which had the cells
    cells = [as_dict(cell) for sheet in sheets for cell in as_list(as_dict(sheet).get("cells"))]
    require(bool(cells), "has no cells: it is no notebook")
    language = as_dict(as_dict(content.get("metadata")).get("language_info")).get("name")
    yield from split_into_chunks(in_blocks(cell_texts(cells, language if isinstance(language, str) else "")))


def cell_texts(cells: list[dict[str, Any]], language: str) -> Iterator[str]:
    """The text of each cell that has some, with an empty line between two."""
    between = ""
    for cell in cells:
        source: object = cell.get("source", cell.get("input"))
        text = "".join(map(str, as_list(source) or [source or ""])).strip("\n")
        if cell.get("cell_type") == "code":
            text = text and f"```{language}\n{text}\n```"
        elif cell.get("cell_type") not in TEXT_CELLS:
            text = ""
        if text.strip():
            yield between + text
            between = "\n\n"
