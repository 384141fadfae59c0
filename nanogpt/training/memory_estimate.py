"""Memory estimate: how much memory an update will take, and how much is free.

Example: memory = predict(model_config(config, 65), config, device, dtype, micro_batch=16)
         fits = memory.total < HEADROOM * free(device)
Memory is counted, not computed by a formula (unless `at_most` says that there is plenty): PyTorch runs an
update on tensors that have shapes but no content (FakeTensorMode) and counts what it would allocate
(MemTracker). It does so for models of two and of three layers. Every further layer adds the same again, so
counting takes no longer for a deep model. Only what FSDP gathers is computed by a formula: `gathered_bytes`.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_pre_hook

from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.distributed import parallelize
from nanogpt.machine.cores import cgroup_folders
from nanogpt.machine.device import autocast, kind_of
from nanogpt.model.gpt import GPT, default_hidden_dim
from nanogpt.model.lora import add_adapters
from nanogpt.model.size import meta_model
from nanogpt.training.optimizer import build_optimizers, trained_parameters
from nanogpt.units import ceil_div

HEADROOM = 0.9
"""Usable share of the free memory. The rest goes to the device's own libraries and to fragmentation."""

FEW_LAYERS = 2
"""Number of layers of the smaller model that is counted; the larger one has one more."""


@dataclass(frozen=True)
class Memory:
    """Memory of a process in an update, in bytes."""

    weights: int
    """Weights, and their moving average (EMA) if there is one."""
    gradients: int
    optimizer: int
    """Optimizer state."""
    forward: int
    """Peak of the forward pass, above all of these: activations that it keeps, and temporary tensors."""
    backward: int
    """Peak of the backward pass, above weights, gradients and optimizer state."""
    step: int
    """Peak of the optimizer step, above weights, gradients and optimizer state."""
    gathered: int = 0
    """FSDP: weights that are gathered for computing, and gradients that are being averaged."""
    saving: int = 0
    """FSDP, in main memory: a copy of the shard for last.pt and, on rank 0, the full state for ckpt.pt."""

    @property
    def held(self) -> int:
        """Bytes that are allocated all the time."""
        return self.weights + self.gradients + self.optimizer

    @property
    def activations(self) -> int:
        """Bytes that are allocated and freed in every update, at their peak."""
        return max(self.forward + self.gathered, self.backward + self.gathered, self.step)

    @property
    def total(self) -> int:
        """Peak memory of an update, in bytes."""
        return self.held + self.activations

    def need(self, device: torch.device) -> int:
        """Bytes that must be free on the device for an update.

        In main memory, activations count twice: the C library keeps freed memory for later, up to as much
        again (bench/memory.py measures peak and resident memory).
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
    """Predict the memory of an update with micro-batches of `micro_batch` sequences.

    processes: number of processes, over which fsdp shards weights, gradients and optimizer state.
    muon_dtype: dtype in which Muon orthogonalizes; None: `dtype`.
    """
    layers, sharded = model.n_layer, config.parallel == "fsdp" and processes > 1

    def passes(n_layer: int) -> tuple[int, int]:
        """Peaks of the forward and the backward pass of a model with `n_layer` layers."""
        shallow = replace(model, n_layer=n_layer)
        return count_passes(
            shallow, config, device, dtype, micro_batch, weights_in=dtype if sharded else None
        )

    forward, backward = passes(min(layers, FEW_LAYERS))
    if layers > FEW_LAYERS:
        forward, backward = (
            more + (layers - FEW_LAYERS - 1) * (more - less)
            for less, more in zip((forward, backward), passes(FEW_LAYERS + 1), strict=True)
        )
    weights, gradients, state, step = count_update(model, config, device, muon_dtype or dtype)
    if processes > 1 and not sharded:
        step = max(step, gradients)  # before the second update, DDP rebuilds its gradient buckets once
    if not sharded:
        return Memory(weights, gradients, state, forward, backward, step)
    shards = [ceil_div(size, processes) for size in (weights, gradients, state)]
    return Memory(
        shards[0], shards[1], shards[2], forward, backward, step,
        gathered=gathered_bytes(model, dtype), saving=shards[0] + shards[2] + weights + state,
    )  # fmt: skip


def at_most(shape: GPTConfig, parameters: int, micro_batch: int) -> int:
    """More bytes than an update in one process allocates beside weights and their EMA, by a formula.

    Counting takes up to 4 s on a machine that has not imported sympy lately. Where twice this is free, there
    is no need for it. Everything is taken as float32, and as kept: what a block makes of a token, the weights
    of plain attention, all logits; gradients, AdamW's state, and as much again for the step.
    """
    hidden = 2 * (shape.mlp_width or default_hidden_dim(shape.n_embd, gated=False))
    width = max(shape.n_embd, shape.n_head * shape.head_width)
    block = 16 * width + 4 * hidden + 3 * shape.n_head * shape.block_size
    token = shape.n_layer * block + 8 * shape.n_embd + 6 * shape.vocab_size
    return torch.float32.itemsize * (micro_batch * shape.block_size * token + 6 * parameters)


def count_passes(  # noqa: PLR0917
    shape: GPTConfig,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    micro_batch: int,
    weights_in: torch.dtype | None = None,
) -> tuple[int, int]:
    """Count the peak bytes of the forward and of the backward pass, above weights and gradients.

    weights_in: dtype of the weights that FSDP gathers; None: as they are. Give a model of few layers: the
    time that counting takes grows faster than their number.
    """
    from torch.distributed._tools.mem_tracker import MemTracker  # slow to import

    with FakeTensorMode():
        with device:
            model = GPT(shape)
            x, y = (torch.zeros(micro_batch, shape.block_size, dtype=torch.int64) for _ in range(2))
        add_adapters(model, config)
        model.requires_grad_(True)  # MemTracker knows no frozen weights; beside adapters it makes little odds
        parallelize.checkpoint_activations(model, config.grad_checkpoint)
        for parameter in model.parameters():  # gradients are there from the second micro-batch on
            parameter.data = parameter.data.to(weights_in)
            parameter.grad = torch.zeros_like(parameter)
        tracker = MemTracker()
        tracker.track_external(model)

        def forget_head(module: nn.Module, _args: Any) -> None:
            """The loss of a large vocabulary calls it for each chunk; MemTracker takes that for a mistake."""
            if module is model.head:
                tracker.memory_tracking.pop(module, None)

        with register_module_forward_pre_hook(forget_head), tracker, autocast(device, dtype):
            loss = model.loss(x, y)
        forward = peak_bytes(tracker)
        with tracker:
            loss.backward()
        backward = peak_bytes(tracker)
    held = 2 * parameter_bytes(model)
    return forward - held, backward - held


def count_update(
    shape: GPTConfig, config: TrainConfig, device: torch.device, muon_dtype: torch.dtype
) -> tuple[int, int, int, int]:
    """Count bytes of weights (with EMA), gradients and optimizer state, and the peak of a step above them."""
    from torch.distributed._tools.mem_tracker import MemTracker

    with FakeTensorMode():
        with device:
            model = GPT(shape)
        add_adapters(model, config)
        no_decay = replace(config, weight_decay=0.0)  # which takes no memory, and RowAdam's reads a number
        optimizers = build_optimizers(model, no_decay, muon_dtype)
        for parameter in trained_parameters(model).values():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:  # the first step creates the state
            optimizer.step()
        tracker = MemTracker()
        tracker.track_external(model, *optimizers)
        with tracker:
            for optimizer in optimizers:
                optimizer.step()
    weights, gradients = parameter_bytes(model), trained_bytes(model)
    state_bytes = sum(
        value.nbytes
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    ema = weights if config.ema_decay else 0
    step = max(0, peak_bytes(tracker) - weights - gradients - state_bytes)
    return weights + ema, gradients, state_bytes, step


def peak_bytes(tracker: Any) -> int:
    """Peak memory since the MemTracker was entered, in bytes."""
    return sum(sizes["Total"] for sizes in tracker.get_tracker_snapshot("peak").values())


def parameter_bytes(module: nn.Module) -> int:
    """Size of a module's parameters, in bytes."""
    return sum(parameter.nbytes for parameter in module.parameters())


def trained_bytes(module: nn.Module) -> int:
    """Size of the parameters that are trained, and so of their gradients, in bytes."""
    return sum(parameter.nbytes for parameter in trained_parameters(module).values())


def gathered_bytes(config: GPTConfig, dtype: torch.dtype) -> int:
    """Bytes that FSDP gathers for computing (see parallelize.shard).

    In `dtype`: the weights outside of the blocks, the block that computes, the next block, which is already
    being gathered, and the buffer that it arrives in. Then the gradients of one block, or of the weights
    outside of the blocks, in `dtype` and in the float32 in which they are averaged.
    """
    model = meta_model(replace(config, n_layer=1))
    block = parameter_bytes(model.blocks[0]) // torch.float32.itemsize
    outside = parameter_bytes(model) // torch.float32.itemsize - block
    narrow = dtype.itemsize
    return outside * narrow + block * (3 * narrow) + max(outside, block) * (narrow + torch.float32.itemsize)


def free(device: torch.device) -> float:
    """Free memory of a device in bytes; of main memory, no more than the limits of a container leave."""
    kind = kind_of(device)
    free_there = kind.free_memory(device)
    return min(free_there, cgroup_room()) if kind.shares_memory else free_there


def cgroup_room() -> float:
    """Bytes of main memory that the limits of a Linux container or job (its control group) leave.

    The files are those of control groups of version 2, then 1, as in the kernel's documentation.
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
                file_cache = int(
                    stat.get("total_inactive_file") or stat["inactive_file"]
                )  # freed when needed
                room = min(room, most - used + file_cache)
    return room
