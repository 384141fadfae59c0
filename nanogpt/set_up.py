"""Setting a run up: data, device, model, optimizers; and, resumed, what the checkpoint says of them.

Use:    run = set_up(config, RunFolder(Path("out")))
"""

from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import cast

import torch

from nanogpt import data, device, optim, parallel
from nanogpt.checkpoint import Checkpoint, Progress
from nanogpt.config import SHAPE_FIELDS, TrainConfig, model_config, require, to_dict
from nanogpt.console import say, warn
from nanogpt.metrics import ConsoleReader, JsonLines, Metrics, Reader, TensorBoard
from nanogpt.micro_batch import first_pieces
from nanogpt.model import GPT
from nanogpt.parallel import ALONE, World
from nanogpt.run import Run
from nanogpt.run_folder import RUN_BY_RUN, RunFolder
from nanogpt.saving import restore


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
    dtype = agreed_dtype(pick_dtype(config, place, saved), world)
    if place.type == "cuda" and dtype != torch.float32:
        torch.set_float32_matmul_precision("high")  # TF32 for the few products that autocast leaves alone
    torch.manual_seed(config.seed)
    model = GPT(model_config(config, dataset.tokenizer.vocab_size))  # on the CPU: same weights on any device
    if not sharded:
        model = model.to(place)
    average = deepcopy(model).requires_grad_(False) if config.ema_decay else None
    parallel.checkpoint_activations(model, config.grad_checkpoint)
    if sharded:
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
        pieces=first_pieces(config, world, saved), first_step=progress.step,
    )  # fmt: skip
    if saved:
        restore(run, saved)
    return run


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


def agreed_dtype(dtype: torch.dtype, world: World) -> torch.dtype:
    """The widest that any process has picked: which one is faster can look different to each."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return dtypes[world.agree(dtypes.index(dtype))[0]]


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
