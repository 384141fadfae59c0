"""Bytes to text: which encoding a file has, and reading it in blocks of UTF-8.

Example:
    blocks, notes = decoded(file)
A byte order mark decides, then UTF-8, then detection. Errors are UserErrors without a file's name:
the caller knows it.

"""

import codecs
from collections.abc import Callable, Iterator
from typing import BinaryIO

from nanogpt.errors import UserError, require
from nanogpt.text.documents import counted

BYTE_ORDER_MARKS = (  # UTF-32 first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

NOT_TEXT = "is not a text file: save it as plain text in UTF-8"

PREFERRED_ENCODING = "cp1252"
"""The old encoding of western Europe, a superset of Latin-1's characters."""

DETECTION_BYTES = 1 << 20
"""How much of a file the encoding detector looks at."""

HEAD_BYTES = 1 << 24
"""How much of a file decides its encoding, in bytes: most files are shorter."""

READ_BYTES = 1 << 17
"""How much of a longer file is decoded at a time."""


def decode_file(
    file: BinaryIO, lose: Callable[[str], object] = str
) -> tuple[Iterator[bytes], tuple[str, ...]]:
    """The text of a file in UTF-8, in blocks of whole characters, and notes on its encoding (a line each).

    lose: called with a line on bytes at the end that are left out.
    Raises: UserError if it is binary, or where it cannot be decoded (then, in the middle of the blocks).
    """
    beginning = file.read(HEAD_BYTES)
    following = file.read(READ_BYTES)
    encoding, notes = find_encoding(beginning, whole=not following)
    parts = read_blocks(file, beginning, following)
    return reject_nul(
        check_utf8(parts, lose) if encoding == "utf-8" else convert_to_utf8(parts, encoding)
    ), notes


def read_blocks(file: BinaryIO, beginning: bytes, following: bytes) -> Iterator[bytes]:
    """The bytes of a file, of which some have been read, in blocks of READ_BYTES."""
    for start in range(0, len(beginning), READ_BYTES):
        yield beginning[start : start + READ_BYTES]
    del beginning
    while following:
        yield following
        following = file.read(READ_BYTES)


def check_utf8(parts: Iterator[bytes], lose: Callable[[str], object]) -> Iterator[bytes]:
    """UTF-8 in blocks of whole characters. One that is cut off by the end of the file is left out and said.

    Raises: UserError at bytes that are no UTF-8.
    """
    held, position = b"", 0
    for part in parts:
        raw = held + part if held else part
        whole = whole_characters(raw)
        held = raw[len(whole) :]
        if not whole.isascii():
            try:
                whole.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(decode_error_message("UTF-8", error, position + error.start)) from error
        position += len(whole)
        yield whole
    if held:
        lose(f"ends inside a character: {counted(len(held), 'byte')} left out")


def convert_to_utf8(parts: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """Another encoding as UTF-8. Raises: UserError at bytes that do not belong to it."""
    decoder, position = codecs.getincrementaldecoder(encoding)("strict"), 0
    try:
        for part in parts:
            yield decoder.decode(part).encode()
            position += len(part)
        yield decoder.decode(b"", final=True).encode()
    except UnicodeDecodeError as error:
        raise UserError(decode_error_message(encoding, error, position + error.start)) from error


def decode_error_message(encoding: str, error: UnicodeDecodeError, position: int) -> str:
    """What is wrong at a byte of a file."""
    return f"{NOT_TEXT} (read as {encoding}, but: {error.reason} at about byte {position:,})"


def reject_nul(parts: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks, unless one has the character that no text has. Raises: UserError at that."""
    for part in parts:
        require(b"\0" not in part, NOT_TEXT)
        yield part


def whole_characters(raw: bytes) -> bytes:
    """`raw` without a character of UTF-8 that is cut off at its very end."""
    for back in range(1, min(4, len(raw) + 1)):
        byte = raw[-back]
        if byte >= 0xC0:  # the first byte of a character: are the others there?
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return raw[:-back] if back < needed else raw
        if byte < 0x80:
            return raw
    return raw


def find_encoding(raw: bytes, *, whole: bool, in_records: bool = False) -> tuple[str, tuple[str, ...]]:
    """The encoding of a file by its beginning, and notes on it: by its mark, else UTF-8, else detected.

    whole: `raw` is all there is of the file. in_records: a few bytes that are no UTF-8 break the records
    they are in, not the file.
    Raises: UserError if it is binary or cannot be decoded.
    """
    for mark, encoding in BYTE_ORDER_MARKS:
        if raw.startswith(mark):  # whose codec takes the mark away
            return encoding, (f"read as {encoding.upper()}, by its byte order mark",)
    valid, cut_off = valid_utf8(raw)
    if valid == len(raw) or (cut_off and not whole) or (in_records and is_mostly_utf8(raw)):
        return "utf-8", ()
    if cut_off and is_mostly_utf8(raw[:valid]):
        return "utf-8", ()  # the reader says that something is left out
    require(
        not is_mostly_utf8(raw),
        f"is UTF-8 but for the byte 0x{raw[valid]:02X} at {valid:,}: remove or repair it",
    )
    encoding = guess_encoding(raw, whole=whole)
    if encoding is None:
        raise UserError(NOT_TEXT)
    return encoding, (f"not UTF-8: read as {encoding}, as detected",)


def valid_utf8(raw: bytes) -> tuple[int, int]:
    """How many bytes of `raw` are UTF-8, from its start; and how many follow, of a character cut off."""
    if raw.isascii():
        return len(raw), 0
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(raw), READ_BYTES):  # the whole text at once would take four times its bytes
        held = len(decoder.getstate()[0])
        try:
            decoder.decode(raw[start : start + READ_BYTES])
        except UnicodeDecodeError as error:
            return start - held + error.start, 0
    held = len(decoder.getstate()[0])
    return len(raw) - held, held


def is_mostly_utf8(raw: bytes) -> bool:
    """Whether bytes beyond ASCII form characters of UTF-8, nine times out of ten; chance never does that."""
    text = raw[:DETECTION_BYTES].decode("utf-8", "replace")
    broken = text.count("\ufffd")
    whole = sum(char > "\x7f" for char in text) - broken
    return whole > 9 * broken


def guess_encoding(raw: bytes, *, whole: bool) -> str | None:
    """The likeliest encoding of `raw` by its beginning (charset-normalizer), None for binary data."""
    from charset_normalizer import from_bytes

    beginning = raw[:DETECTION_BYTES]
    if len(beginning) < len(raw) or not whole:  # end with a line, so that no character is cut in half
        end = beginning.rfind(b"\n") + 1
        beginning = beginning[:end] if 2 * end > len(beginning) else beginning
    matches = from_bytes(beginning)
    best = matches.best()
    if best is None:
        return None
    # Several may explain the bytes equally well: then the commonest of them.
    equals = [match for match in matches if (match.chaos, match.coherence) == (best.chaos, best.coherence)]
    encodings = [best.encoding, *(name for match in equals for name in match.could_be_from_charset)]
    return PREFERRED_ENCODING if PREFERRED_ENCODING in encodings else best.encoding


def utf8(text: str) -> bytes:
    """`text` in UTF-8; half a surrogate pair, which UTF-8 cannot hold, as U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
