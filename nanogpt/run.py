"""A training run in memory: what it holds, how it is set up, saved and restored.

Use:    run = set_up(config, RunFolder(Path("out"))); save(run, run.folder.last); restore(run, saved)
The training itself is in train.py.
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nanogpt import checkpoint, data, device, optim, parallel, parts
from nanogpt.checkpoint import Checkpoint, Progress
from nanogpt.config import SHAPE_FIELDS, GPTConfig, TrainConfig, UserError, require, to_dict
from nanogpt.console import say, warn
from nanogpt.metrics import ConsoleReader, JsonLines, Metrics, Reader, TensorBoard
from nanogpt.model import GPT
from nanogpt.parallel import World
from nanogpt.run_folder import RUN_BY_RUN, RunFolder
from nanogpt.sharding import load_whole, optimizer_parts, whole_state

ALONE = World()


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
    ready: torch.cuda.Event | None
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
    """Everything a training needs: set_up makes it, train.py moves it."""

    config: TrainConfig
    world: World
    folder: RunFolder
    dataset: data.Dataset
    batches: data.Batches
    device: torch.device
    dtype: torch.dtype
    train_windows: data.Windows
    val_windows: data.Windows
    model: GPT
    average: GPT | None
    """The moving average of the model's weights, if config.ema_decay asks for one."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """The model's loss, wrapped for several processes, compiled or not."""
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    console: ConsoleReader
    metrics: Metrics
    progress: Progress
    pieces: int = 1
    """Micro-batches that this process cuts its share of a batch into."""
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
    parts: Path | None = None
    """Folder of the tensors of last.pt, if they lie in parts: it must not be written to."""
    writing: Writing | None = None
    forecast_done: bool = False
    keep_going: Callable[[int, float], bool] | None = None
    """Asked after each evaluation, with the step and the validation loss, whether to go on."""
    told_to_stop: bool = False
    """Whether it said no."""

    @property
    def final_model(self) -> GPT:
        """What the run is for, evaluated and sampled from: the average if there is one."""
        return self.average or self.model


def set_up(config: TrainConfig, folder: RunFolder, world: World = ALONE) -> Run:
    """Build a run, new or resumed. Touches the run folder only once all else is in order.

    Errors: UserError if the data, the device or the checkpoint do not fit the settings.
    """
    sharded = config.parallel == "fsdp" and world.size > 1
    saved = folder.newest(warn, world, whole=not sharded) if config.resume else None
    dataset = data.load(Path(config.data_dir))
    if saved:
        check_resume(config, saved, dataset)
    parallel.check_batch(config.batch_size, world)
    batches = data.Batches(
        dataset.train, block_size=config.block_size, batch_size=config.batch_size, seed=config.seed
    )
    place = device.pick_device(parallel.local_device(config.device, world))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    for line in device.describe(place):
        say(line)
    dtype = pick_dtype(config, place, saved)
    if place.type == "cuda" and dtype != torch.float32:
        torch.set_float32_matmul_precision("high")  # TF32 for the few products that autocast leaves alone
    torch.manual_seed(config.seed)
    model = GPT(model_config(config, dataset.tokenizer.vocab_size)).to(place)  # same weights on any device
    average = deepcopy(model).requires_grad_(False) if config.ema_decay else None
    parallel.checkpoint_activations(model, config.grad_checkpoint)
    if sharded:
        require(dtype != torch.float16, "--parallel fsdp does not scale float16: give --dtype bfloat16")
        for module in [model, average] if average else [model]:
            parallel.shard(module, place, dtype)
    optimizers = optim.build(model, config, world.rank, world.size)
    scaler = torch.amp.GradScaler(place.type, enabled=dtype == torch.float16)
    if not saved and world.is_first:
        make_room(config, folder)
    progress = Progress(**saved.progress) if saved else Progress()
    console, metrics = open_metrics(config, folder, progress, world)
    loss = parallel.shared_loss(model, world, place)
    run = Run(
        config, world, folder, dataset, batches, place, dtype,
        data.Windows(dataset.train, place), data.Windows(dataset.val, place),
        model, average, loss, optimizers, scaler, console, metrics, progress,
        pieces=micro_batches(config, world), first_step=progress.step,
    )  # fmt: skip
    if saved:
        restore(run, saved)
    return run


def micro_batches(config: TrainConfig, world: World) -> int:
    """How many micro-batches a process cuts its share of the batch into, to begin with."""
    share = -(-config.batch_size // world.size)
    if config.micro_batch == "auto":
        return min(share, -(-config.gradient_accumulation_steps // world.size))
    return -(-share // config.micro_batch)


def model_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    """The architecture in `config`, for a vocabulary of `vocab_size`."""
    names = {item.name for item in fields(GPTConfig)} - {"vocab_size"}
    return GPTConfig(**{name: getattr(config, name) for name in names}, vocab_size=vocab_size)


def check_resume(config: TrainConfig, saved: Checkpoint, dataset: data.Dataset) -> None:
    """Say which settings differ from the saved ones.

    Errors: UserError if one of them may not: the architecture, the preset, the data.
    """
    before = saved.train_config
    for item in fields(TrainConfig):
        old, new = getattr(before, item.name), getattr(config, item.name)
        if old == new or item.name in RUN_BY_RUN:
            continue
        require(
            item.name not in (*SHAPE_FIELDS, "preset", "optimizer"),
            f"--{item.name} {new} contradicts the checkpoint, which has {item.name} {old}: leave it out, "
            "or start without --resume",
        )
        say(f"--{item.name} is now {new} (so far {old})")
    require(
        saved.fingerprint == dataset.fingerprint,
        f"--data_dir {config.data_dir} is not the data this run was trained on: give the folder it had, "
        "or start without --resume",
    )


def pick_dtype(config: TrainConfig, place: torch.device, saved: Checkpoint | None) -> torch.dtype:
    """The dtype to train in; a resumed run on the same kind of device keeps the one it had."""
    if saved and config.dtype == "auto" and saved.arithmetic["device"] == place.type:
        return cast(torch.dtype, getattr(torch, saved.arithmetic["dtype"]))
    return device.pick_dtype(config.dtype, place, config.n_embd)


def make_room(config: TrainConfig, folder: RunFolder) -> None:
    """Keep (or, if so told, delete) an earlier run in the folder."""
    previous = folder.set_aside(delete=config.overwrite)
    if previous:
        say(f"{folder.path} held an earlier run: moved to {previous}")


def open_metrics(
    config: TrainConfig, folder: RunFolder, progress: Progress, world: World
) -> tuple[ConsoleReader, Metrics]:
    """The readers of the run's numbers, each continuing where the checkpoint is; the first process's only."""
    console = ConsoleReader(progress.step, config.max_iters)
    if not world.is_first:
        return console, Metrics([console])
    readers: list[Reader] = [console, JsonLines(folder.metrics, progress.step, progress.evaluated_at)]
    if config.tensorboard:
        readers.append(TensorBoard(folder.runs, progress.step, to_dict(config)))
    return console, Metrics(readers)


def name_of(dtype: torch.dtype) -> str:
    """float32, bfloat16 or float16."""
    return str(dtype).removeprefix("torch.")


def snapshot(run: Run) -> Checkpoint:
    """The run as a checkpoint. Its tensors are the run's own, not copies, unless they had to be put together.

    Then they are on the first process alone.
    """
    keep = run.world.is_first
    return replace(
        head(run),
        model=whole_state(run.model.state_dict(), keep=keep),
        average=whole_state(run.average.state_dict(), keep=keep) if run.average else {},
        optimizers=[whole_state(optimizer.state_dict(), keep=keep) for optimizer in run.optimizers],
    )


def head(run: Run) -> Checkpoint:
    """The run as a checkpoint, without its tensors."""
    return Checkpoint(
        config=to_dict(replace(run.config, resume=False, overwrite=False)),
        vocab_size=run.model.config.vocab_size,
        progress=asdict(run.progress),
        model={},
        average={},
        optimizers=[optimizer.state_dict() | {"state": {}} for optimizer in run.optimizers],
        scaler=run.scaler.state_dict(),
        arithmetic={"device": run.device.type, "dtype": name_of(run.dtype)},
        tokenizer=run.dataset.tokenizer.to_dict(),
        fingerprint=run.dataset.fingerprint,
    )


def restore(run: Run, saved: Checkpoint) -> None:
    """Put the run where the checkpoint is. Hyperparameters stay those of run.config."""
    if saved.parts:
        run.parts = checkpoint.parts_folder(run.folder.last, saved.parts)
        states = read_parts(run, run.parts)
    else:
        load_whole(run.model, saved.model)
        if run.average:
            load_whole(run.average, saved.weights)
        pairs = zip(run.optimizers, saved.optimizers, strict=True)
        states = [optimizer_parts(optimizer, state["state"]) for optimizer, state in pairs]
    for optimizer, state in zip(run.optimizers, states, strict=True):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    if saved.scaler and run.scaler.is_enabled():
        run.scaler.load_state_dict(saved.scaler)
    run.progress = Progress(**saved.progress)
    run.saved_step = run.progress.step


def read_parts(run: Run, folder: Path) -> list[dict[int, Any]]:
    """Fill weights and average from a checkpoint in parts. Returns the states of the optimizers."""
    saved = parts.shapes(folder)
    states = parts.room(saved, run.optimizers)
    average = run.average.state_dict() if run.average else {}
    if any(name.startswith("average.") for name in saved) or not average:
        parts.read(folder, parts.flat(run.model.state_dict(), average, states))
        return states
    parts.read(folder, parts.flat(run.model.state_dict(), {}, states))
    parts.read(folder, parts.flat(average, {}, []))  # a run that begins to average
    return states


def save(run: Run, path: Path) -> None:
    """Write a checkpoint of the run. Errors: UserError if it cannot be written."""
    begin_save(run, path)
    finish_save(run)


def begin_save(run: Run, path: Path) -> None:
    """Write a checkpoint of the run, on the first process; or let each begin to write its part of it.

    In parts is what is resumed, of a model in parts. What is sampled from is one ordinary file.
    Errors: UserError if it cannot be written, or if the one before could not.
    """
    finish_save(run)
    run.saved_at = time.perf_counter()
    if run.world.is_first:
        run.metrics.flush()
        if run.world.job and not run.saved_step:
            run.folder.job.write_text(run.world.job)
    if parallel.is_sharded(run.model) and path == run.folder.last:
        average = run.average.state_dict() if run.average else {}
        states = [optimizer.state_dict()["state"] for optimizer in run.optimizers]
        tensors = parts.flat(run.model.state_dict(), average, states)
        folder = run.folder.parts / str(run.progress.step)
        if folder == run.parts:
            folder = folder.with_name(f"{folder.name}-again")
        if run.world.is_first:
            run.folder.drop_parts(but=run.parts)  # what a killed process left: nobody writes before this one
        run.writing = Writing(head(run), folder, parts.begin(folder, tensors))
        return
    saved = snapshot(run)
    with run.world.together():
        if run.world.is_first:
            checkpoint.save(path, saved)
    run.saved_step = run.progress.step


def finish_save(run: Run) -> None:
    """Wait until the checkpoint is there that is being written in parts, if there is one.

    It counts from the moment at which the file that names its parts is in place.
    Errors: UserError if one process could not write its part, or the first one the file.
    """
    writing, run.writing = run.writing, None
    if writing is None:
        return
    digests = dict[str, str]()
    with run.world.together():
        digests = writing.digests.result()
    files = run.world.gather(list(digests.items()))
    with run.world.together():
        if run.world.is_first:
            inside = writing.folder.relative_to(run.folder.path)
            named = {(inside / name).as_posix(): digest for name, digest in files}
            checkpoint.save(run.folder.last, replace(writing.head, parts=named))
            run.folder.drop_parts(but=writing.folder)
    run.parts = writing.folder
    run.saved_step = int(writing.head.progress["step"])


def try_save(run: Run, path: Path) -> bool:
    """Like begin_save, but a failure is reported and the training goes on. Returns whether it worked."""
    return attempt(run, lambda: begin_save(run, path))


def try_finish_save(run: Run) -> bool:
    """Like finish_save, but a failure is reported and the training goes on. Returns whether it worked."""
    return attempt(run, lambda: finish_save(run))


def attempt(run: Run, write: Callable[[], None]) -> bool:
    """Whether writing worked; if not, say why not."""
    try:
        write()
    except UserError as error:
        warn(f"{error} (training goes on; what was saved before is whole; the next save tries again)")
        return False
    return True
