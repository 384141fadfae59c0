"""Chats as lines "Name: message": WhatsApp, Telegram, Signal, Discord; and the posts in a Twitter archive.

Example: for chunk in read_whatsapp(source): ...
A chat is a document; a message of several lines keeps them. Lines of the system (who joined, who called), and
messages without text (pictures, deleted ones), are left out and counted. Each post on Twitter is a document.
"""

import html
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

from nanogpt.errors import UserError, first_line, require
from nanogpt.text import records
from nanogpt.text.documents import Chunk, split_into_chunks
from nanogpt.text.json_formats import READ_CHARS, as_dict, as_list, decode, json_values
from nanogpt.text.options import ReadOptions
from nanogpt.text.records import (
    Beginning,
    Certainty,
    Lines,
    LongLine,
    Source,
    decode_text,
    in_blocks,
    open_text,
    utf8,
)
from nanogpt.text.speakers import DIRECTION_MARKS, clean_name
from nanogpt.text.tables import TableRows, long_fields, whole_rows
from nanogpt.units import plural

Message = tuple[str, str]
"""A name, and what it says."""


def read_chat(source: Source, messages: Iterable[Message]) -> Iterator[Chunk]:
    """Messages as one document, a line or more for each."""
    yield from split_into_chunks(in_blocks(chat_lines(source, messages)))


def chat_lines(source: Source, messages: Iterable[Message]) -> Iterator[str]:
    """The lines of messages, with the names that --speakers gives; a message without text has none."""
    for name, text in messages:
        said = text.strip()
        if said and (speaker := source.speaker(clean_name(name))) is not None:
            yield f"{speaker}: {said}\n"


# --- WhatsApp: an exported .txt ---

DAY = r"\d{1,4}[./-] ?\d{1,2}[./-] ?\d{1,4}\.?"

TIME = r"\d{1,2}[:.]\d{2}(?:[:.]\d{2})?"

WHEN = rf"{DAY}[^\d\n]{{1,15}}{TIME}[^\d\n\]-]{{0,15}}"

STAMP = re.compile(rf"(?:\[{WHEN}\] ?|{WHEN} - )(.*)", re.DOTALL)
"""The beginning of a message, in brackets on iOS. Day, month, year and the words for a.m. have any order."""

NAMED = re.compile(r"""(?:~\s?)?([^:\n"“”„«»]{1,100}):(?:\s|$)(.*)""", re.DOTALL)
"""A name and its message. Quotation marks are the system's: Anna changed the subject to "Trip: June"."""

MARK = "\u200e"
"""On iOS, the first character of what the program writes itself, such as "image omitted"."""

DELETED = (
    "This message was deleted", "You deleted this message",
    "Diese Nachricht wurde gelöscht", "Du hast diese Nachricht gelöscht",
    "Se eliminó este mensaje", "Eliminaste este mensaje", "Este mensaje fue eliminado",
    "Ce message a été supprimé", "Vous avez supprimé ce message",
    "Questo messaggio è stato eliminato", "Hai eliminato questo messaggio",
    "Mensagem apagada", "Esta mensagem foi apagada", "Você apagou esta mensagem",
    "Dit bericht is verwijderd", "U hebt dit bericht verwijderd", "Je hebt dit bericht verwijderd",
    "Данное сообщение удалено", "Вы удалили данное сообщение",
    "Bu mesaj silindi", "Bu mesaj\u0131 sildiniz",
)  # fmt: skip
"""What Android writes in place of a deleted message, in the languages that are known here; iOS marks it."""

NO_TEXT = re.compile(rf"<[^<>\n]{{1,60}}>|null|(?:{'|'.join(DELETED)})\.?")
"""What stands for a message without text. In all languages, angle brackets are a picture: <Media omitted>."""

ATTACHMENT = re.compile(r"\A[^\n]{1,200}\.\w{2,5} \([^()\n]{1,40}\)(?:\n|$)")
"""The first line of a message with a file: "IMG-20240101-WA0001.jpg (file attached)"."""

EDITED = re.compile(rf"\s?(?:{MARK}<[^<>\n]{{1,60}}>|<[^\W\d_]+(?: [^\W\d_]+){{1,6}}\.?>)$")
"""The end of a message that was changed later, in words of any language: "<This message was edited>"."""

WHATSAPP_NAME = re.compile(r"whatsapp|_chat\.txt$", re.IGNORECASE)

MIN_MESSAGES = 3
"""Messages at the start of a file that make it look like a chat."""


def read_whatsapp(source: Source) -> Iterator[Chunk]:
    """A chat exported from WhatsApp, whatever the language of the phone. Raises: UserError if it is none."""
    return read_chat(source, whatsapp_messages(source))


def whatsapp_messages(source: Source) -> Iterator[Message]:
    """The messages that have text."""
    found = left_out = 0
    for name, said in stamped_messages(source):
        found += 1
        text = ATTACHMENT.sub("", EDITED.sub("", said.strip()), count=1)
        if name and text and not NO_TEXT.fullmatch(text):
            yield name, text
        else:
            left_out += 1
    require(found > 0, "has no message with a date and a time: it is no chat exported from WhatsApp")
    if left_out:
        source.note(f"{plural(left_out, 'line')} of the system, or without text, left out")


def stamped_messages(source: Source) -> Iterator[Message]:
    """All messages, "" for the name where the system wrote. A line without a time belongs to the last."""
    lines = Lines(decode_text(source, newline=None))
    name, said = "", list[str]()
    while line := lines.read():
        if isinstance(line, LongLine):
            what = f"longer than {records.MAX_RECORD_CHARS:,} characters"
            source.report.reject(f"{source.name}:{lines.number}", what)
        elif match := STAMP.match(line.translate(DIRECTION_MARKS)):
            if said:
                yield name, "".join(said)
            name, text = split_name(line, match[1])
            said = [text]
        elif said:
            said.append(line)
    if said:
        yield name, "".join(said)


def split_name(line: str, bare: str) -> Message:
    """The name in a line, "" if the system wrote it, and what it says. bare: it without time and marks."""
    named = NAMED.match(bare)
    text = line.partition(": ")[2]
    return ("", bare) if named is None or text.startswith(MARK) else (named[1], text or named[2])


def sniff_whatsapp(beginning: Beginning) -> Certainty:
    """Whether a file begins as a chat: certainly so if its name says WhatsApp. A log can look like one."""
    lines = beginning.text.translate(DIRECTION_MARKS).splitlines()[:40]
    found = sum(STAMP.match(line) is not None for line in lines)
    if not lines or not STAMP.match(lines[0]):
        return "no"
    if WHATSAPP_NAME.search(beginning.name):
        return "certain"
    named = sum(
        (match := STAMP.match(line)) is not None and NAMED.match(match[1]) is not None for line in lines
    )
    return "likely" if found >= MIN_MESSAGES and named >= MIN_MESSAGES - 1 else "no"


# --- Telegram: result.json ---

MESSAGES = re.compile(r'"messages"\s*:\s*\[')
"""The key of a list of messages. Within a text, its quotes would be escaped."""

BETWEEN = re.compile(r"[ \t\r\n,]*")

OVERLAP_CHARS = 200


def read_telegram(source: Source) -> Iterator[Chunk]:
    """The chats in an export of Telegram: one, or all. Raises: UserError if there are none."""
    lists = MessageLists(decode_text(source).read)
    left_out: list[int] = []
    while lists.seek():
        yield from read_chat(source, telegram_messages(lists, left_out))
    require(bool(left_out), "has no messages: it is no export of Telegram")
    if count := sum(left_out):
        source.note(f"{plural(count, 'message')} of the system, or without text, left out")


class MessageLists:
    """The lists called "messages" in a JSON text, one value in memory at a time.

    read: returns the next characters, at most so many.
    """

    def __init__(self, read: Callable[[int], str]) -> None:
        self.read, self.text, self.position, self.ended = read, "", 0, False

    def read_more(self) -> None:
        """Read on, and forget what has been used."""
        self.text = self.text[self.position :]
        self.position = 0
        following = self.read(max(READ_CHARS, len(self.text)))
        self.ended = not following
        self.text += following

    def seek(self) -> bool:
        """Go to the start of the next list. Returns False if there is none."""
        while not (match := MESSAGES.search(self.text, self.position)):
            if self.ended:
                return False
            self.position = max(self.position, len(self.text) - OVERLAP_CHARS)
            self.read_more()
        self.position = match.end()
        return True

    def __iter__(self) -> Iterator[Any]:
        """The values of the list here. Raises: UserError if one is broken."""
        while True:
            start = cast(re.Match[str], BETWEEN.match(self.text, self.position)).end()
            if self.text[start : start + 1] == "]":
                self.position = start + 1
                return
            try:
                value, self.position = decode(self.text, start)
            except (ValueError, RecursionError) as error:
                if self.ended or len(self.text) - start > records.MAX_RECORD_CHARS:
                    raise UserError(f"is damaged: not JSON ({first_line(error)})") from error
                self.read_more()
                continue
            yield value


def telegram_messages(lists: MessageLists, left_out: list[int]) -> Iterator[Message]:
    """The messages among the entries of a chat. left_out: the number of other entries of each chat so far."""
    left_out.append(0)
    for value in lists:
        entry = as_dict(value)
        text = telegram_text(entry.get("text"))
        if entry.get("type") != "message" or not text.strip():
            left_out[-1] += 1
            continue
        yield str(entry.get("from") or "Deleted Account"), text


def telegram_text(text: object) -> str:
    """A text that may come in parts, some of them links or in bold."""
    parts = as_list(text) or [text]
    return "".join(part if isinstance(part, str) else str(as_dict(part).get("text") or "") for part in parts)


def sniff_telegram(beginning: Beginning) -> Certainty:
    """Whether a file is an export of Telegram: one chat, or all."""
    text = beginning.text
    one = re.search(
        r'"type"\s*:\s*"(?:personal_chat|bot_chat|saved_messages|\w+_group|\w+_supergroup|\w+_channel)"', text
    )
    every = '"personal_information"' in text and '"user_id"' in text
    return "certain" if text.lstrip().startswith("{") and ((one and MESSAGES.search(text)) or every) else "no"


# --- Signal: main.jsonl, or the data.json of signal-export ---


def read_signal(source: Source) -> Iterator[Chunk]:
    """The chats in an export of Signal, or of signal-export. Raises: UserError if there are none."""
    chats: dict[str, list[Message]] = {}
    people: dict[str, str] = {}
    lines = Lines(decode_text(source))
    owner = "Me"
    while line := lines.read():
        try:
            entry = as_dict(json.loads(line)) if line.strip() else {}
        except (ValueError, RecursionError) as error:
            source.report.reject(f"{source.name}:{lines.number}", f"not JSON ({first_line(error)})")
            continue
        if "account" in entry:
            owner = full_name(as_dict(entry["account"]), "given", "family") or owner
        elif "recipient" in entry:
            recipient = as_dict(entry["recipient"])
            people[str(recipient.get("id"))] = owner if "self" in recipient else contact_name(recipient)
        elif "chatItem" in entry:
            item = as_dict(entry["chatItem"])
            text = as_dict(as_dict(item.get("standardMessage")).get("text")).get("body")
            name = people.get(str(item.get("authorId")), "Unknown")
            chats.setdefault(str(item.get("chatId")), []).append((name, str(text or "")))
        elif "sender" in entry:
            chats.setdefault("", []).append((str(entry["sender"]), str(entry.get("body") or "")))
    require(bool(chats), "has no messages: it is no export of Signal")
    for messages in chats.values():
        yield from read_chat(source, messages)


def contact_name(recipient: dict[str, Any]) -> str:
    """The name of a recipient: the nickname first, then that in the address book, then its own."""
    contact = as_dict(recipient.get("contact"))
    names = (
        full_name(as_dict(contact.get("nickname")), "given", "family"),
        full_name(contact, "systemGiven", "systemFamily"),
        full_name(contact, "profileGiven", "profileFamily"),
        str(contact.get("username") or contact.get("e164") or "Unknown"),
    )
    return next(filter(None, names))


def full_name(record: dict[str, Any], first: str, last: str) -> str:
    """Two parts of a name; the keys may end in Name."""
    parts = [record.get(f"{part}Name") or record.get(part) for part in (first, last)]
    return " ".join(str(part) for part in parts if part)


def sniff_signal(beginning: Beginning) -> Certainty:
    """Whether a file is an export of Signal, or of signal-export: its first line shows it."""
    try:
        entry = as_dict(json.loads(beginning.text.lstrip("\ufeff").partition("\n")[0]))
    except (ValueError, RecursionError):
        return "no"
    return "certain" if "backupTimeMs" in entry or {"date", "sender", "body"} <= set(entry) else "no"


# --- Discord: the CSV of DiscordChatExporter ---

DISCORD_HEADER = re.compile(r'\ufeff?"?AuthorID"?[,;]"?Author"?[,;]"?Date"?[,;]"?Content"?[,;\r\n]')

TAG = re.compile(r"#\d{1,4}$")
"""The number after a name on Discord."""


def read_discord(source: Source) -> Iterator[Chunk]:
    """A channel in the CSV of DiscordChatExporter. Raises: UserError if a column is missing."""
    return read_chat(source, discord_messages(source))


def discord_messages(source: Source) -> Iterator[Message]:
    """The messages of a channel."""
    options = ReadOptions(text_field="Content")
    with long_fields():
        rows = TableRows(Lines(open_text(source)), replace(source, options=options))
        (said,) = rows.read_header(",").values()
        require("Author" in rows.names, "has no column 'Author': it is no export of DiscordChatExporter")
        author = rows.names.index("Author")
        for _, row in whole_rows(rows, source):
            yield TAG.sub("", row[author]), row[said]


def sniff_discord(beginning: Beginning) -> Certainty:
    """Whether a file is a CSV of DiscordChatExporter: its header shows it."""
    return "certain" if DISCORD_HEADER.match(beginning.text) else "no"


# --- Twitter: the files of an archive ---

ARCHIVE_FILE = re.compile(r"\ufeff?\s*window\.YTD\.(\w+)\.part\d+\s*=\s*")

POSTS = ("tweets", "tweet")
"""The parts of an archive that hold posts."""


def read_twitter(source: Source) -> Iterator[Chunk]:
    """The posts in tweets.js, each a document; other files of an archive have none. Reposts are left out."""
    text = decode_text(source)
    beginning = text.read(READ_CHARS)
    match = ARCHIVE_FILE.match(beginning)
    require(match is not None, "does not begin with window.YTD: it is no file of a Twitter archive")
    assert match is not None
    if match[1] not in POSTS:
        source.note(f"no posts in this part of a Twitter archive ({match[1]}): left out")
        return
    reposts = 0
    for where, value in json_values(source, text.read, beginning[match.end() :]):
        post = as_dict(value)
        post = as_dict(post.get("tweet", post))
        said = post.get("full_text", post.get("text"))
        if not isinstance(said, str):
            source.report.reject(where, "a post without text")
        elif said.startswith("RT @"):
            reposts += 1
        else:
            yield from split_into_chunks([utf8(post_text(said, as_dict(post.get("entities"))))])
    if reposts:
        source.note(f"{plural(reposts, 'repost')} (RT @...) left out: others wrote them")


def post_text(text: str, entities: dict[str, Any]) -> str:
    """The text of a post with its links in full, without those to its own pictures."""
    for kind, key in (("urls", "expanded_url"), ("media", "")):
        for link in as_list(entities.get(kind)):
            short, full = as_dict(link).get("url"), as_dict(link).get(key, "")
            if isinstance(short, str) and short and isinstance(full, str):
                text = text.replace(short, full)
    return html.unescape(text).strip()


def sniff_twitter(beginning: Beginning) -> Certainty:
    """Whether a file belongs to a Twitter archive."""
    return "certain" if ARCHIVE_FILE.match(beginning.text) else "no"
