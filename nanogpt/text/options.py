"""How to read texts: the options that `data.py` and `nanogpt eval` have in common, handed down as one value.

Example: find_corpus(["chat.txt"], ReadOptions(input_format="whatsapp", speakers=("Anna Müller=Anna",)))
The configs of both commands inherit from ReadOptions, so a field here is a flag of both. The function in this
package that uses the option finds it in `source.options`. Knows neither files nor formats.
"""

from dataclasses import dataclass
from functools import cached_property

from nanogpt.settings import Settings
from nanogpt.text.documents import AUTO_FORMAT, DEFAULT_TEXT_FIELD, PairFields
from nanogpt.text.encoding import DETECT, check_encoding
from nanogpt.text.speakers import Speakers


@dataclass(frozen=True)
class ReadOptions(Settings):
    """How to read texts. Raises: UserError if one is wrong; text/formats.py checks the format's name."""

    text_field: str = DEFAULT_TEXT_FIELD
    """Which field of a JSON record, or column of a table, is the text; dots lead into nested records."""
    input_format: str = AUTO_FORMAT
    """How to read the files: auto (by name and content), text (as they are), html, mbox, whatsapp, ..."""
    encoding: str = DETECT
    """Encoding of files that are not UTF-8 and have no mark: auto (detected), cp1252, koi8-r, ..."""
    speakers: tuple[str, ...] = ()
    """Names in chats and mail: "Anna Müller=Anna" renames, "Bot=" leaves out, "*=..." is for all others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_encoding(self.encoding)
        Speakers.parse(self.speakers)

    @cached_property
    def speaker_rules(self) -> Speakers:
        """The rules in `speakers`, parsed."""
        return Speakers.parse(self.speakers)

    @property
    def pair(self) -> PairFields | None:
        """The fields that are read in place of text_field; None, as here: documents are texts, not pairs."""
        return None

    @property
    def has_fields(self) -> bool:
        """Whether a flag names a field of a record."""
        return self.pair is not None or self.text_field != DEFAULT_TEXT_FIELD

    @property
    def fields(self) -> dict[str, str]:
        """Flag -> the field that it names: that of the text, or those of a pair."""
        if self.pair is None:
            return {"--text_field": self.text_field}
        return {"--prompt_field": self.pair.prompt, "--completion_field": self.pair.completion}


DEFAULT_OPTIONS = ReadOptions()
"""Texts as they are read without a flag."""
