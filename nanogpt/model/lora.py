"""LoRA: low-rank adapters beside linear layers whose weights are frozen (Hu et al., 2021).

Example: add_adapters(model, config)
         plain.load_state_dict(merged(model.state_dict(), adapter_scale(config)))
A layer with weight W (O, I) computes x W^T + scale x A^T B^T. At first A (R, I) is random and B (O, R) is
zero, so the model starts unchanged. Merged, it is an ordinary layer with the weight W + scale B A.

Shapes: O outputs, I inputs, R rank
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.config import TrainConfig
from nanogpt.model.gpt import GPT
from nanogpt.model.kernels import Dropout

A, B = "lora_a", "lora_b"
"""Names of the two matrices in a layer."""


class LoRALinear(nn.Module):
    """A linear layer with an adapter. weight and bias are those of the layer, and keep their names."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        outputs, inputs = linear.weight.shape
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, inputs))
        self.lora_b = nn.Parameter(linear.weight.new_empty(outputs, rank))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        adapted = F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + self.scale * adapted


def add_adapters(model: GPT, config: TrainConfig) -> None:
    """Add an adapter to every linear layer of the blocks, in place, and freeze all other weights.

    Does nothing if config.lora_rank is 0.
    """
    if not config.lora_rank:
        return
    model.requires_grad_(False)
    for module in list(model.blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                adapted = LoRALinear(child, config.lora_rank, adapter_scale(config), config.lora_dropout)
                setattr(module, name, adapted)
    if not model.token_embedding.weight.is_meta:
        model.load_state_dict(first_adapters(model, config.seed), strict=False)


def adapter_scale(config: TrainConfig) -> float:
    """The factor of the adapters' outputs: alpha / rank."""
    return alpha_of(config) / config.lora_rank


def alpha_of(config: TrainConfig) -> float:
    """--lora_alpha, or its default."""
    return 2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha


def first_adapters(model: GPT, seed: int) -> dict[str, Tensor]:
    """The initial values of a model's adapters, by name; the same for a model on any device."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name.endswith(f".{A}"):
            bound = 1 / math.sqrt(parameter.shape[1])
            found[name] = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        elif name.endswith(f".{B}"):
            found[name] = torch.zeros(parameter.shape)
    return found


def is_adapter(name: str) -> bool:
    """Whether the weight of this name belongs to an adapter."""
    return name.endswith((f".{A}", f".{B}"))


def merged(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights of a model without adapters that computes the same."""
    plain = {name: weight for name, weight in weights.items() if not is_adapter(name)}
    for name, a in weights.items():
        if name.endswith(f".{A}"):
            layer = name.removesuffix(f".{A}")
            product = weights[f"{layer}.{B}"].double() @ a.double()
            weight = plain[f"{layer}.weight"]
            plain[f"{layer}.weight"] = (weight.double() + scale * product).to(weight.dtype)
    return plain
