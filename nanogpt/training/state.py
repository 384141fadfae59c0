"""A training run in memory: everything that it holds.

Use:    run = set_up(config, RunFolder(Path("out")))        in training/setup.py
training/checkpointing.py writes it and reads it back, trainer.py moves it.
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt.checkpoint.format import Checkpoint, Progress
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.config import TrainConfig
from nanogpt.cores import CoreWatch
from nanogpt.data.batches import BatchLoader, BatchSampler
from nanogpt.data.dataset import Dataset
from nanogpt.device import DeviceKind, Event, kind_of
from nanogpt.distributed.world import World
from nanogpt.model.gpt import GPT, flops_per_token
from nanogpt.precision import DtypeChoice
from nanogpt.training.memory_estimate import Memory
from nanogpt.training.metrics import ConsoleSink, Metrics


@dataclass
class Pace:
    """How fast the run is, from the training steps alone (no evaluation, saving or compiling).

    The totals leave out the first step, which is slower than all others.
    """

    steps: int = -1
    seconds: float = 0.0
    window_steps: int = 0
    window_seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one step."""
        self.steps += 1
        self.seconds += seconds if self.steps else 0.0
        self.window_steps += 1
        self.window_seconds += seconds

    def take_window(self) -> float:
        """Seconds a step since the last call, NaN if there was none."""
        pace = self.window_seconds / self.window_steps if self.window_steps else float("nan")
        self.window_steps, self.window_seconds = 0, 0.0
        return pace


@dataclass(frozen=True)
class Outcome:
    """The numbers of an update, which the device may still be computing."""

    step: int
    """Updates done, this one included."""
    lr: float
    values: Tensor
    """Loss and gradient norm, (2,), on the CPU; valid once `ready`."""
    ready: Event | None
    """None: already."""


@dataclass(frozen=True)
class Writing:
    """A checkpoint in parts that is written while the training goes on."""

    head: Checkpoint
    """All but the tensors."""
    folder: Path
    digests: Future[dict[str, str]]
    """The SHA-256 of each file that this process has written, or a UserError, once it has."""


@dataclass
class Run:
    """Everything a training needs: set_up makes it, trainer.py moves it."""

    config: TrainConfig
    world: World
    folder: RunFolder
    dataset: Dataset
    batches: BatchSampler
    device: torch.device
    products: DtypeChoice
    """The dtype of the model's matrix products."""
    newton_schulz: DtypeChoice
    """The dtype of Muon's."""
    train_windows: BatchLoader
    val_windows: BatchLoader
    model: GPT
    average: GPT | None
    """The moving average of the model's weights, if config.ema_decay asks for one."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """The model's loss, wrapped for several processes, compiled or not."""
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    console: ConsoleSink
    metrics: Metrics
    progress: Progress
    num_micro_batches: int = 1
    """Micro-batches that this process cuts its share of a batch into."""
    memory: Memory | None = None
    """What an update takes, if the training is long enough to count that."""
    first_step: int = 0
    """The step at which this process began."""
    pending: deque[Outcome] = field(default_factory=deque[Outcome])
    """Updates given to the device whose numbers have not been read (at most two, the oldest first)."""
    clock: float = 0.0
    """Since when the updates in `pending` have been computed, on the clock of time.perf_counter."""
    pace: Pace = field(default_factory=Pace)
    started: float = field(default_factory=time.perf_counter)
    saved_at: float = field(default_factory=time.perf_counter)
    saved_step: int | None = None
    """Step of the newest checkpoint that this process has written or read."""
    kept: dict[str, Any] | None = None
    """The progress that last.pt holds, if this process has written it."""
    shards: Path | None = None
    """Folder of the tensors of last.pt, if they lie in parts: it must not be written to."""
    writing: Writing | None = None
    eta_printed: bool = False
    watch: CoreWatch = field(default_factory=CoreWatch)
    """Sees what other programs take of the processor."""
    keep_going: Callable[[int, float], bool] | None = None
    """Asked after each evaluation, with the step and the validation loss, whether to go on."""
    stopped_by_callback: bool = False
    """Whether it said no."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's matrix products; weights are float32."""
        return self.products.dtype

    @property
    def kind(self) -> DeviceKind:
        """What the device can do."""
        return kind_of(self.device)

    @property
    def work(self) -> int:
        """Floating-point operations of an update, of all processes together."""
        tokens = self.config.batch_size * self.config.block_size
        return flops_per_token(self.model.config, self.model.num_parameters()) * tokens

    @property
    def final_model(self) -> GPT:
        """What the run is for, evaluated and sampled from: the average if there is one."""
        return self.average or self.model
