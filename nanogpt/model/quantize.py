"""Weights in fewer bits, for sampling, where a token takes about as long as reading the weights from memory.

Example: quantize(model, "int8")            or: narrow_weights(model, torch.bfloat16), for use under autocast
Linear layers, including the output layer, are replaced from outside; embeddings and norms stay as they are.
Not for training: the new layers have no gradients.

Shapes: N positions, O outputs, I inputs of a layer
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.machine.device import seconds_of

LEVELS = 127
"""Weights in 8 bits are integers from -LEVELS to LEVELS."""

PACKED_MAX_POSITIONS = 8
"""For more positions, the kernel for packed weights is slower than a product in bfloat16."""

TRIAL_REPEATS = 5
"""Number of timings of a kernel, to see whether it is fast on this device."""


class Int8Linear(nn.Module):
    """A linear layer whose weights are 8-bit integers q with a scale s for each output: y = (x q^T) s + b.

    Computed in bfloat16, which holds these integers exactly, and accumulated in float32.
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
        """The integers in bfloat16, (O, I); made on first use: for many positions, or on other devices."""

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
        """The weights that the integers stand for, (O, I) float32."""
        return self.weight.float() * self.scale.float()[:, None]


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row of a weight (O, I) with its own scale: (O, I) int8 and scales, (O,) bfloat16.

    The scale is rounded to bfloat16 before it is used, so that its rounding adds no error.
    """
    largest = weight.abs().amax(dim=1)  # (O,)
    scale = (largest / LEVELS).clamp(min=torch.finfo(torch.float32).tiny).to(torch.bfloat16)
    steps = weight / scale.float()[:, None]
    return steps.round().clamp(-LEVELS, LEVELS).to(torch.int8), scale


def packed_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """(N, I), (O, I) int8, (O,) -> (N, O), by PyTorch's kernel for 8-bit weights."""
    return cast(Tensor, torch.ops.aten._weight_int8pack_mm(x, weight, scale))


def wide_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """(N, I), (O, I) bfloat16, (O,) -> (N, O), by an ordinary product."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight) * scale


@cache
def packed_is_fast(outputs: int, inputs: int, device: torch.device) -> bool:
    """Whether packed_product exists on the device and beats wide_product for one position, by a trial."""
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
"""Every value of --quantize but "none" -> what turns a linear layer into a quantized one."""


def quantize(model: nn.Module, kind: str) -> None:
    """Replace all linear layers of a model by quantized ones, in place."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, QUANTIZERS[kind](child))


def narrow_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights of linear layers, in place, to the dtype in which autocast multiplies them.

    Otherwise autocast would convert them again in each product, or hold them twice.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):  # a new parameter, since an embedding may be tied to the old one
            module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)


def store_by_columns(model: nn.Module) -> None:
    """Store the weights of linear layers column by column, in place: only their strides change.

    Then a product with one vector adds up columns, which a CPU does 1.3 times as fast (bench/decode.py).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach().T.contiguous().T
            module.weight = nn.Parameter(weight, requires_grad=False)


def prepare_for_sampling(
    model: nn.Module, dtype: torch.dtype, quantization: str, *, by_columns: bool = True
) -> None:
    """Give the weights, in place, the form that sampling reads fastest.

    dtype: of the matrix products. quantization: a value of --quantize. by_columns: whether to store float32
    weights by columns, which PyTorch reads fastest; native steps read rows.
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
    """A copy prepared for sampling, in evaluation mode. It shares the weights that stay in their form."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared).eval()
    prepare_for_sampling(copied, dtype, quantization, by_columns=by_columns)
    return copied


def linear_bytes(model: nn.Module) -> int:
    """Bytes of weights that each token reads: those of the linear layers, in their present dtype."""
    layers = (module for module in model.modules() if isinstance(module, (nn.Linear, Int8Linear)))
    return sum(layer.weight.nbytes for layer in layers)
