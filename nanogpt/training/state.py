"""The state of a training: what a checkpoint saves and restores.

Example: checkpointer.save(state)        # a Run (training/run.py) is a TrainState with everything around it
"""

from dataclasses import dataclass

import torch

from nanogpt.checkpoint.format import Progress
from nanogpt.config import TrainConfig
from nanogpt.data.dataset import Dataset
from nanogpt.distributed.world import World
from nanogpt.machine.precision import DtypeChoice
from nanogpt.model.gpt import GPT


@dataclass(kw_only=True)
class TrainState:
    """Weights, optimizers and progress, with the settings and the data that they belong to."""

    config: TrainConfig
    world: World
    dataset: Dataset
    device: torch.device
    precision: DtypeChoice
    """The dtype of the model's matrix products, and why."""
    muon_precision: DtypeChoice
    """The dtype of Muon's matrix products, and why."""
    model: GPT
    ema_model: GPT | None
    """The moving average of the model's weights, if config.ema_decay asks for one."""
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    progress: Progress
    num_micro_batches: int = 1
    """Number of micro-batches into which this process splits its share of a batch."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's matrix products; weights are float32."""
        return self.precision.dtype
