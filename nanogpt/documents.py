"""Documents: what a corpus is made of, in pieces of bounded length.

Use:    for piece in cut(texts): piece.raw; piece.ends
        report.reject("dump.jsonl:17", "not JSON")
Knows neither files nor tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from nanogpt.config import require

PIECE = 1 << 17
"""Bytes in a piece: longer documents come in several."""

MARGIN = 1 << 12
"""How far from its end a piece may be cut to end where a word does, in bytes."""

ASCII = bytes(range(128))

KEPT = 10_000
"""Broken records that are remembered with their place; more are counted."""


class Piece(NamedTuple):
    """A part of a document, in UTF-8; ends: nothing of it follows."""

    raw: bytes
    ends: bool

    @property
    def characters(self) -> int:
        """How many characters it has."""
        beyond = self.raw.translate(None, ASCII)  # multi-byte characters, one after the other
        return len(self.raw) - len(beyond) + len(beyond.decode())


@dataclass
class Report:
    """What a pass over a corpus met on its way.

    strict: the first broken record is an error. notes: how files were read, a line each.
    """

    strict: bool = False
    notes: list[str] = field(default_factory=list[str])
    broken: list[str] = field(default_factory=list[str])
    broken_count: int = 0
    repaired: int = 0
    """Records with half a surrogate pair, or bytes that are no characters, which became U+FFFD."""

    def reject(self, where: str, what: str) -> None:
        """Count a record that cannot be read. Errors: UserError if strict."""
        require(not self.strict, f"{where}: {what} (--strict stops at the first broken record)")
        self.broken_count += 1
        if len(self.broken) < KEPT:
            self.broken.append(f"{where}: {what}")


def counted(number: int, noun: str) -> str:
    """A number with the noun that it counts: 1 byte, 2 bytes."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def cut(blocks: Iterable[bytes]) -> Iterator[Piece]:
    """A document, given in blocks of whole characters of UTF-8, in pieces of PIECE bytes.

    A piece ends before a space that follows a word, if there is one: no token of a byte-level BPE spans
    that, and so the cut changes no token. White space alone is no document.
    """
    waiting, begun = b"", False
    for block in blocks:
        waiting = waiting + block if waiting else block
        start = 0
        while len(waiting) - start > PIECE:
            end = word_end(waiting, start, start + PIECE)
            yield Piece(waiting[start:end], False)
            start, begun = end, True
        waiting = waiting[start:]
    if begun or not is_blank(waiting):
        yield Piece(waiting, True)


def word_end(raw: bytes, start: int, stop: int) -> int:
    """Where to cut raw[start:stop]: before its last space that follows a word; or where a character ends."""
    least = max(start + 1, stop - MARGIN)
    end = raw.rfind(b" ", least, stop)
    while end > 0:
        if ord("!") <= raw[end - 1] <= ord("~"):
            return end
        end = raw.rfind(b" ", least, end)
    while stop < len(raw) and raw[stop] & 0xC0 == 0x80:
        stop += 1
    return stop


def is_blank(raw: bytes) -> bool:
    """Whether there is nothing but white space, of any script."""
    return not raw or raw.isspace() or (len(raw) <= MARGIN and raw.decode().isspace())


def strings(value: object, path: Sequence[str]) -> Iterator[object]:
    """What `path` leads to, in every element of every list on the way; None where it leads nowhere."""
    if isinstance(value, list):
        for item in cast(list[object], value):
            yield from strings(item, path)
    elif isinstance(value, dict) and path:
        yield from strings(cast(dict[str, object], value).get(path[0]), path[1:])
    else:
        yield value
