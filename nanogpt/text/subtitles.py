"""Subtitles (.srt, .vtt) as text: what is said, a line for each subtitle, without numbers and times.

Example: for chunk in read_subtitles(source): ...
"""

import html
import re
from collections.abc import Iterator

from nanogpt.text.documents import Chunk, split_into_chunks
from nanogpt.text.records import Beginning, Certainty, Lines, Source, decode_text, in_blocks

TIMES = re.compile(r"\s*(?:\d+:)?\d{1,2}:\d{2}[.,]\d{1,3}\s*-->\s*(?:\d+:)?\d{1,2}:\d{2}[.,]\d{1,3}")

TIMED_WORD = re.compile(r"<(?:\d+:)?\d{2}:\d{2}\.\d{3}>")
"""The time of a word. Live captions have them, and repeat each line above the next one."""

VOICE = re.compile(r"<v(?:\.[^\s<>]{0,100})?\s{1,9}([^<>]{1,200})>")

TAGS = re.compile(r"</?[A-Za-z][^<>]{0,200}>|<[\d:.]{5,12}>|\{\\[^{}]{0,200}\}")
"""HTML's and WebVTT's tags, and the positions of Advanced SubStation Alpha, which are found in .srt files."""

NEW_SPEAKER = ("-", "\u2013", "\u2014")
"""Beginnings of a line of dialogue."""


def read_subtitles(source: Source) -> Iterator[Chunk]:
    """What is said, as one document."""
    yield from split_into_chunks(in_blocks(f"{line}\n" for line in spoken_lines(source)))


def sniff_subtitles(beginning: Beginning) -> Certainty:
    """Whether a file begins with the times of a subtitle: likely subtitles, under another name."""
    lines = beginning.text.lstrip("\ufeff\r\n ").splitlines()[:2]
    found = beginning.text.startswith("WEBVTT") or (
        len(lines) == 2 and lines[0].isdigit() and TIMES.match(lines[1])
    )
    return "likely" if found else "no"


def cues(source: Source) -> Iterator[list[str]]:
    """The lines of each subtitle."""
    lines = Lines(decode_text(source, newline=None))
    cue: list[str] | None = None
    while line := lines.read():
        if TIMES.match(line):
            if cue:
                yield cue[:-1] if cue[-1].isdigit() else cue  # no empty line before the next number
            cue = []
        elif not line.strip():
            if cue:
                yield cue
            cue = None
        elif cue is not None:
            cue.append(line.strip())
    if cue:
        yield cue


def spoken_lines(source: Source) -> Iterator[str]:
    """What is said, line by line. The lines of a subtitle are joined, but for each new speaker."""
    last = ""
    live = False
    for cue in cues(source):
        live = live or any(TIMED_WORD.search(line) for line in cue)
        said = ""
        for raw in cue:
            line = spoken(raw, source)
            if not line or (live and line == last):
                continue
            if live:
                last = line
            said += ("\n" if line.startswith(NEW_SPEAKER) or VOICE.search(raw) else " ") + line
        if said:
            yield said[1:]


def spoken(raw: str, source: Source) -> str:
    """A line without tags, after the name of its speaker if it has one; "" if --speakers leaves it out."""
    voice = VOICE.search(raw)
    text = html.unescape(TAGS.sub("", raw)).strip()
    if not voice or not text:
        return text
    name = source.speaker(html.unescape(voice[1]).strip())
    return "" if name is None else f"{name}: {text}"
