"""Setting a run up: data, device, model, optimizers; and, resumed, what the checkpoint says of them.

Use:    run = set_up(config, RunFolder(Path("out")))
"""

import hashlib
from copy import deepcopy
from dataclasses import asdict, fields
from pathlib import Path

import torch

from nanogpt.checkpoint.format import Checkpoint, Progress
from nanogpt.checkpoint.run_dir import RUN_BY_RUN, RunFolder
from nanogpt.config import SHAPE_FIELDS, GPTConfig, TrainConfig, model_config, to_dict
from nanogpt.console import say, warn
from nanogpt.data.batches import BatchLoader, BatchSampler
from nanogpt.data.dataset import Dataset, load_dataset
from nanogpt.device import describe, dtype_of, kind_of, name_of, pick_device
from nanogpt.distributed import parallelize
from nanogpt.distributed.world import ALONE, World, check_same_start, local_device
from nanogpt.errors import require
from nanogpt.model.gpt import GPT
from nanogpt.precision import DtypeChoice, is_slow, pick_dtype, pick_muon_dtype
from nanogpt.seals import VERIFY_BYTES
from nanogpt.training.checkpointing import restore
from nanogpt.training.metrics import ConsoleSink, Metrics, Sink
from nanogpt.training.optimizer import build_optimizers
from nanogpt.training.out_of_memory import initial_micro_batches
from nanogpt.training.sinks import create_sinks
from nanogpt.training.state import Run


def set_up(config: TrainConfig, folder: RunFolder, world: World = ALONE) -> Run:
    """Build a run, new or resumed. Touches the run folder only once all else is in order.

    Errors: UserError if the data, the device or the checkpoint do not fit the settings.
    """
    sinks = create_sinks(config.sinks, folder, to_dict(config))
    sharded = config.parallel == "fsdp" and world.size > 1
    saved = folder.newest_valid(warn, world, gather=not sharded) if config.resume else None
    unseen = VERIFY_BYTES if config.resume else 0  # fit has verified the data of a new run
    dataset = load_dataset(Path(config.data_dir), most=unseen)
    if saved:
        check_resume(config, saved, dataset)
    parallelize.check_batch(config.batch_size, world)
    batches = BatchSampler(
        dataset.train, block_size=config.block_size, batch_size=config.batch_size, seed=config.seed
    )
    device = pick_device(local_device(config.device, world))
    for line in describe(device):
        say(line)
    products, newton_schulz = pick_precision(config, device, saved, world)
    dtype = products.dtype
    kind_of(device).set_up(device, dtype)
    shape = model_config(config, dataset.tokenizer.vocab_size)
    model, average = (sharded_models if sharded else plain_models)(config, shape, device, dtype)
    optimizers = build_optimizers(model, config, newton_schulz.dtype, world.rank, world.size)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if not saved and world.is_first:
        archive_previous(config, folder)
    progress = Progress(**saved.progress) if saved else Progress()
    console, metrics = open_sinks(config, progress, world, sinks)
    loss = parallelize.distributed_loss(model, world, device)
    run = Run(
        config, world, folder, dataset, batches, device, products, newton_schulz,
        BatchLoader(dataset.train, device), BatchLoader(dataset.val, device),
        model, average, loss, optimizers, scaler, console, metrics, progress,
        num_micro_batches=initial_micro_batches(config, world, saved), first_step=progress.step,
    )  # fmt: skip
    if saved:
        restore(run, saved)
    check_same_start(world, what_a_run_starts_from(run))
    return run


def plain_models(
    config: TrainConfig, shape: GPTConfig, device: torch.device, dtype: torch.dtype
) -> tuple[GPT, GPT | None]:
    """The model on its device, with the same weights on any, and its moving average if there is to be one."""
    torch.manual_seed(config.seed)
    model = GPT(shape).to(device)
    average = deepcopy(model).requires_grad_(False) if config.ema_decay else None
    parallelize.checkpoint_activations(model, config.grad_checkpoint)
    return model, average


def sharded_models(
    config: TrainConfig, shape: GPTConfig, device: torch.device, dtype: torch.dtype
) -> tuple[GPT, GPT | None]:
    """As plain_models, of which each process has a part, and never had more."""
    with torch.device("meta"):
        model = GPT(shape)
        average = GPT(shape).requires_grad_(False) if config.ema_decay else None
    parallelize.checkpoint_activations(model, config.grad_checkpoint)
    parallelize.shard(model, device, dtype)
    parallelize.initialize_shards(model, config.seed)
    if average:
        parallelize.shard(average, device, dtype)
        average.load_state_dict(model.state_dict())
    return model, average


def what_a_run_starts_from(run: Run) -> dict[str, object]:
    """What has to be the same for all processes, by the name that a message gives it."""
    settings = {k: v for k, v in to_dict(run.config).items() if k not in RUN_BY_RUN}
    return {
        "version of PyTorch": torch.__version__,
        "data": run.dataset.fingerprint[:12],
        "step": run.progress.step,
        "state of the run": digest(asdict(run.progress)),
        **{f"--{name}": value for name, value in settings.items()},
    }


def digest(value: object) -> str:
    """A short name for a value of plain types."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def check_resume(config: TrainConfig, saved: Checkpoint, dataset: Dataset) -> None:
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


def pick_precision(
    config: TrainConfig, device: torch.device, saved: Checkpoint | None, world: World
) -> tuple[DtypeChoice, DtypeChoice]:
    """The dtypes to train in and to orthogonalise Muon's matrices in, and why."""
    dtype = agreed_dtype(
        kept(config, device, saved, "dtype") or pick_dtype(config.dtype, device, config.n_embd), world
    )
    if config.optimizer != "muon":
        return dtype, DtypeChoice(torch.float32, "not in use")
    muon = agreed_dtype(
        kept(config, device, saved, "muon_dtype") or pick_muon_dtype(config.dtype, device), world
    )
    return dtype, muon


def kept(
    config: TrainConfig, device: torch.device, saved: Checkpoint | None, what: str
) -> DtypeChoice | None:
    """The dtype that a resumed run had, unless --dtype has changed or it would crawl here; else None."""
    if saved is None or saved.train_config.dtype != config.dtype:
        return None
    had = dtype_of(str(saved.precision.get(what, "bfloat16")))  # before it was saved
    scaled = what == "dtype" and had == torch.float16 and not kind_of(device).trains_float16
    if config.dtype == "auto" and (scaled or is_slow(had, device)):
        who = "the run computed" if what == "dtype" else "Muon orthogonalised"
        warn(
            f"{who} in {name_of(had)} so far, which is slow on this device: another is taken from here on "
            f"(--dtype {name_of(had)} keeps it)"
        )
        return None
    return DtypeChoice(had, "as before")


def agreed_dtype(choice: DtypeChoice, world: World) -> DtypeChoice:
    """The widest that any process has picked: which one is faster can look different to each."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    widest = dtypes[world.max_over_ranks(dtypes.index(choice.dtype))[0]]
    return choice if widest == choice.dtype else DtypeChoice(widest, "as another process has picked")


def archive_previous(config: TrainConfig, folder: RunFolder) -> None:
    """Keep (or, if so told, delete) an earlier run in the folder."""
    previous = folder.archive_previous(delete=config.overwrite)
    if previous:
        say(f"{folder.path} held an earlier run: moved to {previous}")


def open_sinks(
    config: TrainConfig, progress: Progress, world: World, sinks: list[Sink]
) -> tuple[ConsoleSink, Metrics]:
    """The console and the metrics, at the step of the checkpoint; only the first process has `sinks`."""
    console = ConsoleSink(config.max_iters)
    metrics = Metrics([console, *sinks] if world.is_first else [console])
    metrics.rewind(progress.step, progress.evaluated_at)
    return console, metrics
