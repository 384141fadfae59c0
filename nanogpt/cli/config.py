"""The settings of the commands `model`, `presets` and `plan`.

This file knows nothing of torch, or of how flags are parsed.
"""

from dataclasses import dataclass

from nanogpt.config import GPTConfig, TrainConfig, at_least
from nanogpt.settings import Settings


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
