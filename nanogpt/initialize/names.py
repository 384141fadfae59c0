"""The names that other programs have for our weights, and the way from theirs to ours.

Example:    weights = to_our_names(GPT2, config, tensors, "gpt2")
            foreign_names(QWEN3, "blocks.0.attn.qkv.weight")
A table says for each layer of ours which layers it is elsewhere; {} is the number of a block. Where the other
side keeps several matrices that are one of ours (query, key and value; gate and up), theirs are its rows.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from nanogpt.config import GPTConfig
from nanogpt.initialize.source import refuse, to_float32
from nanogpt.model.size import meta_model

Names = Mapping[str, tuple[str, ...]]
"""Layer of ours -> the layers that it is elsewhere, in the order of its rows."""

GPT2: Names = {
    "token_embedding": ("wte",),
    "position_embedding": ("wpe",),
    "blocks.{}.norm_1": ("h.{}.ln_1",),
    "blocks.{}.attn.qkv": ("h.{}.attn.c_attn",),
    "blocks.{}.attn.proj": ("h.{}.attn.c_proj",),
    "blocks.{}.norm_2": ("h.{}.ln_2",),
    "blocks.{}.mlp.fc": ("h.{}.mlp.c_fc",),
    "blocks.{}.mlp.proj": ("h.{}.mlp.c_proj",),
    "final_norm": ("ln_f",),
    "head": ("lm_head",),
}
"""GPT-2 as nanoGPT and transformers have it, without the "transformer." before all but the head."""

QWEN3: Names = {
    "token_embedding": ("model.embed_tokens",),
    "blocks.{}.norm_1": ("model.layers.{}.input_layernorm",),
    "blocks.{}.attn.qkv": tuple(f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
    "blocks.{}.attn.q_norm": ("model.layers.{}.self_attn.q_norm",),
    "blocks.{}.attn.k_norm": ("model.layers.{}.self_attn.k_norm",),
    "blocks.{}.attn.proj": ("model.layers.{}.self_attn.o_proj",),
    "blocks.{}.norm_2": ("model.layers.{}.post_attention_layernorm",),
    "blocks.{}.mlp.fc": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "blocks.{}.mlp.proj": ("model.layers.{}.mlp.down_proj",),
    "final_norm": ("model.norm",),
    "head": ("lm_head",),
}
"""Qwen3 in transformers."""

LITGPT: Names = {
    "token_embedding": ("transformer.wte",),
    "blocks.{}.norm_1": ("transformer.h.{}.norm_1",),
    "blocks.{}.attn.qkv": ("transformer.h.{}.attn.qkv",),
    "blocks.{}.attn.q_norm": ("transformer.h.{}.attn.norm_q",),
    "blocks.{}.attn.k_norm": ("transformer.h.{}.attn.norm_k",),
    "blocks.{}.attn.proj": ("transformer.h.{}.attn.proj",),
    "blocks.{}.norm_2": ("transformer.h.{}.norm_2",),
    "blocks.{}.mlp.fc": ("transformer.h.{}.mlp.fc",),
    "blocks.{}.mlp.proj": ("transformer.h.{}.mlp.proj",),
    "final_norm": ("transformer.ln_f",),
    "head": ("lm_head",),
}
LITGPT_GATED: Names = {
    **LITGPT,
    "blocks.{}.mlp.fc": ("transformer.h.{}.mlp.fc_1", "transformer.h.{}.mlp.fc_2"),
}
"""litgpt, with an MLP of two matrices or of three."""


def foreign_names(names: Names, ours: str) -> list[str]:
    """The names elsewhere of a weight, such as blocks.3.attn.qkv.weight."""
    layer, _, kind = ours.rpartition(".")
    block = re.match(r"blocks\.(\d+)\.", layer)
    number = block[1] if block else ""
    key = layer.replace(f"blocks.{number}.", "blocks.{}.", 1) if block else layer
    return [f"{theirs.format(number)}.{kind}" for theirs in names[key]]


def to_our_names(
    names: Names, config: GPTConfig, tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """All weights of a model by our names, in float32, without a head that is tied.

    tensors: by the names in the table, each in the layout of nn.Linear, (out, in).
    Raises: UserError that lists every tensor that is missing, unknown, or of another shape.
    """
    left, found, problems = dict(tensors), dict[str, Tensor](), list[str]()
    for name, expected in meta_model(config).state_dict().items():
        parts = {theirs: left.pop(theirs, None) for theirs in foreign_names(names, name)}
        if config.tied and name == "head.weight":  # the embedding again, if it is there at all
            continue
        problems += [f"{theirs} is missing" for theirs, part in parts.items() if part is None]
        there = [part for part in parts.values() if part is not None]
        if len(there) < len(parts):
            continue
        if sum(len(part) for part in there) != len(expected) or there[0].shape[1:] != expected.shape[1:]:
            shapes = " and ".join(str(tuple(part.shape)) for part in there)
            problems.append(f"{' and '.join(parts)} is of shape {shapes}, not {tuple(expected.shape)}")
            continue
        found[name] = there[0] if len(there) == 1 else torch.cat(there)
    refuse(source, [*problems, *(f"{theirs} is unknown" for theirs in left)])
    return to_float32(found)
