"""The state of a run as a checkpoint: its settings, its progress, its tensors or copies of them.

Example: snapshot = take_snapshot(state); save_checkpoint(path, snapshot.checkpoint)
Copies let a thread write the file while the training changes the tensors. They take as much main memory as
the file. If there is too little, the snapshot has the run's own tensors, and the training waits for the file.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanogpt.checkpoint import sharded
from nanogpt.checkpoint.format import Checkpoint
from nanogpt.checkpoint.validation import state_names
from nanogpt.config import to_dict
from nanogpt.distributed.dtensor import full_state
from nanogpt.distributed.parallelize import is_sharded
from nanogpt.machine.device import is_out_of_memory, kind_of, name_of
from nanogpt.machine.device_kind import DeviceKind, Event
from nanogpt.training import memory_estimate
from nanogpt.training.memory_estimate import HEADROOM
from nanogpt.training.state import TrainState


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint, and whether its tensors are copies that the training does not touch."""

    checkpoint: Checkpoint
    is_copied: bool
    ready: Event | None = None
    """Reached once the device has copied the tensors; None: they are copied."""


def take_snapshot(state: TrainState, *, model_only: bool = False) -> Snapshot:
    """The state as a checkpoint, its tensors copied if memory allows.

    model_only: leave out what sampling does not need.
    With FSDP all processes call it together: the tensors are gathered on the first one.
    """
    contents = model_of if model_only else checkpoint_of
    gathers = is_sharded(state.model)  # gathering makes copies in any case
    if gathers or fits_in_main_memory(state):
        kind = kind_of(state.device)
        try:
            return Snapshot(contents(state, copier(kind)), True, kind.record_event(state.device))
        except (RuntimeError, MemoryError) as error:
            if gathers or not is_out_of_memory(error):
                raise
    return Snapshot(contents(state, Tensor.detach), False)


def fits_in_main_memory(state: TrainState) -> bool:
    """Whether main memory has room for copies of the tensors."""
    shared = kind_of(state.device).shares_memory
    # Shared with the device: the rest is for the activations of the next update. Else copies are pinned, and
    # pinned memory is allocated in powers of two.
    fraction = 1 - HEADROOM if shared else HEADROOM / 2
    size = sum(tensor.nbytes for tensor in named_tensors(state).values())
    return size < fraction * memory_estimate.free(torch.device("cpu"))


def copier(kind: DeviceKind) -> Callable[[Tensor], Tensor]:
    """A function that copies a tensor to main memory; tied weights, which are one tensor, only once."""
    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def copy(tensor: Tensor) -> Tensor:
        """A view of the copy of a tensor."""
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor, kind.copy_to_host(tensor.detach())  # kept, so its id stays unique
        return copies[id(tensor)][1].detach()

    return copy


def named_tensors(state: TrainState) -> dict[str, Tensor]:
    """Weights, their average and the optimizers' states, under the names of sharded.flatten."""
    average = state.ema_model.state_dict() if state.ema_model else {}
    states = [optimizer.state_dict()["state"] for optimizer in state.optimizers]
    return sharded.flatten(state.model.state_dict(), average, states)


def checkpoint_of(state: TrainState, copy: Callable[[Tensor], Tensor]) -> Checkpoint:
    """The state as a checkpoint, its tensors copied by `copy`. With FSDP: see take_snapshot."""
    average = full(state, state.ema_model.state_dict(keep_vars=True), copy) if state.ema_model else {}
    return replace(
        header(state),
        model=full(state, state.model.state_dict(keep_vars=True), copy),
        average=average,
        optimizers=[full(state, state_of(optimizer), copy) for optimizer in state.optimizers],
    )


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer. Without a name in its state_names, a tensor could not be resumed."""
    values, named = optimizer.state_dict(), set(state_names(optimizer))
    for moments in values["state"].values():
        kept = set(moments)
        assert kept == named, f"{type(optimizer).__name__} keeps {kept}, but its state_names are {named}"
    return values


def model_of(state: TrainState, copy: Callable[[Tensor], Tensor]) -> Checkpoint:
    """A checkpoint to sample from: the model that is evaluated, without optimizer state."""
    model = state.ema_model or state.model
    weights = full(state, model.state_dict(keep_vars=True), copy)
    return replace(header(state), model=weights, optimizers=[], scaler={})


def full(state: TrainState, values: dict[str, Any], copy: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Gather and copy tensors of a state."""
    return full_state(values, is_destination=state.world.is_first, copy=copy)


def header(state: TrainState) -> Checkpoint:
    """The state as a checkpoint, without its tensors."""
    muon = {"muon_dtype": name_of(state.muon_precision.dtype)} if state.config.optimizer == "muon" else {}
    return Checkpoint(
        config=saved_settings(state),
        vocab_size=state.model.config.vocab_size,
        progress=asdict(state.progress),
        model={},
        average={},
        optimizers=[optimizer.state_dict() | {"state": {}} for optimizer in state.optimizers],
        scaler=state.scaler.state_dict(),
        precision={
            "device": state.device.type,
            "dtype": name_of(state.dtype),
            **muon,
            "num_micro_batches": state.num_micro_batches * state.world.size,
            **rounding(),
        },
        tokenizer=state.dataset.tokenizer.to_dict(),
        fingerprint=state.dataset.fingerprint,
    )


def rounding() -> dict[str, str | int]:
    """What else decides how sums are rounded on a CPU, so that runs can be equal bit for bit."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__.partition("+")[0]}


def saved_settings(state: TrainState) -> dict[str, Any]:
    """The settings of the run as a checkpoint holds them."""
    return to_dict(replace(state.config, resume=False, overwrite=False))
