"""The `plan` command: what a training will take, before it is started.

Run:    nanogpt plan --preset gpt2 --on h100 --processes 8
        nanogpt plan --n_layer 12 --n_embd 768 --batch_size 32
Memory is counted, not estimated (training/memory_estimate.py). Time is that of real updates on this device
or, for a named one, arithmetic at UTILIZATION of its published peak.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table

from nanogpt.config import GPTConfig, GradCheckpoint, PlanConfig, model_config
from nanogpt.console import GIB, MIB, duration, progress_bar, say, terminal
from nanogpt.data.dataset import load_dataset
from nanogpt.device import KINDS, autocast, describe, kind_of, name_of, pick_device, simulated
from nanogpt.distributed import parallelize
from nanogpt.distributed.world import World
from nanogpt.errors import UserError
from nanogpt.model.gpt import GPT, flops_per_token
from nanogpt.precision import DtypeChoice, pick_dtype, pick_muon_dtype
from nanogpt.training import memory_estimate
from nanogpt.training.memory_estimate import HEADROOM, Memory
from nanogpt.training.optimizer import build_optimizers
from nanogpt.training.out_of_memory import max_rank_batch, micro_batches_per_rank

UTILIZATION = 0.4
"""Share of the published peak that a well-fed GPU reaches (Chowdhery et al., PaLM, 2022, table 3: 0.46)."""

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
class Machine:
    """The device of a process. free: bytes; peak: FLOP/s by its data sheet, 0 if it can be measured."""

    device: torch.device
    dtype: torch.dtype
    free: float
    peak: float = 0.0
    stands_in: bool = False
    """Whether `place` is a CPU, and counted for is a GPU that is not here."""

    @property
    def kind(self) -> torch.device:
        """The device that is meant."""
        return torch.device("cuda") if self.stands_in else self.device


def main(config: PlanConfig) -> int:
    """Print the plan. Returns the exit code."""
    machine = machine_of(config)
    world = World(0, config.processes)
    parallelize.check_batch(config.batch_size, world)
    if config.parallel == "fsdp" and config.processes > 1:
        parallelize.check_sharding(machine.dtype)
    config = replace(config, vocab_size=vocabulary(config))
    model = shape(config)
    with torch.device("meta"):
        parameters = GPT(model).num_parameters()
    share = max_rank_batch(config, world)
    micro = -(-share // micro_batches_per_rank(config, world))
    dtype = name_of(machine.dtype)
    say(f"Model: {parameters:,} parameters, {dtype}, vocabulary of {model.vocab_size:,}")
    say(
        f"Batch: {config.batch_size} sequences of {config.block_size:,} tokens"
        + f" on {config.processes} processes" * (config.processes > 1)
        + f", {micro} at a time"
    )
    plans: dict[GradCheckpoint, Memory] = {}
    with progress_bar("Counting") as bar:
        for mode in bar.track(MODES):
            plans[mode] = predict(replace(config, grad_checkpoint=mode), machine, micro)
    show_memory(plans, machine)
    say(advice(config, machine, plans[config.grad_checkpoint], micro))
    if config.processes > 1:
        show_traffic(config, machine.dtype, -(-share // micro))
    show_time(config, machine, flops_per_token(model, parameters))
    return 0


def show_traffic(config: PlanConfig, dtype: torch.dtype, pieces: int) -> None:
    """Print what each process sends, and receives, in an update. See docs/scaling.md for the formulae."""
    with torch.device("meta"):
        model = GPT(shape(config))
    parameters, inside = model.num_parameters(), sum(p.numel() for p in model.blocks.parameters())
    others = (config.processes - 1) / config.processes
    gradients = 4 * parameters
    if config.parallel == "fsdp":
        volume = others * pieces * (dtype.itemsize * (parameters + inside) + gradients)
    else:
        volume = 2 * others * gradients
    say(f"Traffic: {volume / 1e9:,.3g} GB sent and received by each process in an update ({config.parallel})")


def show_time(config: PlanConfig, machine: Machine, flops: int) -> None:
    """Print how long an update and the whole training take. flops: operations for a token."""
    tokens = config.batch_size * config.block_size
    if machine.peak:
        seconds = flops * tokens / (machine.peak * UTILIZATION * config.processes)
        how = f"at {UTILIZATION:.0%} of its published peak"
    else:
        seconds = measured(config, machine)
        how = "measured here" + ", without traffic" * (config.processes > 1)
    tera = flops * tokens / 1e12
    work = f"Time: {tera:,.3g} TFLOP an update" if tera < 1000 else f"Time: {tera:,.0f} TFLOP an update"
    if seconds is None:
        say(f"{work}, not measured: not even a few sequences fit")
        return
    long = f"{seconds:,.1f} s" if seconds > 10 else f"{seconds * 1000:,.4g} ms"
    say(f"{work}, {long} ({how}), {tokens / seconds:,.0f} tokens/s")
    whole = duration(seconds * config.max_iters)
    say(f"{config.max_iters:,} updates, {config.max_iters * tokens:,} tokens: {whole}")


def machine_of(config: PlanConfig) -> Machine:
    """The device of a process: that is named, or is here. Errors: UserError if it is unknown."""
    if not config.on:
        device = pick_device(config.device)
        for line in describe(device):
            say(line)
        dtype, room = pick_dtype(config.dtype, device, config.n_embd).dtype, memory_estimate.free(device)
        if kind_of(device).shares_memory:  # among all processes
            torch.set_num_threads(max(1, torch.get_num_threads() // config.processes))
            room /= config.processes
        return Machine(device, dtype, room)
    if config.on.lower() not in ACCELERATORS:
        raise UserError(f"--on {config.on} is unknown: use one of {', '.join(ACCELERATORS)}")
    named = ACCELERATORS[config.on.lower()]
    told = (
        DtypeChoice(named.dtype, "")
        if config.dtype == "auto"
        else pick_dtype(config.dtype, torch.device("cpu"), 1)
    )
    say(f"For one {config.on.upper()}, {named.memory / 1e9:.0f} GB")
    here = KINDS["cuda"].is_available()
    device = torch.device("cuda" if here else "cpu")
    return Machine(device, told.dtype, named.memory, named.peak, stands_in=not here)


def vocabulary(config: PlanConfig) -> int:
    """Size of the vocabulary: as told, or that of the prepared data, or that of Tiny Shakespeare."""
    if config.vocab_size:
        return config.vocab_size
    try:
        return load_dataset(Path(config.data_dir)).tokenizer.vocab_size
    except UserError:
        return 65


def shape(config: PlanConfig) -> GPTConfig:
    """The model."""
    return model_config(config, config.vocab_size or 0)


def predict(config: PlanConfig, machine: Machine, micro: int) -> Memory:
    """What an update takes at its peak on each device, in micro-batches of `micro` sequences."""
    device, dtype = machine.device, machine.dtype
    with simulated(KINDS["cuda"]) if machine.stands_in else nullcontext():
        return memory_estimate.predict(shape(config), config, device, dtype, micro, config.processes)


def show_memory(plans: dict[GradCheckpoint, Memory], machine: Machine) -> None:
    """Print what each way of checkpointing takes."""
    columns = ("weights", "gradients", "optimizer", "activations", "peak", "fits")
    table = Table("checkpoint", *columns, title="MiB on each device, at the peak of an update")
    for column in table.columns[1:]:
        column.justify = "right"
    for mode, plan in plans.items():
        parts = (plan.weights, plan.gradients, plan.optimizer, plan.activations, plan.total)
        fits = "yes" if plan.need(machine.kind) < HEADROOM * machine.free else "no"
        table.add_row(mode, *(f"{part / MIB:,.0f}" for part in parts), fits)
    terminal().print(table)


def advice(config: PlanConfig, machine: Machine, as_told: Memory, micro: int) -> str:
    """Which flags make it fit: smaller micro-batches first, since they cost the least."""
    room = HEADROOM * machine.free
    if as_told.need(machine.kind) < room:
        return f"It fits as it is, in {machine.free / GIB:,.1f} GiB"
    ways = [replace(config, grad_checkpoint=mode) for mode in MODES]
    can_shard = config.processes > 1 and machine.dtype != torch.float16
    if can_shard and config.parallel == "ddp":
        ways += [replace(way, parallel="fsdp") for way in ways]
    with progress_bar("Trying") as bar:
        for way in bar.track(ways):
            if predict(way, machine, 1).need(machine.kind) >= room:
                continue
            size = micro
            while (plan := predict(way, machine, size)).need(machine.kind) >= room:
                size //= 2
            flags = [f"--micro_batch {size}"] * (size < micro)
            flags += [f"--grad_checkpoint {way.grad_checkpoint}"] * (way.grad_checkpoint != "off")
            flags += ["--parallel fsdp"] * (way.parallel != config.parallel)
            return f"It fits with {' '.join(flags)}: {plan.total / MIB:,.0f} MiB"
    if config.processes > 1 or machine.dtype == torch.float16:
        return "It does not fit: a smaller --n_layer, --n_embd or --block_size"
    return (
        "It does not fit: a smaller --n_layer, --n_embd or --block_size, "
        "or several devices (--processes 8 --parallel fsdp)"
    )


def measured(config: PlanConfig, machine: Machine) -> float | None:
    """Seconds of an update on this device: forward and backward passes of a few sequences, scaled up.

    None if not even these fit: a CPU's system would end the process.
    """
    device = machine.device
    share = max_rank_batch(config, World(0, config.processes))
    few = min(share, max(1, 2048 // config.block_size))
    trial = predict(replace(config, parallel="ddp"), machine, few)
    if trial.need(machine.kind) > HEADROOM * machine.free:
        return None
    model = GPT(shape(config)).to(device)
    parallelize.checkpoint_activations(model, config.grad_checkpoint)
    optimizers = build_optimizers(model, config, pick_muon_dtype(config.dtype, device).dtype)
    x, y = torch.randint(model.config.vocab_size, (2, few, config.block_size), device=device)
    passes: list[float] = []
    while len(passes) < 3 or sum(passes) < TRIAL_SECONDS:
        start = time.perf_counter()
        with autocast(device, machine.dtype):
            loss = model.loss(x, y)
        loss.backward()
        kind_of(device).synchronize(device)
        passes.append(time.perf_counter() - start)
    updates: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
        kind_of(device).synchronize(device)
        updates.append(time.perf_counter() - start)
    return min(passes[1:]) * share / few + min(updates[1:])
