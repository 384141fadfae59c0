"""Set up a run, new or resumed: data, device, dtypes, model, optimizers, metric sinks.

Example: run = set_up(config, RunFolder(Path("out")))
"""

import hashlib
from copy import deepcopy
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from nanogpt.checkpoint.format import Checkpoint, Progress
from nanogpt.checkpoint.run_dir import PER_COMMAND_SETTINGS, RunFolder
from nanogpt.config import SHAPE_FIELDS, GPTConfig, TrainConfig, model_config, to_dict
from nanogpt.data.batches import BatchLoader, BatchSampler
from nanogpt.data.dataset import Dataset, load_dataset
from nanogpt.distributed import parallelize
from nanogpt.distributed.dtensor import load_full_state
from nanogpt.distributed.world import ALONE, World, check_same_start, local_device
from nanogpt.errors import require
from nanogpt.initialize.start import first_weights
from nanogpt.machine.device import describe, dtype_of, kind_of, name_of, pick_device
from nanogpt.machine.precision import DtypeChoice, is_slow, pick_dtype, pick_muon_dtype
from nanogpt.model.gpt import GPT
from nanogpt.model.lora import add_adapters, first_adapters
from nanogpt.model.size import meta_model
from nanogpt.storage.seals import VERIFY_BYTES
from nanogpt.terminal.console import say, warn
from nanogpt.training.checkpointing import Checkpointer
from nanogpt.training.metrics import ConsoleSink, Metrics, Sink
from nanogpt.training.optimizer import build_optimizers
from nanogpt.training.out_of_memory import initial_micro_batches
from nanogpt.training.run import Run
from nanogpt.training.sinks import create_sinks
from nanogpt.training.snapshot import rounding
from nanogpt.training.sparse import use_sparse_gradients

ROUNDING = {"threads": "Threads", "torch": "PyTorch"}
"""What of a checkpoint's precision decides the rounding -> how a line calls it."""

FIXED_SETTINGS = ("preset", "optimizer", "init_from", "lora_rank", "lora_alpha")
"""Settings that a resumed run may not change, besides the shape."""


def set_up(config: TrainConfig, folder: RunFolder, world: World = ALONE) -> Run:
    """Set up a run, new or resumed. The run folder is changed only after everything else has succeeded.

    Raises: UserError if the data, the device or the checkpoint does not fit the settings.
    """
    sinks = create_sinks(config.sinks, folder, to_dict(config)) if world.is_first else []
    sharded = config.parallel == "fsdp" and world.size > 1
    saved = folder.newest_valid(warn, world, gather=not sharded) if config.resume else None
    verify_bytes = VERIFY_BYTES if config.resume else 0  # fit has verified the data of a new run
    dataset = load_dataset(Path(config.data_dir), verify_bytes=verify_bytes)
    if saved:
        check_resume(config, saved, dataset)
    parallelize.check_batch(config.batch_size, world)
    sampler = BatchSampler(
        dataset.train, block_size=config.block_size, batch_size=config.batch_size, seed=config.seed
    )
    device = pick_device(local_device(config.device, world))
    for line in describe(device):
        say(line)
    precision, muon_precision = pick_precision(config, device, saved, world)
    dtype = precision.dtype
    kind_of(device).set_up(device, dtype)
    start = first_weights(config, dataset.tokenizer) if config.init_from and not saved else {}
    shape = model_config(config, dataset.tokenizer.vocab_size)
    model, ema_model = (sharded_models if sharded else plain_models)(config, shape, device, dtype, start)
    if kind_of(device).sparse_gradients and config.compile != "on" and world.size == 1:
        use_sparse_gradients(model)
    optimizers = build_optimizers(model, config, muon_precision.dtype, world.rank, world.size)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if not saved and world.is_first:
        archive_previous(config, folder)
    progress = Progress(**saved.progress) if saved else Progress()
    console, metrics = open_sinks(config, progress, world, sinks)
    run = Run(
        config=config,
        world=world,
        folder=folder,
        dataset=dataset,
        sampler=sampler,
        train_loader=BatchLoader(dataset.train, device, dataset.train_mask),
        val_loader=BatchLoader(dataset.val, device, dataset.val_mask),
        device=device,
        precision=precision,
        muon_precision=muon_precision,
        model=model,
        ema_model=ema_model,
        loss_fn=parallelize.distributed_loss(model, world, device),
        optimizers=optimizers,
        scaler=scaler,
        console=console,
        metrics=metrics,
        checkpointer=Checkpointer(folder, world, before_save=metrics.flush),
        progress=progress,
        num_micro_batches=initial_micro_batches(config, world, saved),
        first_step=progress.step,
    )
    if saved:
        run.checkpointer.restore(run, saved)
    check_same_start(world, starting_state(run))
    return run


def plain_models(
    config: TrainConfig, shape: GPTConfig, device: torch.device, dtype: torch.dtype, start: dict[str, Tensor]
) -> tuple[GPT, GPT | None]:
    """Build the model and its EMA (None without ema_decay), with the same initial weights on any device.

    start: the weights to start from; empty: random ones.
    """
    torch.manual_seed(config.seed)
    model = GPT(shape)
    if start:
        model.load_state_dict(start)
    add_adapters(model, config)
    model.to(device)
    ema_model = deepcopy(model).requires_grad_(False) if config.ema_decay else None
    parallelize.checkpoint_activations(model, config.grad_checkpoint)
    return model, ema_model


def sharded_models(
    config: TrainConfig, shape: GPTConfig, device: torch.device, dtype: torch.dtype, start: dict[str, Tensor]
) -> tuple[GPT, GPT | None]:
    """Build the model and its EMA, sharded with FSDP: a device never holds the full weights.

    start: as for plain_models.
    """
    model, ema_model = meta_model(shape), meta_model(shape) if config.ema_decay else None
    add_adapters(model, config)
    if ema_model:
        add_adapters(ema_model, config)
        ema_model.requires_grad_(False)
    parallelize.checkpoint_activations(model, config.grad_checkpoint)
    parallelize.shard(model, device, dtype)
    parallelize.initialize_shards(model, config.seed)
    if start:
        load_full_state(model, {**start, **first_adapters(model, config.seed)})
    if ema_model:
        parallelize.shard(ema_model, device, dtype)
        ema_model.load_state_dict(model.state_dict())
    return model, ema_model


def starting_state(run: Run) -> dict[str, object]:
    """Values that must agree between processes at the start, by the names that messages use."""
    settings = {k: v for k, v in to_dict(run.config).items() if k not in PER_COMMAND_SETTINGS}
    return {
        "version of PyTorch": torch.__version__,
        "data": run.dataset.fingerprint[:12],
        "step": run.progress.step,
        "state of the run": digest(asdict(run.progress)),
        **{f"--{name}": value for name, value in settings.items()},
    }


def digest(value: object) -> str:
    """A short hash of a value of plain types."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def check_resume(config: TrainConfig, saved: Checkpoint, dataset: Dataset) -> None:
    """Compare settings, threads and PyTorch with those of the checkpoint, and print those that have changed.

    Raises: UserError if the architecture, the preset, the optimizer or the data have changed, or if the
    checkpoint was kept for sampling.
    """
    require(
        bool(saved.optimizers) or not saved.train_config.keep_checkpoints,
        f"the checkpoint in {config.out_dir} is one that --keep_checkpoints kept, without optimizer state: "
        "give the last.pt of its run, or start a new run with --init_from",
    )
    before = saved.train_config
    for item in fields(TrainConfig):
        old, new = getattr(before, item.name), getattr(config, item.name)
        if old == new or item.name in PER_COMMAND_SETTINGS:
            continue
        require(
            item.name not in (*SHAPE_FIELDS, *FIXED_SETTINGS),
            f"--{item.name} {new} contradicts the checkpoint, which has {item.name} {old}: leave it out, "
            "or start without --resume",
        )
        say(f"--{item.name} is now {new} (was {old})")
    require(
        saved.fingerprint == dataset.fingerprint,
        f"--data_dir {config.data_dir} is not the data this run was trained on: give the folder it had, "
        "or start without --resume",
    )
    report_rounding(saved)


def report_rounding(saved: Checkpoint) -> None:
    """Print what rounds the numbers of a resumed run unlike those of one that never stopped."""
    for name, new in rounding().items():
        old = saved.precision.get(name, new)  # earlier checkpoints do not have it
        if old != new:
            say(f"{ROUNDING[name]}: {new} (was {old}): from here on, numbers are rounded differently")


def pick_precision(
    config: TrainConfig, device: torch.device, saved: Checkpoint | None, world: World
) -> tuple[DtypeChoice, DtypeChoice]:
    """Choose the dtypes of the model's matrix products and of Muon's, each with its reason."""
    dtype = saved_dtype(config, device, saved, "dtype") or pick_dtype(config.dtype, device, config.n_embd)
    dtype = widest_dtype(dtype, world)
    if config.optimizer != "muon":
        return dtype, DtypeChoice(torch.float32, "not in use")
    muon = saved_dtype(config, device, saved, "muon_dtype") or pick_muon_dtype(config.dtype, device)
    return dtype, widest_dtype(muon, world)


def saved_dtype(
    config: TrainConfig, device: torch.device, saved: Checkpoint | None, key: str
) -> DtypeChoice | None:
    """The dtype that a resumed run had; None for a new run, a changed --dtype, or one that is slow here."""
    if saved is None or saved.train_config.dtype != config.dtype:
        return None
    old = dtype_of(str(saved.precision.get(key, "bfloat16")))  # early checkpoints do not have the key
    scaled = key == "dtype" and old == torch.float16 and not kind_of(device).trains_float16
    if config.dtype == "auto" and (scaled or is_slow(old, device)):
        who = "the run computed" if key == "dtype" else "Muon orthogonalized"
        warn(
            f"{who} in {name_of(old)} so far, which is slow on this device: another is used from here on "
            f"(--dtype {name_of(old)} keeps it)"
        )
        return None
    return DtypeChoice(old, "as before")


NARROW_TO_WIDE = (torch.bfloat16, torch.float16, torch.float32)


def widest_dtype(choice: DtypeChoice, world: World) -> DtypeChoice:
    """The widest dtype that any process picked: each has measured by itself which one is faster."""
    widest = NARROW_TO_WIDE[world.max_over_ranks(NARROW_TO_WIDE.index(choice.dtype))[0]]
    return choice if widest == choice.dtype else DtypeChoice(widest, "as another process picked")


def archive_previous(config: TrainConfig, folder: RunFolder) -> None:
    """Move an earlier run in the folder to previous/, or delete it with --overwrite."""
    previous = folder.archive_previous(delete=config.overwrite)
    if previous:
        say(f"{folder.path} held an earlier run: moved to {previous}")


def open_sinks(
    config: TrainConfig, progress: Progress, world: World, sinks: list[Sink]
) -> tuple[ConsoleSink, Metrics]:
    """Open the console and the metrics, rewound to the current step. Only the first process has `sinks`."""
    console = ConsoleSink(config.max_iters)
    metrics = Metrics([console, *sinks])
    metrics.rewind(progress.step, progress.evaluated_at)
    return console, metrics
