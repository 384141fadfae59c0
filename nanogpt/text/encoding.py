"""The encoding of a file: find it, and read the file in blocks of UTF-8.

Example: blocks, notes = decode_file(file)
A byte order mark decides, then valid UTF-8, then --encoding or detection. Errors are UserErrors without the
file's name, which the caller adds.
"""

import codecs
from collections.abc import Callable, Iterator
from typing import BinaryIO

from nanogpt.errors import UserError, require
from nanogpt.units import plural

BYTE_ORDER_MARKS = (  # UTF-32 first: its little-endian mark begins like UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

NOT_TEXT = "is not a text file: save it as plain text in UTF-8, or give its --encoding"

PREFERRED_ENCODING = "cp1252"
"""The old encoding of western Europe, which has all characters of Latin-1."""

DETECT = "auto"
"""The --encoding that is detected, file by file."""

NEVER_DETECTED = (
    *("johab", "hz", "tis_620", "cp1258", "iso8859_3", "iso8859_10", "iso8859_14", "iso8859_16"),
    *("mac_greek", "mac_iceland", "mac_latin2", "mac_turkish", "hp_roman8", "kz1048", "ptcp154", "cp1006"),
    *("cp1125", "cp037", "cp273", "cp424", "cp500", "cp875", "cp1026", "cp1140"),
)
"""Encodings that few files have and common ones are mistaken for: Spanish in cp1252 looks like johab."""

DETECTION_BYTES = 1 << 20
"""Bytes of a file that encoding detection looks at."""

HEAD_BYTES = 1 << 24
"""Bytes of a file that decide its encoding: most files are shorter."""

READ_BYTES = 1 << 17
"""Bytes to decode at a time."""


def decode_file(
    file: BinaryIO, on_loss: Callable[[str], object] = str, otherwise: str = DETECT
) -> tuple[Iterator[bytes], tuple[str, ...]]:
    """The text of a file in UTF-8, in blocks of whole characters, and notes on its encoding (a line each).

    on_loss: called with a line on bytes at the end that are left out. otherwise: as of find_encoding.
    Raises: UserError if it is binary, or, in the middle of the blocks, where it cannot be decoded.
    """
    beginning = file.read(HEAD_BYTES)
    following = file.read(READ_BYTES)
    encoding, notes = find_encoding(beginning, whole=not following, otherwise=otherwise)
    parts = read_blocks(file, beginning, following)
    return reject_nul(
        check_utf8(parts, on_loss) if encoding == "utf-8" else convert_to_utf8(parts, encoding)
    ), notes


def read_blocks(file: BinaryIO, beginning: bytes, following: bytes) -> Iterator[bytes]:
    """The bytes of a file in blocks of READ_BYTES: what has been read already, then the rest."""
    for start in range(0, len(beginning), READ_BYTES):
        yield beginning[start : start + READ_BYTES]
    del beginning
    while following:
        yield following
        following = file.read(READ_BYTES)


def check_utf8(parts: Iterator[bytes], on_loss: Callable[[str], object]) -> Iterator[bytes]:
    """Check UTF-8, in blocks of whole characters. One that the end of the file cuts off is left out.

    Raises: UserError at bytes that are not UTF-8.
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
        on_loss(f"ends inside a character: {plural(len(held), 'byte')} left out")


def convert_to_utf8(parts: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """Convert another encoding to UTF-8. Raises: UserError at bytes that it does not have."""
    decoder, position = codecs.getincrementaldecoder(encoding)("strict"), 0
    try:
        for part in parts:
            yield decoder.decode(part).encode()
            position += len(part)
        yield decoder.decode(b"", final=True).encode()
    except UnicodeDecodeError as error:
        raise UserError(decode_error_message(encoding, error, position + error.start)) from error


def decode_error_message(encoding: str, error: UnicodeDecodeError, position: int) -> str:
    """The error message for a byte that cannot be decoded."""
    return f"{NOT_TEXT} (read as {encoding}, but: {error.reason} at about byte {position:,})"


def reject_nul(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Pass the blocks on. Raises: UserError at a NUL, which no text has."""
    for part in parts:
        require(b"\0" not in part, NOT_TEXT)
        yield part


def whole_characters(raw: bytes) -> bytes:
    """`raw` without a UTF-8 character that is cut off at its end."""
    for back in range(1, min(4, len(raw) + 1)):
        byte = raw[-back]
        if byte >= 0xC0:  # the first byte of a character: are the others there?
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return raw[:-back] if back < needed else raw
        if byte < 0x80:
            return raw
    return raw


def find_encoding(
    raw: bytes, *, whole: bool, in_records: bool = False, otherwise: str = DETECT
) -> tuple[str, tuple[str, ...]]:
    """The encoding of a file, from its first bytes, and notes on it: by its mark, else UTF-8, else detected.

    whole: `raw` is the whole file. in_records: a few bytes that are not UTF-8 break their records, not the
    file. otherwise: the encoding of what has no mark and is not UTF-8, in place of a detected one.
    Raises: UserError if it is binary or cannot be decoded.
    """
    for mark, encoding in BYTE_ORDER_MARKS:
        if raw.startswith(mark):  # the codec drops the mark
            return encoding, (f"read as {encoding.upper().removesuffix('-SIG')}, by its byte order mark",)
    if otherwise != DETECT and b"\0" in raw:  # UTF-16 of English looks like UTF-8
        return otherwise, (f"read as {otherwise}, as --encoding says",)
    valid, cut_off = valid_utf8(raw)
    if valid == len(raw) or (cut_off and not whole) or (in_records and is_mostly_utf8(raw)):
        return "utf-8", ()
    if cut_off and is_mostly_utf8(raw[:valid]):
        return "utf-8", ()  # the reader reports the character that is left out
    require(
        not is_mostly_utf8(raw),
        f"is UTF-8 but for the byte 0x{raw[valid]:02X} at {valid:,}: remove or repair it",
    )
    if otherwise != DETECT:
        return otherwise, (f"not UTF-8: read as {otherwise}, as --encoding says",)
    encoding = guess_encoding(raw, whole=whole)
    if encoding is None:
        raise UserError(NOT_TEXT)
    return encoding, (f"not UTF-8: read as {encoding}, as detected (--encoding gives another)",)


def valid_utf8(raw: bytes) -> tuple[int, int]:
    """How many bytes of `raw` are UTF-8, from its start, and how many of a cut-off character follow."""
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
    """Whether nine out of ten bytes beyond ASCII are valid UTF-8, which never happens by chance."""
    text = raw[:DETECTION_BYTES].decode("utf-8", "replace")
    broken = text.count("\ufffd")
    whole = sum(char > "\x7f" for char in text) - broken
    return whole > 9 * broken


def guess_encoding(raw: bytes, *, whole: bool) -> str | None:
    """The likeliest encoding of `raw`, from its first bytes (charset-normalizer); None for binary data."""
    from charset_normalizer import from_bytes

    beginning = raw[:DETECTION_BYTES]
    if len(beginning) < len(raw) or not whole:  # end with a line, so that no character is cut in half
        end = beginning.rfind(b"\n") + 1
        beginning = beginning[:end] if 2 * end > len(beginning) else beginning
    matches = from_bytes(beginning, cp_exclusion=[*NEVER_DETECTED])
    best = matches.best()
    if best is None:
        return None
    # Several may explain the bytes equally well: then the commonest of them.
    equals = [match for match in matches if (match.chaos, match.coherence) == (best.chaos, best.coherence)]
    encodings = [best.encoding, *(name for match in equals for name in match.could_be_from_charset)]
    return PREFERRED_ENCODING if PREFERRED_ENCODING in encodings else best.encoding


def is_encoding(name: str) -> bool:
    """Whether Python knows an encoding of that name, for text."""
    try:
        b"abcd".decode(name, "replace")
    except (LookupError, ValueError):
        return False
    return name.lower().replace("-", "_") not in ("idna", "punycode", "unicode_escape", "raw_unicode_escape")


def check_encoding(name: str) -> None:
    """Raise UserError if --encoding names none."""
    require(
        name == DETECT or is_encoding(name),
        f"--encoding {name} is not known: use auto, cp1252, cp1250, koi8-r, shift_jis, ... (Python's names)",
    )


def utf8(text: str) -> bytes:
    """`text` in UTF-8; half a surrogate pair, which UTF-8 cannot hold, as U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
