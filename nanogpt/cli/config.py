"""The settings of the commands that belong to no other package: `model`, `presets` and `plan`.

Knows nothing of torch, nor of how a flag is typed.
"""

from dataclasses import dataclass

from nanogpt.config import GPTConfig, TrainConfig, at_least
from nanogpt.settings import Settings


@dataclass(frozen=True)
class ModelSummaryConfig(GPTConfig):
    """Print what a model of this shape costs: parameters, memory, arithmetic."""

    preset: str | None = None
    """Start from a preset's shape (`nanogpt presets` lists them)."""


@dataclass(frozen=True)
class PresetsConfig(Settings):
    """List the presets: size, measured loss and training time of each."""


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Say what a training with these settings will take: memory, time, what fits."""

    on: str = ""
    """A device by name (h100, a100, rtx4090, ...); without it, this machine's."""
    processes: int = 1
    """How many of them."""
    vocab_size: int | None = None
    """Number of different tokens; None: that of the data folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "processes", 1)
        at_least(self, "vocab_size", 1)
