"""The `plan` command: predict the memory, traffic and time of a training without starting it.

Run:    nanogpt plan --preset gpt2 --on h100 --processes 8
        nanogpt plan --n_layer 12 --n_embd 768 --batch_size 32
Memory is counted, not estimated (training/memory_estimate.py). The time of an update is measured on this
device or, for a named device, computed from its published peak FLOP/s and UTILIZATION.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from nanogpt.cli.config import PlanConfig
from nanogpt.config import GPTConfig, GradCheckpoint, model_config
from nanogpt.data.dataset import load_dataset
from nanogpt.distributed import parallelize
from nanogpt.distributed.world import World
from nanogpt.errors import UserError, require
from nanogpt.machine.device import (
    KINDS,
    autocast,
    describe,
    dtype_of,
    kind_of,
    name_of,
    pick_device,
    seconds_of,
    simulated,
)
from nanogpt.machine.precision import pick_dtype, pick_muon_dtype
from nanogpt.model.gpt import GPT
from nanogpt.model.size import flops_per_token, meta_model
from nanogpt.terminal.console import one_line, progress_bar, say, terminal, warn
from nanogpt.training import memory_estimate
from nanogpt.training.autosize import Text, choose_settings
from nanogpt.training.compilation import compiled_loss, pick_compile
from nanogpt.training.memory_estimate import HEADROOM, Memory
from nanogpt.training.optimizer import build_optimizers
from nanogpt.training.out_of_memory import max_rank_batch, micro_batches_per_rank
from nanogpt.units import GIB, MIB, ceil_div, duration

UTILIZATION = 0.4
"""Assumed share of the peak FLOP/s (MFU; Chowdhery et al., PaLM, 2022, table 3, reach 0.46)."""

CHECKPOINT_MODES: tuple[GradCheckpoint, ...] = ("off", "selective", "blocks")
"""Modes of activation checkpointing, fastest first."""

TINY_SHAKESPEARE = Text(train_tokens=1_003_854, val_tokens=111_540, vocab_size=GPTConfig.vocab_size)
"""The text of a plan if there is no data folder."""

TRIAL_SECONDS, TRIAL_TOKENS = 1.0, 2048
"""Seconds for which micro-batches are measured, and number of tokens in the first trial."""


@dataclass(frozen=True)
class DataSheet:
    """Published figures of a device. peak: FLOP/s in `dtype`, dense; memory: bytes."""

    peak: float
    memory: float
    dtype: torch.dtype = torch.bfloat16


DATA_SHEETS = {
    "t4": DataSheet(65e12, 16e9, torch.float16),
    "v100": DataSheet(125e12, 32e9, torch.float16),
    "a100": DataSheet(312e12, 80e9),
    "l4": DataSheet(121e12, 24e9),
    "rtx3090": DataSheet(71e12, 24e9),
    "rtx4090": DataSheet(165e12, 24e9),
    "h100": DataSheet(989e12, 80e9),
    "h200": DataSheet(989e12, 141e9),
    "mi300x": DataSheet(1307e12, 192e9),
}
"""Name of a device, as --on takes it -> its data sheet."""


@dataclass(frozen=True)
class Target:
    """The device that a plan is for. With several processes, each has one such device."""

    device: torch.device
    """Device that computes the plan: the CPU, if the target is a GPU that this machine does not have."""
    dtype: torch.dtype
    free: float
    """Bytes of free memory."""
    peak: float = 0.0
    """Peak FLOP/s of its data sheet; 0: measure the time of an update."""
    simulated: bool = False
    """Whether the target is a GPU that this machine does not have."""

    @property
    def planned_device(self) -> torch.device:
        """The device that the plan is for."""
        return torch.device("cuda") if self.simulated else self.device

    def fits(self, memory: Memory) -> bool:
        """Whether an update fits in the free memory, with headroom."""
        return memory.need(self.planned_device) < HEADROOM * self.free


def main(config: PlanConfig) -> int:
    """Print the plan. Returns the exit code."""
    target = pick_target(config)
    world = World(0, config.processes)
    parallelize.check_batch(config.batch_size, world)
    if config.parallel == "fsdp" and config.processes > 1:
        parallelize.check_sharding(target.dtype)
    if config.minutes:
        require(not config.on, "--minutes measures this machine, which --on is not: leave one of them out")
        config = choose_settings(config, describe_text(config), target.device, config.processes)
    config = replace(config, vocab_size=config.vocab_size or describe_text(config).vocab_size)
    shape = gpt_config(config)
    model = meta_model(shape)
    rank_batch = max_rank_batch(config, world)
    micro_batch = ceil_div(rank_batch, micro_batches_per_rank(config, world))
    parameters = f"{model.num_parameters():,} parameters"
    say(f"Model: {parameters}, {name_of(target.dtype)}, vocabulary of {shape.vocab_size:,}")
    processes = f" on {config.processes} processes" if config.processes > 1 else ""
    say(
        f"Batch: {config.batch_size} sequences of {config.block_size:,} tokens{processes}, "
        f"{micro_batch} at a time"
    )
    predictions: dict[GradCheckpoint, Memory] = {}
    with progress_bar("Counting") as bar:
        for mode in bar.track(CHECKPOINT_MODES):
            predictions[mode] = predict_memory(replace(config, grad_checkpoint=mode), target, micro_batch)
    print_memory(predictions, target)
    say(advise(config, target, predictions[config.grad_checkpoint], micro_batch))
    if config.processes > 1:
        print_traffic(config, target.dtype, ceil_div(rank_batch, micro_batch))
    print_time(config, target, flops_per_token(model))
    return 0


def pick_target(config: PlanConfig) -> Target:
    """Choose the device that --on names, else this machine's. Raises: UserError if the name is unknown."""
    name = config.on.lower()
    if not name:
        device = pick_device(config.device)
        for line in describe(device):
            say(line)
        dtype, free = pick_dtype(config.dtype, device, config.n_embd).dtype, memory_estimate.free(device)
        if kind_of(device).shares_memory:  # processes share its cores and memory
            torch.set_num_threads(max(1, torch.get_num_threads() // config.processes))
            free /= config.processes
        return Target(device, dtype, free)
    if name not in DATA_SHEETS:
        raise UserError(f"--on {config.on} is unknown: use one of {', '.join(DATA_SHEETS)}")
    sheet = DATA_SHEETS[name]
    dtype = sheet.dtype if config.dtype == "auto" else dtype_of(config.dtype)
    say(f"For one {config.on.upper()}, {sheet.memory / 1e9:.0f} GB")
    is_here = KINDS["cuda"].is_available()
    device = torch.device("cuda" if is_here else "cpu")
    return Target(device, dtype, sheet.memory, sheet.peak, simulated=not is_here)


def describe_text(config: PlanConfig) -> Text:
    """The sizes of the data folder; without one, those of Tiny Shakespeare. --vocab_size overrules theirs."""
    try:
        text = Text.of(load_dataset(Path(config.data_dir)))
    except UserError:
        text = TINY_SHAKESPEARE
    return replace(text, vocab_size=config.vocab_size or text.vocab_size)


def gpt_config(config: PlanConfig) -> GPTConfig:
    """The model of a plan whose vocabulary is known."""
    return model_config(config, config.vocab_size or 0)


# --- memory ---


def predict_memory(config: PlanConfig, target: Target, micro_batch: int) -> Memory:
    """Predict the memory of an update on one device, with micro-batches of `micro_batch` sequences."""
    device, dtype = target.device, target.dtype
    with simulated(KINDS["cuda"]) if target.simulated else nullcontext():
        return memory_estimate.predict(
            gpt_config(config), config, device, dtype, micro_batch, config.processes
        )


def print_memory(predictions: dict[GradCheckpoint, Memory], target: Target) -> None:
    """Print a table: the memory of an update with each mode of activation checkpointing."""
    columns = ("weights", "gradients", "optimizer", "activations", "peak", "fits")
    table = Table("checkpoint", *columns, title="MiB on each device, at the peak of an update")
    for column in table.columns[1:]:
        column.justify = "right"
    for mode, memory in predictions.items():
        sizes = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total)
        table.add_row(mode, *(f"{size / MIB:,.0f}" for size in sizes), "yes" if target.fits(memory) else "no")
    terminal().print(table)


def advise(config: PlanConfig, target: Target, memory: Memory, micro_batch: int) -> str:
    """Find the flags that make an update fit: smaller micro-batches first, since they cost the least.

    memory: memory of an update with the present flags.
    """
    if target.fits(memory):
        return f"It fits as it is, in {target.free / GIB:,.1f} GiB"
    candidates = [replace(config, grad_checkpoint=mode) for mode in CHECKPOINT_MODES]
    can_shard = config.processes > 1 and target.dtype != torch.float16
    if can_shard and config.parallel == "ddp":
        candidates += [replace(candidate, parallel="fsdp") for candidate in candidates]
    with progress_bar("Trying") as bar:
        for candidate in bar.track(candidates):
            if not target.fits(predict_memory(candidate, target, 1)):
                continue
            size = micro_batch
            while not target.fits(memory := predict_memory(candidate, target, size)):
                size //= 2
            flags: list[str] = []
            if size < micro_batch:
                flags.append(f"--micro_batch {size}")
            if candidate.grad_checkpoint != "off":
                flags.append(f"--grad_checkpoint {candidate.grad_checkpoint}")
            if candidate.parallel != config.parallel:
                flags.append("--parallel fsdp")
            return f"It fits with {' '.join(flags)}: {memory.total / MIB:,.0f} MiB"
    smaller = "It does not fit: a smaller --n_layer, --n_embd or --block_size"
    if config.processes > 1 or target.dtype == torch.float16:
        return smaller
    return f"{smaller}, or several devices (--processes 8 --parallel fsdp)"


# --- traffic and time ---


def print_traffic(config: PlanConfig, dtype: torch.dtype, micro_batches: int) -> None:
    """Print the bytes that each process sends, and receives, in an update (formulas: docs/scaling.md)."""
    model = meta_model(gpt_config(config))
    parameters = model.num_parameters()
    in_blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    others = (config.processes - 1) / config.processes
    gradients = torch.float32.itemsize * parameters
    if config.parallel == "fsdp":
        volume = others * micro_batches * (dtype.itemsize * (parameters + in_blocks) + gradients)
    else:
        volume = 2 * others * gradients
    say(f"Traffic: {volume / 1e9:,.3g} GB sent and received by each process in an update ({config.parallel})")


def print_time(config: PlanConfig, target: Target, flops: int) -> None:
    """Print the time of an update and of the full training. flops: floating-point operations per token."""
    tokens = config.batch_size * config.block_size
    if target.peak:
        seconds = flops * tokens / (target.peak * UTILIZATION * config.processes)
        source = f"at {UTILIZATION:.0%} of the published peak"
    else:
        seconds = measure_update(config, target)
        source = "measured here, without traffic" if config.processes > 1 else "measured here"
    tera = flops * tokens / 1e12
    work = f"Time: {tera:,.3g} TFLOP an update" if tera < 1000 else f"Time: {tera:,.0f} TFLOP an update"
    if seconds is None:
        say(f"{work}, not measured, since not even a few sequences fit")
        return
    an_update = f"{seconds:,.1f} s" if seconds > 10 else f"{seconds * 1000:,.4g} ms"
    say(f"{work}, {an_update} ({source}), {tokens / seconds:,.0f} tokens/s")
    total = duration(seconds * config.max_iters)
    say(f"{config.max_iters:,} updates, {config.max_iters * tokens:,} tokens: {total}")


def measure_update(config: PlanConfig, target: Target) -> float | None:
    """Measure the seconds of an update: forward and backward of its micro-batches, and a step.

    The trial doubles until it is a whole micro-batch, or takes long enough for the time to be in proportion
    to its size. A few tokens would not do on a GPU, which takes as long for many.
    Returns None if not even a few sequences fit: on a CPU, the system would kill the process.
    """
    device, world = target.device, World(0, config.processes)
    rank_batch = max_rank_batch(config, world)
    micro_batch = ceil_div(rank_batch, micro_batches_per_rank(config, world))
    few = min(micro_batch, max(1, TRIAL_TOKENS // config.block_size))
    sizes = (micro_batch, few)
    alone = replace(config, parallel="ddp")
    most = next((size for size in sizes if target.fits(predict_memory(alone, target, size))), None)
    if most is None:
        return None
    model = GPT(gpt_config(config)).to(device)
    parallelize.checkpoint_activations(model, config.grad_checkpoint)
    optimizers = build_optimizers(model, config, pick_muon_dtype(config.dtype, device).dtype)
    sequences, seconds = few, measure_passes(model, model.loss, target, few, TRIAL_SECONDS / 4)
    while sequences < most and seconds < TRIAL_SECONDS / 4:
        sequences = min(2 * sequences, most)
        seconds = measure_passes(model, model.loss, target, sequences, TRIAL_SECONDS / 4)
    work = flops_per_token(model) * config.batch_size * config.block_size * config.max_iters
    compiles = pick_compile(config.compile, device, work)
    loss_fn = compiled_loss(model) if compiles else model.loss
    try:
        seconds = measure_passes(model, loss_fn, target, sequences, TRIAL_SECONDS)
    except Exception as error:  # the compiler's: the training would go on without it
        if not compiles:
            raise
        warn(f"torch.compile failed, measured without it: {one_line(str(error)):.100}")

    def step() -> None:
        """Update the weights."""
        for optimizer in optimizers:
            optimizer.step()

    steps = [seconds_of(step, device) for _ in range(3)]
    return seconds * rank_batch / sequences + min(steps[1:])  # the first one is a warm-up


def measure_passes(
    model: GPT, loss_fn: Callable[[Tensor, Tensor], Tensor], target: Target, sequences: int, least: float
) -> float:
    """Measure the seconds of a forward and backward pass of so many sequences, for `least` seconds."""
    shape = (2, sequences, model.config.block_size)
    x, y = torch.randint(model.config.vocab_size, shape, device=target.device)

    def compute_gradients() -> None:
        """Run one forward and backward pass."""
        with autocast(target.device, target.dtype):
            loss = loss_fn(x, y)
        loss.backward()

    passes: list[float] = []
    while len(passes) < 3 or sum(passes[1:]) < least:
        passes.append(seconds_of(compute_gradients, target.device))
    return min(passes[1:])  # the first one is a warm-up
