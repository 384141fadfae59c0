"""Names that other programs have for the weights of a GPT: tables that exports, imports and adapters share.

Example: foreign_names(QWEN3, "blocks.0.attn.qkv.weight")      # q_proj, k_proj and v_proj of layer 0
A table says for each layer of ours which layers it is elsewhere; {} is the number of a block. Where the other
side keeps several matrices that are one of ours (query, key and value; gate and up), theirs are its rows.
"""

import re
from collections.abc import Mapping

from nanogpt.config import GPTConfig

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

GPT2_GGUF: Names = {
    "token_embedding": ("token_embd",),
    "position_embedding": ("position_embd",),
    "blocks.{}.norm_1": ("blk.{}.attn_norm",),
    "blocks.{}.attn.qkv": ("blk.{}.attn_qkv",),
    "blocks.{}.attn.proj": ("blk.{}.attn_output",),
    "blocks.{}.norm_2": ("blk.{}.ffn_norm",),
    "blocks.{}.mlp.fc": ("blk.{}.ffn_up",),
    "blocks.{}.mlp.proj": ("blk.{}.ffn_down",),
    "final_norm": ("output_norm",),
    "head": ("output",),
}
QWEN3_GGUF: Names = {
    "token_embedding": ("token_embd",),
    "blocks.{}.norm_1": ("blk.{}.attn_norm",),
    "blocks.{}.attn.qkv": ("blk.{}.attn_q", "blk.{}.attn_k", "blk.{}.attn_v"),
    "blocks.{}.attn.q_norm": ("blk.{}.attn_q_norm",),
    "blocks.{}.attn.k_norm": ("blk.{}.attn_k_norm",),
    "blocks.{}.attn.proj": ("blk.{}.attn_output",),
    "blocks.{}.norm_2": ("blk.{}.ffn_norm",),
    "blocks.{}.mlp.fc": ("blk.{}.ffn_gate", "blk.{}.ffn_up"),
    "blocks.{}.mlp.proj": ("blk.{}.ffn_down",),
    "final_norm": ("output_norm",),
    "head": ("output",),
}
"""Both in GGUF, the format of llama.cpp."""

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


def piece_sizes(config: GPTConfig, rows: int, count: int) -> list[int]:
    """Rows of each matrix elsewhere: queries, keys and values, if there are three of them; else all equal."""
    if count != 3:
        return [rows // count] * count
    keys = (config.n_kv_head or config.n_head) * config.head_width
    return [config.n_head * config.head_width, keys, keys]


def foreign_names(names: Names, ours: str) -> list[str]:
    """The names elsewhere of a weight, such as blocks.3.attn.qkv.weight."""
    layer, _, kind = ours.rpartition(".")
    block = re.match(r"blocks\.(\d+)\.", layer)
    number = block[1] if block else ""
    key = layer.replace(f"blocks.{number}.", "blocks.{}.", 1) if block else layer
    return [f"{theirs.format(number)}.{kind}" for theirs in names[key]]
