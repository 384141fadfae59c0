"""The `plan` command: what a training will take, before it is started.

Run:    nanogpt plan --preset gpt2 --on h100 --processes 8
        nanogpt plan --n_layer 12 --n_embd 768 --batch_size 32
Memory is not estimated by formula: PyTorch runs two updates on tensors that have shapes but no content
(FakeTensorMode) and counts what would be allocated (MemTracker), in seconds and whatever the size. Time is
that of real updates on this device or, for a named one, arithmetic at UTILIZATION of its published peak.
"""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from nanogpt import data, device, optim, parallel
from nanogpt.config import GradCheckpoint, PlanConfig, UserError
from nanogpt.console import progress_bar, say, terminal
from nanogpt.metrics import duration
from nanogpt.model import GPT, flops_per_token
from nanogpt.run import micro_batches, model_config, name_of

GIB, MIB = 2**30, 2**20

UTILIZATION = 0.4
"""Share of the published peak that a well-fed GPU reaches (Chowdhery et al., PaLM, 2022, table 3: 0.46)."""

HEADROOM = 0.9
"""Share of the free memory to plan with: the rest goes to the device's own libraries and to fragments."""

MODES: tuple[GradCheckpoint, ...] = ("off", "selective", "blocks")

TRIAL_SECONDS = 1.0
"""How long this device is measured, at least."""


@dataclass(frozen=True)
class Accelerator:
    """A device by its data sheet. peak: operations a second in `dtype`, dense; memory: bytes."""

    peak: float
    memory: float
    dtype: torch.dtype = torch.bfloat16


ACCELERATORS = {
    "t4": Accelerator(65e12, 16e9, torch.float16),
    "v100": Accelerator(125e12, 32e9, torch.float16),
    "a100": Accelerator(312e12, 80e9),
    "l4": Accelerator(121e12, 24e9),
    "rtx3090": Accelerator(71e12, 24e9),
    "rtx4090": Accelerator(165e12, 24e9),
    "h100": Accelerator(989e12, 80e9),
    "h200": Accelerator(989e12, 141e9),
    "mi300x": Accelerator(1307e12, 192e9),
}


@dataclass(frozen=True)
class Memory:
    """Bytes of a process at the peak of an update."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What is kept for the backward pass, and what is needed for a moment."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Machine:
    """The device to plan for. free: bytes; peak: FLOP/s by its data sheet, 0 if it can be measured."""

    place: torch.device
    dtype: torch.dtype
    free: float
    peak: float = 0.0


def main(config: PlanConfig) -> int:
    """Print the plan. Returns the exit code."""
    machine = machine_of(config)
    world = parallel.World(0, config.processes)
    parallel.check_batch(config.batch_size, world)
    vocab_size = vocabulary(config)
    config = replace(config, vocab_size=vocab_size)
    with torch.device("meta"):
        parameters = GPT(model_config(config, vocab_size)).num_parameters()
    share = -(-config.batch_size // config.processes)
    micro = -(-share // micro_batches(config, world))
    say(f"Model: {parameters:,} parameters, {name_of(machine.dtype)}, vocabulary of {vocab_size:,}")
    say(
        f"Batch: {config.batch_size} sequences of {config.block_size:,} tokens"
        + f" on {config.processes} processes" * (config.processes > 1)
        + f", {micro} at a time"
    )
    plans: dict[GradCheckpoint, Memory] = {}
    with progress_bar("Counting") as bar:
        for mode in bar.track(MODES):
            plans[mode] = predict(config, machine, mode, micro)
    show_memory(plans, machine.free)
    say(advice(config, machine, plans, micro))
    show_time(config, machine, flops_per_token(model_config(config, vocab_size), parameters))
    return 0


def show_time(config: PlanConfig, machine: Machine, flops: int) -> None:
    """Print how long an update and the whole training take. flops: operations for a token."""
    tokens = config.batch_size * config.block_size
    if machine.peak:
        seconds = flops * tokens / (machine.peak * UTILIZATION * config.processes)
        how = f"at {UTILIZATION:.0%} of its published peak"
    else:
        seconds, how = measured(config, machine), "measured here"
    pace = f"{seconds * 1000:,.4g} ms ({how}), {tokens / seconds:,.0f} tokens/s"
    say(f"Time: {flops * tokens / 1e12:,.3g} TFLOP an update, {pace}")
    whole = duration(seconds * config.max_iters)
    say(f"{config.max_iters:,} updates, {config.max_iters * tokens:,} tokens: {whole}")


def machine_of(config: PlanConfig) -> Machine:
    """The device that is named, or the one that is here. Errors: UserError if it is unknown."""
    if not config.on:
        place = device.pick_device(config.device)
        for line in device.describe(place):
            say(line)
        return Machine(place, device.pick_dtype(config.dtype, place, config.n_embd), free_memory(place))
    if config.on not in ACCELERATORS:
        raise UserError(f"--on {config.on} is unknown: use one of {', '.join(ACCELERATORS)}")
    named = ACCELERATORS[config.on]
    dtype = named.dtype if config.dtype == "auto" else device.pick_dtype(config.dtype, torch.device("cpu"), 1)
    say(f"For one {config.on.upper()}, {named.memory / 1e9:.0f} GB")
    stand_in = "cuda" if torch.backends.cuda.is_built() else "cpu"
    return Machine(torch.device(stand_in), dtype, named.memory, named.peak)


def free_memory(place: torch.device) -> float:
    """Bytes that are free on a device, as far as it tells."""
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0]
    if place.type == "mps":
        return torch.mps.recommended_max_memory()
    available = Path("/proc/meminfo")
    if available.exists():
        lines = dict(line.split(":") for line in available.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    return (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else float("inf")
    )


def vocabulary(config: PlanConfig) -> int:
    """Size of the vocabulary: as told, or that of the prepared data, or that of Tiny Shakespeare."""
    if config.vocab_size:
        return config.vocab_size
    try:
        return data.load(Path(config.data_dir)).tokenizer.vocab_size
    except UserError:
        return 65


def predict(config: PlanConfig, machine: Machine, mode: GradCheckpoint, micro: int) -> Memory:
    """What an update takes at its peak, in micro-batches of `micro` sequences."""
    with FakeTensorMode():
        with machine.place:
            model = GPT(model_config(config, config.vocab_size or 0))
            x, y = (torch.zeros(micro, config.block_size, dtype=torch.int64) for _ in range(2))
        parallel.checkpoint_activations(model, mode)
        optimizers = optim.build(model, config)
        for parameter in model.parameters():  # as after an update, with the gradients of a micro-batch
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
        tracker = MemTracker()
        tracker.track_external(model, *optimizers)
        with tracker:
            with device.autocast(machine.place, machine.dtype):
                loss = model.loss(x, y)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        peak = sum(sizes["Total"] for sizes in tracker.get_tracker_snapshot("peak").values())
    weights = sum(parameter.nbytes for parameter in model.parameters())
    moments = sum(
        value.nbytes
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    averages = weights if config.ema_decay else 0
    return Memory(weights + averages, weights, moments, max(0, peak - 2 * weights - moments))


def show_memory(plans: dict[GradCheckpoint, Memory], free: float) -> None:
    """Print what each way of checkpointing takes."""
    columns = ("weights", "gradients", "optimizer", "activations", "peak", "fits")
    table = Table("checkpoint", *columns, title="MiB on each device, at the peak of an update")
    for column in table.columns[1:]:
        column.justify = "right"
    for mode, memory in plans.items():
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total)
        fits = "yes" if memory.total < HEADROOM * free else "no"
        table.add_row(mode, *(f"{part / MIB:,.0f}" for part in parts), fits)
    terminal().print(table)


def advice(config: PlanConfig, machine: Machine, plans: dict[GradCheckpoint, Memory], micro: int) -> str:
    """Which flags make it fit: smaller micro-batches first, since they cost the least."""
    room = HEADROOM * machine.free
    if plans[config.grad_checkpoint].total < room:
        return f"It fits as it is, in {machine.free / GIB:,.1f} GiB"
    for mode in MODES:
        size = micro
        while size >= 1:
            memory = plans[mode] if size == micro else predict(config, machine, mode, size)
            if memory.total < room:
                flags = [f"--micro_batch {size}"] * (size < micro)
                flags += [f"--grad_checkpoint {mode}"] * (mode != "off")
                return f"It fits with {' '.join(flags)}: {memory.total / MIB:,.0f} MiB"
            size //= 2
    return "It does not fit: a smaller --n_layer, --n_embd or --block_size"


def measured(config: PlanConfig, machine: Machine) -> float:
    """Seconds of an update on this device: forward and backward passes of a few sequences, scaled up."""
    place, vocab_size = machine.place, config.vocab_size or 0
    model = GPT(model_config(config, vocab_size)).to(place)
    parallel.checkpoint_activations(model, config.grad_checkpoint)
    optimizers = optim.build(model, config)
    share = -(-config.batch_size // config.processes)
    few = min(share, max(1, 2048 // config.block_size))
    x, y = torch.randint(vocab_size, (2, few, config.block_size), device=place)
    passes: list[float] = []
    while len(passes) < 3 or sum(passes) < TRIAL_SECONDS:
        start = time.perf_counter()
        with device.autocast(place, machine.dtype):
            loss = model.loss(x, y)
        loss.backward()
        device.synchronize(place)
        passes.append(time.perf_counter() - start)
    updates: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
        device.synchronize(place)
        updates.append(time.perf_counter() - start)
    return min(passes[1:]) * share / few + min(updates[1:])
