"""A training run in memory: its state and everything around it, its clocks, the reasons to stop.

Example: run = set_up(config, RunFolder(Path("out")), world)        # training/setup.py
trainer.py advances a Run, checkpointing.py saves and restores it.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from nanogpt.checkpoint.format import Progress
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.data.batches import BatchLoader, BatchSampler
from nanogpt.distributed.world import World
from nanogpt.evaluation import Windows, evaluation_windows
from nanogpt.machine.cores import CoreWatch
from nanogpt.machine.device import kind_of
from nanogpt.machine.device_kind import DeviceKind, Event
from nanogpt.model.gpt import GPT
from nanogpt.model.kernels import IGNORED
from nanogpt.model.size import flops_per_token
from nanogpt.training.checkpointing import Checkpointer
from nanogpt.training.memory_estimate import Memory
from nanogpt.training.metrics import ConsoleSink, Metrics
from nanogpt.training.state import TrainState
from nanogpt.training.stopping import StopRequest
from nanogpt.units import ceil_div


class StopReason(IntEnum):
    """Why a training stops. When processes disagree, the largest wins; a signal's value is its exit code."""

    CALLBACK = 1
    PATIENCE = 2
    TIME = 3
    FINISHED = 4
    SIGHUP = 129
    SIGINT = 130
    SIGQUIT = 131
    SIGTERM = 143
    SIGBREAK = 149
    SIGXCPU = 152

    @property
    def is_signal(self) -> bool:
        """Whether a signal stopped the training before its end."""
        return self > 128

    @property
    def exit_code(self) -> int:
        """0, or 128 + the number of the signal, as shells report it."""
        return int(self) if self.is_signal else 0

    @property
    def label(self) -> str:
        """The name as a Result has it: "finished", "callback", "SIGINT", ..."""
        return self.name if self.is_signal else self.name.lower()


@dataclass
class Clock:
    """The time of a run: of updates only (no evaluation, saving, compiling), and of everything."""

    started: float = field(default_factory=time.perf_counter)
    lap_began: float = 0.0
    """When the device began the oldest update whose result has not been read."""
    steps: int = -1
    """Measured steps, without the first, which is slower than all others."""
    seconds: float = 0.0
    window_steps: int = 0
    window_seconds: float = 0.0

    def restart_lap(self) -> None:
        """Begin the next lap now."""
        self.lap_began = time.perf_counter()

    def end_lap(self) -> float:
        """Count one step, from the end of the lap before (or restart_lap) until now. Returns its seconds."""
        seconds = time.perf_counter() - self.lap_began
        self.lap_began += seconds
        self.steps += 1
        self.seconds += seconds if self.steps else 0.0
        self.window_steps += 1
        self.window_seconds += seconds
        return seconds

    def seconds_per_step(self) -> float:
        """Mean since the last call; NaN if there was no step."""
        mean = self.window_seconds / self.window_steps if self.window_steps else float("nan")
        self.window_steps, self.window_seconds = 0, 0.0
        return mean

    def wall_seconds(self) -> float:
        """Seconds since this process began the run."""
        return time.perf_counter() - self.started


RECENT_UPDATES = 30
"""Number of the latest updates, whose median time predicts that of the next ones."""


@dataclass
class Deadline:
    """The clock of a training with --minutes. It counts everything, from the start of the process on."""

    began: float
    """time.perf_counter() at that start, less the seconds that earlier processes of the run used."""
    last_s: float = 0.0
    """Seconds used up to the latest `read_lap`."""
    at: tuple[int, int] = (-1, -1)
    """Step, and step of the last evaluation, at the latest `read_lap`."""
    update_s: deque[float] = field(default_factory=lambda: deque[float](maxlen=RECENT_UPDATES))
    evaluation_s: float = 0.0
    """Seconds of the last evaluation, or their forecast."""
    state_bytes: int = 0
    """Size of a checkpoint, once it is known."""
    save_s: float = 0.0
    """Seconds that a save takes."""
    decided_s: float = 0.0
    """`last_s` when the end was last decided."""
    unrecorded: int | None = None
    """The step of a decision that may not be in a checkpoint yet."""

    def read_lap(self, world: World, progress: Progress, save_s: float) -> bool:
        """Record the time since the last call, of an update or an evaluation. Returns whether of an update.

        save_s: seconds that a save takes in this process. All processes take the times of the slowest one.
        """
        times_s = time.perf_counter() - self.began, save_s
        now_s, self.save_s = (us / 1e6 for us in world.max_over_ranks(*(round(1e6 * s) for s in times_s)))
        lap_s, (step, evaluated_at) = now_s - self.last_s, self.at
        self.last_s, self.at = now_s, (progress.step, progress.evaluated_at)
        if progress.evaluated_at != evaluated_at:
            self.evaluation_s = lap_s if step >= 0 else self.evaluation_s
            return False
        if progress.step != step + 1:  # the first call, or nothing has happened
            return False
        self.update_s.append(lap_s)
        return True


@dataclass(frozen=True)
class UpdateResult:
    """The result of an update, which the device may still be computing."""

    step: int
    """Number of updates done, including this one."""
    lr: float
    values: Tensor
    """Loss and gradient norm, (2,), on the CPU; valid once `ready` is reached."""
    ready: Event | None
    """None: they are valid already."""

    @classmethod
    def of(cls, step: int, lr: float, values: Tensor) -> "UpdateResult":
        """Begin to copy `values`, (2,), from their device to the CPU."""
        kind = kind_of(values.device)
        copy = values.to("cpu", non_blocking=kind.is_async)
        return cls(step, lr, copy, kind.record_event(values.device))


@dataclass(kw_only=True)
class Run(TrainState):
    """Everything a training needs. setup.py builds it, trainer.py advances it."""

    folder: RunFolder
    sampler: BatchSampler
    train_loader: BatchLoader
    val_loader: BatchLoader
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    """The model's loss, wrapped for several processes and compiled if wanted."""
    console: ConsoleSink
    metrics: Metrics
    checkpointer: Checkpointer
    first_step: int = 0
    """The step at which this process began."""
    memory: Memory | None = None
    """Predicted memory of an update, if the training is long enough to be worth the prediction."""
    unread: deque[UpdateResult] = field(default_factory=deque[UpdateResult])
    """Results of launched updates that have not been read: at most two, oldest first."""
    clock: Clock = field(default_factory=Clock)
    core_watch: CoreWatch = field(default_factory=CoreWatch)
    graph: Callable[["Run"], Tensor] | None = None
    """The captured update (cuda_graph.py), in place of trainer.update; None: there is none."""
    captured_batch: tuple[Tensor, Tensor] | None = None
    """While an update is captured: the tensors that each batch will be copied to, (B, T) each."""
    eta_printed: bool = False
    deadline: Deadline | None = None
    """The clock of --minutes."""
    stop: StopRequest = field(default_factory=StopRequest)
    callback: Callable[[int, float], bool | None] | None = None
    """Called after each evaluation with the step and the validation loss; returning False ends the run."""
    stopped_by_callback: bool = False

    @property
    def kind(self) -> DeviceKind:
        """What the device can do."""
        return kind_of(self.device)

    @property
    def flops_per_update(self) -> int:
        """Floating-point operations of an update, over all processes."""
        tokens = self.config.batch_size * self.config.block_size
        return flops_per_token(self.model) * tokens

    def validation_windows(self, max_batches: int | None) -> list[Windows]:
        """The validation split in micro-batches; see evaluation_windows."""
        return evaluation_windows(
            self.dataset.val,
            block_size=self.config.block_size,
            batch_size=self.config.batch_size,
            micro_batch=ceil_div(self.config.batch_size, self.num_micro_batches * self.world.size),
            max_batches=max_batches,
        )

    def loss_weights(self, targets: Tensor) -> Sequence[float | Tensor]:
        """The weight of each micro-batch in the mean loss of the batch: its share of the targets that count.

        The weights of all processes together add up to 1. targets: those of this process, (B, T).
        """
        parts = targets.tensor_split(self.num_micro_batches)
        if self.dataset.train_mask is None:
            return [len(part) / self.config.batch_size for part in parts]
        counts = torch.stack([(part != IGNORED).sum() for part in parts])
        return (counts / self.world.all_reduce_sum(counts.sum()).clamp(min=1)).unbind()

    @property
    def eval_model(self) -> GPT:
        """The model to evaluate and sample from: the moving average if there is one."""
        return self.ema_model or self.model
