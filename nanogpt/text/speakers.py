"""The names in chats, mail and subtitles, renamed or left out: --speakers.

Example: speakers = Speakers.parse(["Anna Müller=Anna", "Bot=", "*=Somebody"])
         rule = speakers.rule_for("Anna Müller"); speakers.renames[rule]  # Anna
Knows no format: a reader asks it for the name of each message (text/records.py: Source.speaker).
"""

import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from nanogpt.errors import UserError, require
from nanogpt.units import plural

ALL_OTHERS = "*"
"""The name, in a rule, of everybody who has no rule of their own."""

MAX_LISTED = 8
"""Names that a message lists."""

DIRECTION_MARKS = dict.fromkeys((0x200E, 0x200F, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A)))
"""Invisible characters that chat programs put around names and numbers."""


@dataclass(frozen=True)
class Speakers:
    """Rules for names. renames: the new name for each name, "" to leave out what it says."""

    renames: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def parse(cls, rules: Sequence[str]) -> "Speakers":
        """Parse rules such as "Anna Müller=Anna" and "Bot=". Raises: UserError if one is no such rule."""
        renames: dict[str, str] = {}
        for rule in rules:
            old, sign, new = rule.partition("=")
            name = clean_name(old)
            require(
                bool(sign and name),
                f'--speakers "{rule}" is no rule: write "{name or "Anna"}=Ann" to rename somebody, '
                f'"{name or "Anna"}=" to leave out what they say',
            )
            require(name not in renames, f'--speakers has two rules for "{name}": give one')
            renames[name] = clean_name(new)
        return cls(renames)

    def rule_for(self, name: str, address: str = "") -> str | None:
        """The name in the rule for somebody, by name or by address; None if there is no rule."""
        return next((key for key in (name, address, ALL_OTHERS) if key in self.renames), None)

    def rename(self, name: str, address: str = "") -> str | None:
        """The new name of somebody, the address if there is no name; None if they are left out."""
        rule = self.rule_for(name, address)
        return name or address if rule is None else self.renames[rule] or None


def clean_name(name: str) -> str:
    """A name in one line, without invisible marks, each letter in its composed form (NFC)."""
    return unicodedata.normalize("NFC", " ".join(name.translate(DIRECTION_MARKS).split()))


def speaker_notes(found: "Counter[str]") -> tuple[str, ...]:
    """A line on who wrote how many messages, if there are any."""
    if not found:
        return ()
    listed = [f"{name} ({count:,})" for name, count in found.most_common(MAX_LISTED)]
    more = len(found) - len(listed)
    rest = f" and {plural(more, 'other')}" if more else ""
    first = next(iter(found.most_common(1)))[0]
    return (
        f'Messages by {", ".join(listed)}{rest} (--speakers "{first}=Name" renames, "{first}=" leaves out)',
    )


def require_known(rules: Sequence[str], used: Collection[str], found: "Counter[str]") -> None:
    """Raise UserError for a rule about somebody who wrote no message: a name may be misspelled."""
    unknown = [name for name in Speakers.parse(rules).renames if name not in used and name != ALL_OTHERS]
    if not unknown:
        return
    if not found:
        raise UserError(f'--speakers "{unknown[0]}=...": there is no chat or mail among the texts')
    listed = ", ".join(f'"{name}"' for name, _ in found.most_common(MAX_LISTED))
    more = ", ..." if len(found) > MAX_LISTED else ""
    raise UserError(f'--speakers "{unknown[0]}=...": nobody has that name, the names are {listed}{more}')
