"""The settings of `data.py` and of `nanogpt data info`: frozen dataclasses, each default written once.

Example: config = PrepareConfig(input_file=("book.txt",), tokenizer="bpe", vocab_size=1000)
cli/main.py turns each field into a flag of the same name; the text under a field is its help. Imports no
PyTorch.
"""

from dataclasses import dataclass
from typing import Literal

from nanogpt.config import at_least
from nanogpt.errors import require
from nanogpt.settings import Settings, unescape
from nanogpt.text.addresses import without_secrets
from nanogpt.text.documents import AUTO_FORMAT, DEFAULT_TEXT_FIELD, PairFields
from nanogpt.text.options import ReadOptions

SplitKind = Literal["tail", "documents"]


@dataclass(frozen=True)
class SplitConfig(Settings):
    """The texts, how they are split, and into which tokens."""

    input_file: tuple[str, ...] = ()
    """Your texts: files, folders, globs, addresses, - for standard input; without it, Tiny Shakespeare."""
    data_dir: str = "data"
    """Folder for the prepared data."""
    train_split: float = 0.9
    """Fraction of the text to train on, from its start; the rest is for validation."""
    split: SplitKind = "tail"
    """How to choose the validation split: the tail of the text, or whole documents, by a hash of each."""
    val_file: tuple[str, ...] = ()
    """Separate texts for validation; then all of input_file is for training."""
    tokenizer: str = "char"
    """What a token is: char, byte, bpe (learned from your text), gpt2, or a path: tokenizer.json, ckpt.pt."""
    vocab_size: int = 4096
    """Number of tokens that bpe learns."""


@dataclass(frozen=True)
class PrepareConfig(ReadOptions, SplitConfig):  # the flags of the last base are the first in --help
    """Turn texts into token files: train.pt, val.pt and vocab.pt in the data folder."""

    prompt_field: str | None = None
    """Pairs instead of texts: the field with the prompt, whose tokens do not count for the loss."""
    completion_field: str | None = None
    """Pairs instead of texts: the field with the completion, whose tokens are the only ones that count."""
    separator: str = "\\n"
    """Text between prompt and completion (\\n and \\t are understood); end a prompt with it when sampling."""
    shard_tokens: int | None = None
    """Cut each split into files of at most this many tokens; None: one file."""
    strict: bool = False
    """Stop at the first broken record instead of reporting it and going on."""
    overwrite: bool = False
    """Replace a different data set that is already in the folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < self.train_split < 1,
            f"--train_split {self.train_split} is outside (0, 1): try 0.9",
        )
        require(
            not self.val_file or self.split == "tail",
            "--split documents and --val_file both say what validates: give one of them",
        )
        require(
            (self.prompt_field is None) == (self.completion_field is None),
            "--prompt_field and --completion_field belong together: give both",
        )
        both = "two ways to read a record: leave one out"
        require(
            self.pair is None or self.text_field == DEFAULT_TEXT_FIELD,
            f"--text_field {self.text_field} and --prompt_field {self.prompt_field} are {both}",
        )
        require(
            (self.input_file + self.val_file).count("-") <= 1,
            "- is given twice, but there is one standard input: save it to a file first",
        )
        if self.tokenizer != PrepareConfig.tokenizer:  # for the default, --help need not import NumPy
            from nanogpt.tokenizer.registry import check_name

            check_name(self.tokenizer, self.vocab_size)
        check_input_format(self.input_format)
        at_least(self, "shard_tokens", 1)

    @property
    def pair(self) -> PairFields | None:
        """The fields of a pair; None: documents are texts."""
        if self.prompt_field is None or self.completion_field is None:
            return None
        return PairFields(self.prompt_field, self.completion_field, unescape(self.separator))

    @property
    def source(self) -> str:
        """The texts, for messages."""
        return first_few(self.input_file)

    @property
    def val_source(self) -> str:
        """The separate texts for validation, for messages."""
        return first_few(self.val_file)


def check_input_format(name: str) -> None:
    """Raise UserError if --input_format names none."""
    if name != AUTO_FORMAT:  # for the default, --help need not import every format
        from nanogpt.text.formats import check_format

        check_format(name)


def first_few(names: tuple[str, ...]) -> str:
    """The first three names, for messages."""
    return ", ".join([*map(without_secrets, names[:3]), *(["..."] if len(names) > 3 else [])])


@dataclass(frozen=True)
class InspectConfig(Settings):
    """Describe a prepared data folder: counts, tokens, document lengths, a picture."""

    data_dir: str = "data"
    """The folder."""
