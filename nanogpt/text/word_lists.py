"""The lists of a Word file: the bullet or the number that stands before a paragraph and is not in its text.

Example: lists = WordLists()
         for _ in parse_xml(numbering_xml, lists.start): ...
         lists.marker({"numId": "3", "ilvl": "1"})  # "b) "
A paragraph, or its style, names a list (numId) and a level of it (ilvl). A list takes its levels from a
definition (abstractNum), and counts on where the last list of that definition stopped. What a file says is
bounded: it may be made to exhaust the machine.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from nanogpt.text.markup import BULLET, local

MAX_MARKER_CHARS, MAX_LEVELS, MAX_LISTS = 32, 32, 10_000
"""Longest number before a paragraph; levels of a list, and lists, definitions and styles, that are read."""

MAX_STYLES = 16
"""How many styles may be based on one another."""

ROMAN = (
    *((1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"), (40, "xl")),
    *((10, "x"), (9, "ix"), (5, "v"), (4, "iv"), (1, "i")),
)

MAX_ROMAN, MAX_LETTERS = 3999, 26 * 4
"""Larger numbers are written in digits."""


@dataclass
class Level:
    """A level of a list. form: how its numbers are written. text: the marker, with %1 for that of level 0."""

    first: int = 1
    form: str = "decimal"
    text: str = ""


@dataclass
class Definition:
    """A definition of lists. counts: the number of the last paragraph of each level."""

    levels: dict[int, Level] = field(default_factory=dict[int, Level])
    counts: dict[int, int] = field(default_factory=dict[int, int])


@dataclass
class WordList:
    """A list. restarts: the first number on each level that does not count on; gone once it was used."""

    definition: str = ""
    restarts: dict[int, int] = field(default_factory=dict[int, int])


@dataclass
class Style:
    """A style of paragraphs. base: the style that it is based on. properties: numId and ilvl."""

    base: str = ""
    properties: dict[str, str] = field(default_factory=dict[str, str])


class WordLists:
    """The lists of a file, from the tags of numbering.xml and styles.xml."""

    def __init__(self) -> None:
        self.definitions: dict[str, Definition] = {}
        self.lists: dict[str, WordList] = {}
        self.styles: dict[str, Style] = {}
        self.definition, self.level, self.list, self.style = Definition(), Level(), WordList(), Style()
        """What the tags are within."""
        self.level_number = 0

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        """An element begins."""
        values = {local(name): value for name, value in attributes.items()}
        if tag in ("lvl", "lvlOverride"):
            self.begin_level(tag, bounded(values.get("ilvl", ""), 0))
        elif "val" in values:
            self.say(tag, values["val"])
        elif tag == "abstractNum" and len(self.definitions) < MAX_LISTS:
            self.definition = self.definitions.setdefault(values.get("abstractNumId", ""), Definition())
        elif tag == "num" and len(self.lists) < MAX_LISTS:
            self.list, self.definition = WordList(), Definition()
            self.lists.setdefault(values.get("numId", ""), self.list)
        elif tag == "style" and len(self.styles) < MAX_LISTS:
            self.style = self.styles.setdefault(values.get("styleId", ""), Style())
            self.level = Level()  # a style has no levels, but borders, whose start is another

    def begin_level(self, tag: str, number: int) -> None:
        """A level begins: in a definition, or in a list that changes it."""
        self.level, self.level_number = Level(), number
        if tag == "lvl" and number < MAX_LEVELS:
            self.definition.levels.setdefault(number, self.level)

    def say(self, tag: str, value: str) -> None:
        """An element says something of what it is within."""
        if tag == "start":
            self.level.first = bounded(value, 1)
        elif tag == "numFmt":
            self.level.form = value[:MAX_MARKER_CHARS]
        elif tag == "lvlText":
            self.level.text = value[:MAX_MARKER_CHARS]
        elif tag == "abstractNumId":
            self.list.definition = value
        elif tag == "startOverride" and self.level_number < MAX_LEVELS:
            self.list.restarts[self.level_number] = bounded(value, 1)
        elif tag == "basedOn":
            self.style.base = value
        elif tag in ("numId", "ilvl"):
            self.style.properties[tag] = value

    def marker(self, properties: Mapping[str, str]) -> str:
        """What stands before the next paragraph: "- ", a number such as "2.1. ", or "".

        properties: numId and ilvl of the paragraph, and its style (pStyle); each may be missing.
        """
        found = {**self.style_properties(properties.get("pStyle", "")), **properties}
        of = self.lists.get(found.get("numId", "0"))
        if of is None:
            return ""
        definition, number = (
            self.definitions.get(of.definition, Definition()),
            bounded(found.get("ilvl", ""), 0),
        )
        level = definition.levels.get(number)
        if level is None or level.form == "bullet":
            return BULLET
        counts = definition.counts
        counts[number] = of.restarts.pop(number, counts.get(number, level.first - 1) + 1)
        for deeper in [one for one in counts if one > number]:
            del counts[deeper]
        shown = re.sub(r"%(\d)", lambda part: self.number(definition, int(part[1]) - 1), level.text).strip()
        return f"{shown[:MAX_MARKER_CHARS]} " if shown and level.form != "none" else ""

    def style_properties(self, name: str) -> dict[str, str]:
        """The properties of a style and of those that it is based on."""
        found: dict[str, str] = {}
        for _ in range(MAX_STYLES):
            style = self.styles.get(name)
            if style is None:
                break
            found = {**style.properties, **found}
            name = style.base
        return found

    def number(self, definition: Definition, number: int) -> str:
        """The number of a level, as it is written."""
        level = definition.levels.get(number, Level())
        return written(definition.counts.get(number, level.first), level.form)


def bounded(text: str, default: int) -> int:
    """A whole number from 0 to a million; the default if it is none."""
    return int(text) if text.isdecimal() and len(text) < 7 else default


def written(number: int, form: str) -> str:
    """A number as Word writes it: 3, c, C, iii or III. Other forms, such as "third", are digits."""
    text = str(number)
    if form in ("lowerLetter", "upperLetter") and 0 < number <= MAX_LETTERS:
        text = chr(ord("a") + (number - 1) % 26) * ((number - 1) // 26 + 1)
    elif form in ("lowerRoman", "upperRoman") and 0 < number <= MAX_ROMAN:
        text = ""
        for value, letters in ROMAN:
            text += letters * (number // value)
            number %= value
    return text.upper() if form.startswith("upper") else text
