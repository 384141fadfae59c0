"""Weights in fewer bits, for sampling: a token costs the time in which the weights are read from memory.

Example: quantize(model, "int8")            or: narrow_weights(model, torch.bfloat16), for use under autocast
Linear layers are exchanged from outside, the output layer too; embeddings and norms stay as they are. Not for
training: the new layers have no gradients.

Shapes: N positions, O outputs, I inputs of a layer
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.device import seconds_of

LEVELS = 127
"""The largest integer of a weight in 8 bits; its negative is the smallest."""

PACKED_MAX_POSITIONS = 8
"""Above so many positions the kernel for packed weights is slower than a product in bfloat16."""

TRIAL_REPEATS = 5
"""Times that a kernel is tried, to see whether it is fast on this device."""


class Int8Linear(nn.Module):
    """A linear layer whose weights are integers of 8 bits, with a scale for each output: y = (x q^T) s + b.

    Computed in bfloat16, which holds these integers exactly, and added up in float32.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize_rows(linear.weight.detach().float())
        self.register_buffer("weight", weight)  # (O, I) int8
        self.register_buffer("scale", scale)  # (O,) bfloat16
        bias = cast("Tensor | None", linear.bias)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.wide: Tensor | None = None
        """The integers as bfloat16, (O, I), once they are needed: for many positions, or on other devices."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the dtype of x."""
        narrow = x.reshape(-1, self.in_features).to(torch.bfloat16)  # (N, I)
        if len(narrow) <= PACKED_MAX_POSITIONS and packed_is_fast(*self.weight.shape, x.device):
            y = packed_product(narrow, self.weight, self.scale)
        else:
            if self.wide is None:
                self.wide = self.weight.to(torch.bfloat16)
            y = wide_product(narrow, self.wide, self.scale)
        y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def dequantized(self) -> Tensor:
        """The weights as they count, (O, I) float32."""
        return self.weight.float() * self.scale.float()[:, None]


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of a weight (O, I) to multiples of a scale: integers, (O, I) int8, and (O,) bfloat16.

    The scale is rounded first, to what bfloat16 can hold, so that its rounding adds no error.
    """
    largest = weight.abs().amax(dim=1)  # (O,)
    scale = (largest / LEVELS).clamp(min=torch.finfo(torch.float32).tiny).to(torch.bfloat16)
    steps = weight / scale.float()[:, None]
    return steps.round().clamp(-LEVELS, LEVELS).to(torch.int8), scale


def packed_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """(N, I), (O, I) int8, (O,) -> (N, O): in PyTorch's kernel for weights of 8 bits."""
    return cast(Tensor, torch.ops.aten._weight_int8pack_mm(x, weight, scale))


def wide_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """(N, I), (O, I) bfloat16, (O,) -> (N, O): in an ordinary product."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight) * scale


@cache
def packed_is_fast(outputs: int, inputs: int, device: torch.device) -> bool:
    """Whether packed_product exists on a device and is the faster one for one position, by a trial."""
    x, scale = torch.zeros(1, inputs, device=device, dtype=torch.bfloat16), torch.ones(outputs, device=device)
    packed, scale = torch.ones(outputs, inputs, device=device, dtype=torch.int8), scale.to(torch.bfloat16)
    wide = packed.to(torch.bfloat16)

    def shortest(product: Callable[[Tensor, Tensor, Tensor], Tensor], weight: Tensor) -> float:
        """The shortest time of a product, in seconds."""
        return min(seconds_of(lambda: product(x, weight, scale), device) for _ in range(TRIAL_REPEATS))

    try:
        return shortest(packed_product, packed) < shortest(wide_product, wide)
    except (RuntimeError, NotImplementedError):
        return False


QUANTIZERS: dict[str, Callable[[nn.Linear], nn.Module]] = {"int8": Int8Linear}
"""Every value of --quantize, but for "none" -> what makes a layer of a linear one."""


def quantize(model: nn.Module, kind: str) -> None:
    """Exchange all linear layers of a model for quantized ones, in place."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, QUANTIZERS[kind](child))


def narrow_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights of linear layers, in place, to the dtype in which autocast multiplies them.

    Otherwise it would convert them again in each product, or hold them twice.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):  # a new parameter, since an embedding may be tied to the old one
            module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)


def store_by_columns(model: nn.Module) -> None:
    """Store the weights of linear layers, in place, column by column: as they were, but for their strides.

    Then a product with one vector adds up columns, which a CPU does 1.3 times as fast (bench/decode.py).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach().T.contiguous().T
            module.weight = nn.Parameter(weight, requires_grad=False)


def prepare_for_sampling(
    model: nn.Module, dtype: torch.dtype, quantization: str, *, by_columns: bool = True
) -> None:
    """Give the weights the form in which they are read fastest.

    dtype: of the products. quantization: "none": no 8 bits. by_columns: whether to store weights of float32
    by columns, as PyTorch reads them fastest; native steps read rows.
    """
    if quantization != "none":
        quantize(model, quantization)
    elif dtype != torch.float32:
        narrow_weights(model, dtype)
    elif by_columns:
        store_by_columns(model)


def sampling_copy(
    model: nn.Module, dtype: torch.dtype, quantization: str, *, by_columns: bool = True
) -> nn.Module:
    """A copy prepared for sampling, in evaluation mode. It shares all weights that need no other form."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared).eval()
    prepare_for_sampling(copied, dtype, quantization, by_columns=by_columns)
    return copied


def linear_bytes(model: nn.Module) -> int:
    """Bytes of weights that a token reads: those of all layers with outputs, in the dtype that they have."""
    layers = (module for module in model.modules() if isinstance(module, (nn.Linear, Int8Linear)))
    return sum(layer.weight.nbytes for layer in layers)
