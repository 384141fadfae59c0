"""The settings of the commands `model`, `presets`, `plan` and `eval`.

This file knows nothing of torch, or of how flags are parsed.
"""

from dataclasses import dataclass
from typing import Literal

from nanogpt.config import Dtype, GPTConfig, TrainConfig, at_least
from nanogpt.data.config import check_reading
from nanogpt.errors import require
from nanogpt.inference.config import Quantization, UnknownCharacters
from nanogpt.settings import Settings
from nanogpt.text.documents import AUTO_FORMAT, DEFAULT_TEXT_FIELD


@dataclass(frozen=True)
class ModelSummaryConfig(GPTConfig):
    """Print what a model of this shape costs: parameters, memory, floating-point operations."""

    preset: str | None = None
    """Preset whose shape to start from (`nanogpt presets` lists them)."""


@dataclass(frozen=True)
class PresetsConfig(Settings):
    """List the presets: size, measured loss and training time of each."""


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Plan a training with these settings: its memory, its time, and what makes it fit."""

    on: str = ""
    """Name of the device to plan for (h100, a100, rtx4090, ...); default: this machine's."""
    processes: int = 1
    """Number of processes, with one device each."""
    vocab_size: int | None = None
    """Size of the vocabulary; None: that of the data folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "processes", 1)
        at_least(self, "vocab_size", 1)


@dataclass(frozen=True)
class InfoConfig(Settings):
    """Say what a checkpoint, run, data folder or export is, or what differs between two."""

    path: str = "out"
    """The file or folder."""
    diff: tuple[str, ...] = ()
    """Two files or folders to compare instead: settings, tokenizer, data, and weight by weight."""
    verify: bool = False
    """Compare all of it with its checksums; weights are read for that."""
    json: bool = False
    """Print one JSON object instead of lines."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = len(self.diff)
        require(given in (0, 2), f"--diff takes two files or folders, and {given} is given: --diff A B")


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """Measure the loss of a checkpoint on any text, alone or against another checkpoint."""

    checkpoint: str = "out/ckpt.pt"
    """The checkpoint to evaluate; everything needed is inside it."""
    against: str | None = None
    """Another checkpoint to compare it with, on the same text."""
    input_file: tuple[str, ...] = ()
    """The text: files, folders, globs, addresses, - for standard input. Without it: a split of data_dir."""
    text_field: str = DEFAULT_TEXT_FIELD
    """Which field of a JSON record, or column of a table, is the text; dots lead into nested records."""
    input_format: str = AUTO_FORMAT
    """How to read the files, as data.py does: auto, text (as they are), html, mbox, whatsapp, ..."""
    speakers: tuple[str, ...] = ()
    """Names in chats and mail, as data.py has them: "Anna Müller=Anna" renames, "Bot=" leaves out."""
    data_dir: str = "data"
    """Folder with the prepared data."""
    split: Literal["val", "train"] | None = None
    """Which split of data_dir to evaluate on; None: val, unless input_file is given."""
    context: int | None = None
    """Tokens of a window of the text, all that the model sees at once; None: the model's block_size."""
    stride: int | None = None
    """Tokens by which the window moves on; only the last so many in it count. None: context."""
    unknown: UnknownCharacters = "error"
    """What to do with characters of the text that the model has never seen: name them, or skip them."""
    picture: str | None = None
    """PNG file to draw the loss by position in the context to."""
    json: bool = False
    """Print one JSON object instead of lines."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    dtype: Dtype = "auto"
    """float32, bfloat16 or float16; auto: as in the training, where the device multiplies that fast."""
    quantize: Quantization = "none"
    """int8: weights of 8 bits, as sample --quantize has them. Those of --against stay as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("context", "stride"):
            at_least(self, name, 1)
        check_reading(self.input_format, self.speakers)
        require(
            not self.input_file or self.split is None,
            f"--input_file and --split {self.split} are two texts: leave one out",
        )
        require(
            self.input_file.count("-") <= 1,
            "- is given twice, but there is one standard input: save it to a file first",
        )
        require(
            self.picture is None or self.picture.lower().endswith(".png"),
            f"--picture {self.picture} is no name of a PNG file: end it in .png",
        )
