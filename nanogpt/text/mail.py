"""Mail as text: mbox files, Maildir folders and .eml files, each mail a document.

Example: for chunk in read_mbox(source): ...
A mail becomes its From, To and Subject and its text, decoded; HTML is read where there is no plain text, and
attachments are left out. Python's email package parses it. One mail is in memory at a time.
"""

import re
from collections.abc import Iterator
from email import policy
from email.header import decode_header, make_header
from email.message import Message
from email.parser import BytesParser
from email.utils import getaddresses
from io import BytesIO
from pathlib import PureWindowsPath
from typing import Any, BinaryIO, cast

from nanogpt.errors import UserError, first_line, require
from nanogpt.text.documents import Chunk, split_into_chunks
from nanogpt.text.encoding import is_encoding
from nanogpt.text.markup import decode_html, html_text
from nanogpt.text.records import Beginning, Certainty, Source, utf8
from nanogpt.text.speakers import clean_name
from nanogpt.units import plural

MAX_MAIL_BYTES = 1 << 26
"""A longer mail is read up to here: its text comes before its attachments."""

MAX_FIELD_CHARS = 1 << 14
"""Characters of a field in a mail's header. A longer one is cut: decoding it takes quadratic time."""

LINE_BYTES = 1 << 16
"""Bytes of a line to read at a time."""

HEADER = re.compile(rb"[!-9;-~]{1,100}:[ \t\r\n]|>From ")

DATED = re.compile(rb"From .{0,200}\d{2}:\d{2}.{0,40}\d{4}")
"""The line above a mail in an mbox file."""

QUOTED_FROM = re.compile(rb"^>(>*From )", re.MULTILINE)

NAMED_FIELDS = re.compile(
    r"^(?:from|to|subject|date|message-id|received|return-path|mime-version|delivered-to|x-[\w-]+):",
    re.IGNORECASE | re.MULTILINE,
)

MAIL_FOLDERS = ("cur", "new")
"""Folders of a Maildir that hold a mail in each file."""

SIGNATURE = "-- "
"""The line above a signature."""

OTHER_ENCODINGS = ("utf-8", "cp1252")
"""Encodings that are tried for a text that is not in the one it names."""


def read_mbox(source: Source) -> Iterator[Chunk]:
    """Every mail in an mbox file. Raises: UserError if it has none."""
    number = without_text = 0
    for raw in split_mbox(source.file):
        number += 1
        chunks = list(mail_chunks(source, f"{source.name}, mail {number}", raw))
        without_text += not chunks
        yield from chunks
    require(number > 0, "has no mail: it is no mbox file")
    if without_text:
        source.note(f"{plural(without_text, 'mail')} without text, or left out by --speakers")


def read_mail(source: Source) -> Iterator[Chunk]:
    """A mail in a file of its own."""
    yield from mail_chunks(source, source.name, source.file.read(MAX_MAIL_BYTES))


def sniff_mbox(beginning: Beginning) -> Certainty:
    """Whether a file is an mbox file, whatever its name."""
    first, _, rest = beginning.text.partition("\n")
    return "certain" if first.startswith("From ") and HEADER.match(rest.encode()) else "no"


def sniff_mail(beginning: Beginning) -> Certainty:
    """Whether a file is a mail: certainly so in a Maildir, whose files have no suffix."""
    head = re.split(r"\r?\n\r?\n", beginning.text, maxsplit=1)[0]
    names = {match[0].lower() for match in NAMED_FIELDS.finditer(head)}
    lines = re.sub(r"\r?\n[ \t]+", " ", head).splitlines()
    if not all(HEADER.match(line.encode()) for line in lines) or len(names) < 3 or "from:" not in names:
        return "no"
    parts = PureWindowsPath(beginning.name).parts
    return "certain" if len(parts) > 1 and parts[-2] in MAIL_FOLDERS else "likely"


def split_mbox(file: BinaryIO) -> Iterator[bytes]:
    """The mails in an mbox file, each without the line above it. It is read in a stream."""
    mail: list[bytes] = []
    size, after_empty, line_begins, some_mail = 0, True, True, False
    line = file.readline(LINE_BYTES)
    while line:
        following = file.readline(LINE_BYTES)
        if line_begins and is_separator(line, following, after_empty=after_empty):
            if some_mail:
                yield unquote_from(mail)
            mail, size, some_mail = [], 0, True
        elif some_mail and size < MAX_MAIL_BYTES:
            mail.append(line)
            size += len(line)
        after_empty, line_begins = not line.strip(), line.endswith(b"\n")
        line = following
    if some_mail:
        yield unquote_from(mail)


def is_separator(line: bytes, following: bytes, *, after_empty: bool) -> bool:
    """Whether a line stands above a mail: a text may begin with "From " too, but no header follows that."""
    return (
        line.startswith(b"From ")
        and (after_empty or DATED.match(line) is not None)
        and HEADER.match(following) is not None
    )


def unquote_from(lines: list[bytes]) -> bytes:
    """A mail whose lines that begin with "From " were quoted with ">"."""
    return QUOTED_FROM.sub(rb"\1", b"".join(lines))


def mail_chunks(source: Source, where: str, raw: bytes) -> Iterator[Chunk]:
    """A mail as one document; none if it has no text, or if its sender is left out."""
    try:
        mail = BytesParser(policy=policy.compat32).parsebytes(raw)
        text = mail_text(source, mail)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Python's email package raises many kinds of error for a malformed mail
        source.report.reject(where, f"no mail that can be read ({first_line(error)})")
        return
    if text:
        yield from split_into_chunks([utf8(text)])


def mail_text(source: Source, mail: "Message[Any, Any]") -> str:
    """The text of a mail below its From, To and Subject; "" if it has none, or if its sender is left out."""
    body = body_text(mail)
    if not body:
        return ""
    sender = next(iter(people(mail, "from")), ("", "unknown"))
    name = source.speaker(*sender)
    if name is None:
        return ""
    rules = source.options.speaker_rules
    receivers = [rules.rename(*person) for person in people(mail, "to")]
    fields = {"From": name, "To": ", ".join(filter(None, receivers)), "Subject": header(mail, "subject")}
    return "".join(f"{key}: {value}\n" for key, value in fields.items() if value) + f"\n{body}\n"


def people(mail: "Message[Any, Any]", field: str) -> list[tuple[str, str]]:
    """The names and addresses in a field."""
    found = getaddresses([raw_field(mail, field)])
    return [(decoded(name), address) for name, address in found if name or address]


def header(mail: "Message[Any, Any]", field: str) -> str:
    """The decoded text of a field, in one line."""
    return decoded(raw_field(mail, field))


def raw_field(mail: "Message[Any, Any]", field: str) -> str:
    """The first field of that name as it stands, without line ends; "" if there is none.

    Old programs wrote letters beyond ASCII as they are, in an encoding that they did not name.
    """
    value = next((str(value) for name, value in mail.raw_items() if name.lower() == field), "")
    return decode_part(value[:MAX_FIELD_CHARS].encode("utf-8", "surrogateescape"), "utf-8")


def decoded(value: str) -> str:
    """A value whose encoded words (RFC 2047) are decoded; as it is if they are broken."""
    try:
        return clean_name(str(make_header(decode_header(value))))
    except (ValueError, LookupError):
        return clean_name(value)


def body_text(mail: "Message[Any, Any]") -> str:
    """The plain text of a mail, or else that of its HTML; attachments are left out."""
    found: dict[str, list[str]] = {"text/plain": [], "text/html": []}
    for part in mail.walk():
        kind = part.get_content_type()
        if kind in found and part.get_content_disposition() != "attachment" and part.get_filename() is None:
            found[kind].append(part_text(part, kind))
    for texts in found.values():
        text = "\n".join(texts).replace("\r\n", "\n").strip()
        if text:
            return text
    return ""


def part_text(part: "Message[Any, Any]", kind: str) -> str:
    """The text of a part, in the encoding that it names if that fits."""
    raw = cast(bytes, part.get_payload(decode=True) or b"")
    named = str(part.get_content_charset() or "utf-8")
    if kind == "text/html" and part.get_content_charset() is None:
        return "".join(html_text(decode_html(BytesIO(raw), raw)))
    text = decode_part(raw, named)
    if kind == "text/html":
        return "".join(html_text([text]))
    parameters = {name: str(part.get_param(name, "")).lower() for name in ("format", "delsp")}
    return unwrapped(text, parameters["delsp"] == "yes") if parameters["format"] == "flowed" else text


def unwrapped(text: str, delete_space: bool) -> str:
    """A text of format=flowed (RFC 3676), whose lines go on in the next one where they end with a space.

    delete_space: that space is no part of the text (DelSp=yes). Quotes of each depth flow for themselves.
    """
    parts: list[str] = []
    flows, last_depth = False, 0
    for line in text.replace("\r\n", "\n").split("\n"):
        words = line.lstrip(">")
        depth = len(line) - len(words)
        words = words.removeprefix(" ")  # which protects a line that begins with a space, > or From
        if not flows or depth != last_depth or words == SIGNATURE:
            parts += ["\n" * bool(parts), ">" * depth + " " * bool(depth and words)]
        flows, last_depth = words.endswith(" ") and words != SIGNATURE, depth
        parts.append(words[:-1] if flows and delete_space else words)
    return "".join(parts)


def decode_part(raw: bytes, named: str) -> str:
    """Decode a text in the encoding that it names, or the first other one that fits."""
    for name in (named, *OTHER_ENCODINGS):
        if is_encoding(name):
            try:
                return raw.decode(name)
            except UnicodeDecodeError:
                continue
    return raw.decode("utf-8", "replace")
