"""DeviceKind: what a kind of device can do, and what is fast on it. device.py has the kinds."""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from nanogpt.errors import require
from nanogpt.machine.graphs import Graphs

UNLIMITED = float("inf")


class Event(Protocol):
    """A point in a device's queue of work, such as a torch.cuda.Event."""

    def synchronize(self) -> None:
        """Wait until the device has reached it."""
        ...


class DeviceKind(ABC):
    """Capabilities of a kind of device. The defaults are those of a plain accelerator."""

    type: str
    """The device type in PyTorch."""
    is_async = False
    """Whether work is queued and runs asynchronously, so that reading a number makes the CPU wait."""
    uses_pinned_memory = False
    """Whether asynchronous copies to it need pinned memory."""
    compiles_by_default = False
    """Whether torch.compile is on by default in a long training."""
    shares_memory = False
    """Whether it uses main memory, so that running out of it kills the process and cannot be caught."""
    explicit_attention_max_length = 0
    """Up to this length, plain products beat the fused kernel for bfloat16 attention (bench/attention.py)."""
    slow_random_numbers = False
    """Whether drawing random numbers costs more than the products that dropout masks."""
    composes_rms_norm = False
    """Whether it has no kernel for RMS norm, so that one composed of other kernels is faster."""
    sparse_gradients = False
    """Whether it is faster to update only the touched rows of an embedding table than to update all."""
    logits_per_chunk = 2**25
    """Number of logits to compute at a time with a large vocabulary: enough for fast matrix products."""
    vocab_multiple = 1
    """The output layer is padded to a multiple of this: other sizes have no fast kernels."""
    trains_float16 = True
    """Whether training in float16, with gradient scaling, works."""
    graphs: Graphs | None = None
    """How work is captured, to be replayed as one launch; None: it cannot be."""
    distributed_backend = "gloo"
    """The torch.distributed backend for its processes."""

    @abstractmethod
    def is_available(self) -> bool:
        """Whether this PyTorch can use such a device here."""

    @abstractmethod
    def describe(self, device: torch.device) -> list[str]:
        """Lines for the user: name, memory."""

    def native_dtype(self, device: torch.device) -> tuple[torch.dtype, str] | None:
        """The best dtype that the hardware supports, and the reason; None: measure (precision.py)."""
        return None

    def find(self, device: torch.device) -> torch.device:
        """The device, with its index if it has one. Raises: UserError if it is not available."""
        require(self.is_available(), f"--device {device}: there is none here: use --device cpu")
        return device

    def unusable_reason(self) -> str:
        """Why "auto" does not use the device although it exists, in one line; "" if it does."""
        return ""

    def set_up(self, device: torch.device, dtype: torch.dtype) -> None:
        """Prepare PyTorch for computing on the device, with matrix products in `dtype`."""
        torch.set_float32_matmul_precision("highest")

    def free_memory(self, device: torch.device) -> float:
        """Free memory in bytes; infinity if the device does not tell."""
        return UNLIMITED

    def release_memory(self) -> None:
        """Free the memory that PyTorch's allocator caches."""
        return

    def synchronize(self, device: torch.device) -> None:
        """Wait until all queued work is done, as timing needs."""
        return

    def record_event(self, device: torch.device) -> Event | None:
        """An event at the end of the queue of work; None for a synchronous device."""
        return None

    def generator(self, device: torch.device, seed: int) -> torch.Generator:
        """A seeded generator of random numbers on the device."""
        return torch.Generator(device).manual_seed(seed)

    def pin_memory(self, values: Tensor) -> Tensor:
        """The values in pinned memory, if copies to the device need that."""
        return values.pin_memory() if self.uses_pinned_memory else values

    def empty_on_host(self, like: Tensor) -> Tensor:
        """Allocate main memory for the values of a tensor, pinned if asynchronous copies need that."""
        return torch.empty_like(like, device="cpu", pin_memory=self.uses_pinned_memory)

    def copy_to_host(self, values: Tensor) -> Tensor:
        """Begin to copy values to main memory; an asynchronous device is done at the next recorded event."""
        return self.empty_on_host(values).copy_(values, non_blocking=self.is_async)
