"""The settings of the commands `model`, `presets`, `plan`, `sweep`, `runs`, `info` and `eval`.

Knows nothing of torch, or of how flags are parsed.
"""

from dataclasses import dataclass
from typing import Literal

from nanogpt.config import Dtype, GPTConfig, TrainConfig, at_least
from nanogpt.data.config import check_input_format
from nanogpt.errors import require
from nanogpt.inference.config import Quantization, UnknownCharacters
from nanogpt.settings import Settings
from nanogpt.text.options import ReadOptions


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
    """Predict the memory and the time of a training with these settings, and what makes it fit."""

    on: str = ""
    """Device to plan for (h100, a100, rtx4090, ...); default: that of this machine."""
    processes: int = 1
    """Number of processes, with one device each."""
    vocab_size: int | None = None
    """Size of the vocabulary; None: that of the data folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "processes", 1)
        at_least(self, "vocab_size", 1)


@dataclass(frozen=True)
class SweepConfig(TrainConfig):
    """Train every combination of some settings, several at a time, and compare the results."""

    vary: tuple[str, ...] = ()
    """A setting and its values, as learning_rate=1e-3,3e-3; several of them: every combination."""
    jobs: int = 1
    """Trainings at a time; they share the CPU cores."""
    out_dir: str = "sweep"
    """Folder of the sweep, with a run folder and a log for each training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "jobs", 1)
        for name in ("resume", "overwrite"):
            require(
                not getattr(self, name),
                f"--{name} is not for a sweep: the same command goes on where it was; for a new one, give "
                "another --out_dir",
            )


@dataclass(frozen=True)
class RunsConfig(Settings):
    """Print a table of the runs in a folder: the settings in which they differ, and their losses."""

    path: str = "sweep"
    """The folder in which the run folders are."""
    picture: str | None = None
    """PNG file in which to draw the losses."""
    csv: bool = False
    """Print CSV, a line for each run."""
    json: bool = False
    """Print one JSON object instead of lines."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not (self.csv and self.json), "--csv and --json are two forms of one table: leave one out")
        require(
            self.picture is None or self.picture.lower().endswith(".png"),
            f"--picture {self.picture} is no name of a PNG file: end it in .png",
        )


@dataclass(frozen=True)
class InfoConfig(Settings):
    """Describe a checkpoint, run, data folder or export, or compare two of them."""

    path: str = "out"
    """The file or folder."""
    diff: tuple[str, ...] = ()
    """Compare two files or folders instead: settings, tokenizer, data, and each weight."""
    verify: bool = False
    """Verify all checksums, for which every byte is read."""
    json: bool = False
    """Print one JSON object instead of lines."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = len(self.diff)
        require(given in (0, 2), f"--diff takes two files or folders, and {given} is given: --diff A B")


@dataclass(frozen=True)
class SubjectConfig(Settings):
    """The checkpoints to evaluate, and the text."""

    checkpoint: str = "out/ckpt.pt"
    """The checkpoint to evaluate; everything needed is inside it."""
    against: str | None = None
    """Another checkpoint to compare it with, on the same text."""
    input_file: tuple[str, ...] = ()
    """The text: files, folders, globs, addresses, - for standard input. Without it: a split of data_dir."""


@dataclass(frozen=True)
class EvaluateConfig(ReadOptions, SubjectConfig):  # the flags of the last base are the first in --help
    """Measure the loss of a checkpoint on any text, alone or against another checkpoint."""

    data_dir: str = "data"
    """Folder with the prepared data."""
    split: Literal["val", "train"] | None = None
    """Which split of data_dir to evaluate on; None: val, unless input_file is given."""
    context: int | None = None
    """Tokens that the model sees at once, in a window of the text; None: the model's block_size."""
    stride: int | None = None
    """Tokens by which the window moves: a smaller stride gives each token more context. None: context."""
    unknown: UnknownCharacters = "error"
    """What to do with characters of the text that the model has never seen: name them, or skip them."""
    picture: str | None = None
    """PNG file in which to draw the loss by position in the context."""
    json: bool = False
    """Print one JSON object instead of lines."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    dtype: Dtype = "auto"
    """float32, bfloat16 or float16; auto: that of the training, if it is fast on this device."""
    quantize: Quantization = "none"
    """int8: evaluate with 8-bit weights, as sample --quantize has them; those of --against stay unchanged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("context", "stride"):
            at_least(self, name, 1)
        check_input_format(self.input_format)
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
