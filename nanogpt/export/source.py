"""What an exporter gets: the checkpoint, its tokenizer, the curve of its run; and weights in another dtype.

Example: source = TrainedModel("shakespeare", load_checkpoint(path), tokenizer)
         for name, weight in source.weights.items(): to_dtype(name, weight, "f16")
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nanogpt.checkpoint.format import Checkpoint
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.data.dataset import Dataset
from nanogpt.errors import require
from nanogpt.tokenizer.base import Tokenizer

TORCH_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""Values of --dtype that PyTorch has."""

UNNAMED = "MODEL"
"""What an export calls the model that a fine-tuning started from: its name may be a folder."""

Advance = Callable[[int], None]
"""Called with the number of weights exported since the last call."""


class Evaluation(NamedTuple):
    """An evaluation of a run, by its loss over the validation split."""

    step: int
    loss: float
    """Nats per token."""
    bits_per_byte: float | None = None


@dataclass(frozen=True)
class TrainedModel:
    """A model to export."""

    name: str
    """Name of the export, for people."""
    saved: Checkpoint
    tokenizer: Tokenizer
    curve: Sequence[Evaluation] = ()
    """The evaluations up to the checkpoint; empty if they are not known."""
    data: Dataset | None = None
    """The data of the training, if it is still there."""

    @property
    def config(self) -> GPTConfig:
        """The architecture."""
        return self.saved.model_config

    @property
    def train_config(self) -> TrainConfig:
        """The settings of the training, with UNNAMED for the model that it started from."""
        config = self.saved.train_config
        return config if config.init_from is None else replace(config, init_from=UNNAMED)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights for inference by name; a head that is tied to the embedding is left out."""
        tied = self.config.tied
        return {name: w for name, w in self.saved.weights.items() if not (tied and name == "head.weight")}

    @property
    def step(self) -> int:
        """Number of updates."""
        return int(self.saved.progress["step"])

    @property
    def val_loss(self) -> float | None:
        """The lowest validation loss of the run, in nats per token; None if there is none."""
        loss = float(self.saved.progress.get("best_val_loss", math.inf))
        return loss if math.isfinite(loss) else None

    @property
    def is_best(self) -> bool:
        """Whether val_loss is that of these weights, and not of earlier ones."""
        progress = self.saved.progress
        return progress.get("evaluated_at") == self.step and not progress.get("worse_evaluations")

    @property
    def num_weights(self) -> int:
        """Number of weights."""
        return sum(weight.numel() for weight in self.weights.values())


def to_dtype(name: str, weight: Tensor, dtype: str) -> Tensor:
    """A weight in a value of TORCH_DTYPES, contiguous. Raises: UserError if one is too large for it."""
    cast = weight.detach().to(TORCH_DTYPES[dtype]).contiguous()
    require(
        bool(cast.isfinite().all()) or not bool(weight.isfinite().all()),
        f"--dtype {dtype} cannot hold the weights of {name}, which reach {weight.abs().max():g}: "
        "use --dtype f32 or bf16",
    )
    return cast
