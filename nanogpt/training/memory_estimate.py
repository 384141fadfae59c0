"""How much memory an update takes, before there is one; how much is free.

Use:    memory = predict(model_config(config, 65), config, device, dtype, micro_batch=16)
        fits = memory.total < HEADROOM * free(device)
Nothing is estimated by formula: PyTorch goes through an update on tensors that have shapes but no content
(FakeTensorMode) and counts what would be allocated (MemTracker). That is done for two layers and for three;
since every layer adds the same, the rest follows, and the counting takes as long for a model of any size.
What FSDP adds to a part of the weights is a formula: `gathered_bytes`.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.console import ceil_div
from nanogpt.cores import cgroup_folders
from nanogpt.device import autocast, kind_of
from nanogpt.distributed import parallelize
from nanogpt.model.gpt import GPT, meta_model
from nanogpt.training.optimizer import build_optimizers

HEADROOM = 0.9
"""Share of the free memory to plan with: the rest goes to the device's own libraries and to fragments."""

FEW = 2
"""Layers of the smaller model that is counted."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a process at the peak of an update."""

    weights: int
    """With their moving average."""
    gradients: int
    optimizer: int
    """Its moments."""
    forward: int
    """What there is besides while the forward pass goes on: what it keeps, and what it needs for a moment."""
    backward: int
    """What there is besides while the backward pass goes on."""
    step: int
    """What there is besides while the weights are updated."""
    gathered: int = 0
    """FSDP: weights gathered for computing, and gradients that are being averaged."""
    saving: int = 0
    """FSDP, in main memory: the copy that is written in parts and, on the first process, all for ckpt.pt."""

    @property
    def held(self) -> int:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer

    @property
    def activations(self) -> int:
        """What comes and goes."""
        return max(self.forward + self.gathered, self.backward + self.gathered, self.step)

    @property
    def total(self) -> int:
        """All of it."""
        return self.held + self.activations

    def need(self, device: torch.device) -> int:
        """Bytes that have to be free: in main memory the C library keeps for later what was freed.

        That is up to as much again of what comes and goes (bench/memory.py: peak and resident).
        """
        return self.total + (self.activations + self.saving if kind_of(device).shares_memory else 0)


def predict(  # noqa: PLR0917
    model: GPTConfig,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    micro_batch: int,
    processes: int = 1,
    muon_dtype: torch.dtype | None = None,
) -> Memory:
    """What an update takes at its peak, in micro-batches of `micro_batch` sequences.

    processes: how many share weights, gradients and moments if config.parallel is fsdp.
    muon_dtype: in which Muon orthogonalises; None: in `dtype`.
    """
    layers, sharded = model.n_layer, config.parallel == "fsdp" and processes > 1

    def passes(n_layer: int) -> tuple[int, int]:
        """Of a model with so many layers."""
        few = replace(model, n_layer=n_layer)
        return count_passes(few, config, device, dtype, micro_batch, weights_in=dtype if sharded else None)

    forward, backward = passes(min(layers, FEW))
    if layers > FEW:
        forward, backward = (
            more + (layers - FEW - 1) * (more - less)
            for less, more in zip((forward, backward), passes(FEW + 1), strict=True)
        )
    weights, gradients, moments, step = count_update(model, config, device, muon_dtype or dtype)
    if processes > 1 and not sharded:
        step = max(step, gradients)  # DDP sorts its buckets anew, once, before the second update
    if not sharded:
        return Memory(weights, gradients, moments, forward, backward, step)
    shares = [ceil_div(size, processes) for size in (weights, gradients, moments)]
    return Memory(
        shares[0], shares[1], shares[2], forward, backward, step,
        gathered=gathered_bytes(model, dtype), saving=shares[0] + shares[2] + weights + moments,
    )  # fmt: skip


def count_passes(  # noqa: PLR0917
    shape: GPTConfig,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    micro_batch: int,
    weights_in: torch.dtype | None = None,
) -> tuple[int, int]:
    """The most bytes in the forward and in the backward pass, above what is held all the time.

    weights_in: the dtype in which FSDP puts weights together. For a model of few layers: of more, every one
    makes the counting of all others longer.
    """
    from torch.distributed._tools.mem_tracker import MemTracker  # it takes long to import

    with FakeTensorMode():
        with device:
            model = GPT(shape)
            x, y = (torch.zeros(micro_batch, shape.block_size, dtype=torch.int64) for _ in range(2))
        parallelize.checkpoint_activations(model, config.grad_checkpoint)
        for parameter in model.parameters():  # as after a micro-batch
            parameter.data = parameter.data.to(weights_in)
            parameter.grad = torch.zeros_like(parameter)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker, autocast(device, dtype):
            loss = model.loss(x, y)
        forward = peak_of(tracker)
        with tracker:
            loss.backward()
        backward = peak_of(tracker)
    held = 2 * bytes_of(model)
    return forward - held, backward - held


def count_update(
    shape: GPTConfig, config: TrainConfig, device: torch.device, muon_dtype: torch.dtype
) -> tuple[int, int, int, int]:
    """Bytes of weights (with their average), gradients and moments, and the most above that in an update."""
    from torch.distributed._tools.mem_tracker import MemTracker

    with FakeTensorMode():
        with device:
            model = GPT(shape)
        optimizers = build_optimizers(model, config, muon_dtype)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:  # which makes the moments
            optimizer.step()
        tracker = MemTracker()
        tracker.track_external(model, *optimizers)
        with tracker:
            for optimizer in optimizers:
                optimizer.step()
    weights = bytes_of(model)
    moments = sum(
        value.nbytes
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    averages = weights if config.ema_decay else 0
    return weights + averages, weights, moments, max(0, peak_of(tracker) - 2 * weights - moments)


def peak_of(tracker: Any) -> int:
    """The most bytes since the MemTracker was entered."""
    return sum(sizes["Total"] for sizes in tracker.get_tracker_snapshot("peak").values())


def bytes_of(module: nn.Module) -> int:
    """The bytes of a module's parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def gathered_bytes(config: GPTConfig, dtype: torch.dtype) -> int:
    """Bytes that FSDP puts together while it computes: see parallelize.shard.

    In `dtype` what is outside of the blocks, and two blocks, one of which is on its way, with the buffer that
    it arrives in; and the gradients of one, with the float32 in which they are averaged.
    """
    model = meta_model(replace(config, n_layer=1))
    block = bytes_of(model.blocks[0]) // torch.float32.itemsize
    outside = bytes_of(model) // torch.float32.itemsize - block
    narrow = dtype.itemsize
    return outside * narrow + block * (3 * narrow) + max(outside, block) * (narrow + torch.float32.itemsize)


def free(device: torch.device) -> float:
    """Bytes that are free on a device, as far as it tells; of main memory, what a container allows of it."""
    kind = kind_of(device)
    free_there = kind.free_memory(device)
    return min(free_there, cgroup_room()) if kind.shares_memory else free_there


def cgroup_room() -> float:
    """Bytes that the process may still take of main memory by the limits of its Linux container or job.

    As the kernel's documents of the control groups of version 2, then 1, have them.
    """
    room = float("inf")
    for folder in cgroup_folders("memory"):
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with suppress(OSError, ValueError):  # no such file here, or "max": no limit
                most, used = (int((folder / file).read_text()) for file in (limit, usage))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                idle = int(stat.get("total_inactive_file") or stat["inactive_file"])  # given up when needed
                room = min(room, most - used + idle)
    return room
