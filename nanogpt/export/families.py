"""Families: the architectures that other programs know, and their names for our weights.

Example: family = closest_family(config); family.misfits(config) or list(pieces(family, config, weights))
A family says which values of GPTConfig it can express, and has its tables of names (model/foreign_names.py).
Most weights are the same tensor under another name. Where the other side keeps several matrices that are one
of ours, ours is cut by rows.
To add a family, write its tables, a row in FAMILIES, its config.json (hf.py) and its header (gguf.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nanogpt.config import GPTConfig
from nanogpt.model.foreign_names import GPT2 as GPT2_NAMES
from nanogpt.model.foreign_names import GPT2_GGUF, QWEN3_GGUF, Names, foreign_names, piece_sizes
from nanogpt.model.foreign_names import QWEN3 as QWEN3_NAMES


class Piece(NamedTuple):
    """A tensor under its names in other programs, in the layout of nn.Linear: (out, in)."""

    hf: str
    gguf: str
    tensor: Tensor


@dataclass(frozen=True)
class Family:
    """An architecture of other programs."""

    key: str
    """Its name in config.json (model_type) and in GGUF (general.architecture)."""
    title: str
    needs: Mapping[str, tuple[object, ...]]
    """Field of GPTConfig -> the values that it can have."""
    hf: Names
    gguf: Names
    biases: bool = False
    """Whether every linear layer and norm has a bias. If ours has none, it is zero."""

    def misfits(self, config: GPTConfig) -> list[str]:
        """The settings that it cannot express, as flags."""
        if config.n_kv_head == config.n_head:
            config = replace(config, n_kv_head=None)
        if config.n_head * config.head_width == config.n_embd:
            config = replace(config, head_dim=None)
        return [
            flag(config, name) for name, values in self.needs.items() if getattr(config, name) not in values
        ]


PLAIN: dict[str, tuple[object, ...]] = {"logit_cap": (0,), "ngram_vocab": (0,)}
"""What no family has."""

GPT2 = Family(
    key="gpt2",
    title="GPT-2",
    needs={
        "positions": ("learned",),
        "norm": ("layernorm",),
        "mlp": ("gelu", "gelu_tanh"),
        "n_kv_head": (None,),
        "head_dim": (None,),
        "qk_norm": (False,),
        **PLAIN,
    },
    hf=GPT2_NAMES,
    gguf=GPT2_GGUF,
    biases=True,
)

QWEN3 = Family(
    key="qwen3",
    title="Qwen3",
    needs={
        "positions": ("rope",),
        "norm": ("rmsnorm",),
        "mlp": ("swiglu",),
        "bias": (False,),
        "qk_norm": (True,),
        **PLAIN,
    },
    hf=QWEN3_NAMES,
    gguf=QWEN3_GGUF,
)

FAMILIES = (GPT2, QWEN3)


def closest_family(config: GPTConfig) -> Family:
    """The family that can express most of a configuration: all of it, if one can."""
    return min(FAMILIES, key=lambda family: len(family.misfits(config)))


def flag(config: GPTConfig, name: str) -> str:
    """A setting as the flag that gives it."""
    value = getattr(config, name)
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no_{name}"
    return f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"


def pieces(family: Family, config: GPTConfig, weights: Mapping[str, Tensor]) -> Iterator[Piece]:
    """Every tensor of a model whose configuration fits a family, under the family's names.

    weights: by our names; no head.weight if it is tied.
    """
    for name, tensor in weights.items():
        yield from pieces_of(name, tensor, family, config)
        layer = name.removesuffix(".weight")
        if family.biases and layer != name and not layer.endswith(("embedding", "head")):
            bias = f"{layer}.bias"
            if bias not in weights:
                yield from pieces_of(bias, tensor.new_zeros(len(tensor)), family, config)


def pieces_of(name: str, tensor: Tensor, family: Family, config: GPTConfig) -> Iterator[Piece]:
    """A tensor as the family has it."""
    hf, gguf = foreign_names(family.hf, name), foreign_names(family.gguf, name)
    cut = torch.split(tensor, piece_sizes(config, len(tensor), len(hf)))
    yield from map(Piece, hf, gguf, cut)
