"""Families: the architectures that other programs know, and their names for our weights.

Example:    family = closest_family(config); family.misfits(config) or list(pieces(family, config, weights))
A family says which values of GPTConfig it can express, and has a table of names: ours, transformers', GGUF's.
Most weights are the same tensor under another name. Where the other side keeps several matrices that are one
of ours (query, key and value; gate and up), ours is cut by rows.
To add a family, write its table, a row in FAMILIES, its config.json (hf.py) and its header (gguf.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nanogpt.config import GPTConfig


class Row(NamedTuple):
    """Names of a layer, without its block and without .weight: ours, and those of its pieces elsewhere."""

    ours: str
    hf: tuple[str, ...]
    gguf: tuple[str, ...]


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
    outer: tuple[Row, ...]
    block: tuple[Row, ...]
    hf_block: str
    """What transformers writes before the number of a block."""
    biases: bool = False
    """Whether every linear layer and norm has a bias. If ours has none, it is zero."""

    def misfits(self, config: GPTConfig) -> list[str]:
        """The settings that it cannot express, as flags."""
        if config.n_kv_head == config.n_head:
            config = replace(config, n_kv_head=None)
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
        "qk_norm": (False,),
        **PLAIN,
    },
    outer=(
        Row("token_embedding", ("wte",), ("token_embd",)),
        Row("position_embedding", ("wpe",), ("position_embd",)),
        Row("final_norm", ("ln_f",), ("output_norm",)),
        Row("head", ("lm_head",), ("output",)),
    ),
    block=(
        Row("norm_1", ("ln_1",), ("attn_norm",)),
        Row("attn.qkv", ("attn.c_attn",), ("attn_qkv",)),
        Row("attn.proj", ("attn.c_proj",), ("attn_output",)),
        Row("norm_2", ("ln_2",), ("ffn_norm",)),
        Row("mlp.fc", ("mlp.c_fc",), ("ffn_up",)),
        Row("mlp.proj", ("mlp.c_proj",), ("ffn_down",)),
    ),
    hf_block="h",
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
    outer=(
        Row("token_embedding", ("model.embed_tokens",), ("token_embd",)),
        Row("final_norm", ("model.norm",), ("output_norm",)),
        Row("head", ("lm_head",), ("output",)),
    ),
    block=(
        Row("norm_1", ("input_layernorm",), ("attn_norm",)),
        Row(
            "attn.qkv",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("attn_q", "attn_k", "attn_v"),
        ),
        Row("attn.q_norm", ("self_attn.q_norm",), ("attn_q_norm",)),
        Row("attn.k_norm", ("self_attn.k_norm",), ("attn_k_norm",)),
        Row("attn.proj", ("self_attn.o_proj",), ("attn_output",)),
        Row("norm_2", ("post_attention_layernorm",), ("ffn_norm",)),
        Row("mlp.fc", ("mlp.gate_proj", "mlp.up_proj"), ("ffn_gate", "ffn_up")),
        Row("mlp.proj", ("mlp.down_proj",), ("ffn_down",)),
    ),
    hf_block="model.layers",
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
    for row in family.outer:
        if f"{row.ours}.weight" in weights:
            yield from pieces_of(row, family, config, weights)
    for number in range(config.n_layer):
        for row in family.block:
            numbered = Row(
                f"blocks.{number}.{row.ours}",
                tuple(f"{family.hf_block}.{number}.{name}" for name in row.hf),
                tuple(f"blk.{number}.{name}" for name in row.gguf),
            )
            yield from pieces_of(numbered, family, config, weights)


def pieces_of(row: Row, family: Family, config: GPTConfig, weights: Mapping[str, Tensor]) -> Iterator[Piece]:
    """The weight of a layer in pieces, and its bias, if the family has one there."""
    weight = weights[f"{row.ours}.weight"]
    tensors = {"weight": weight}
    if family.biases and not row.ours.endswith(("embedding", "head")):
        tensors["bias"] = weights.get(f"{row.ours}.bias", weight.new_zeros(weight.shape[0]))
    for kind, tensor in tensors.items():
        cut = torch.split(tensor, piece_sizes(config, len(tensor), len(row.hf)))
        for hf, gguf, piece in zip(row.hf, row.gguf, cut, strict=True):
            yield Piece(f"{hf}.{kind}", f"{gguf}.{kind}", piece)


def piece_sizes(config: GPTConfig, rows: int, count: int) -> list[int]:
    """Rows of each piece: queries, keys and values, if there are three of them; else all equal."""
    if count != 3:
        return [rows // count] * count
    keys = (config.n_kv_head or config.n_head) * config.head_dim
    return [config.n_head * config.head_dim, keys, keys]
