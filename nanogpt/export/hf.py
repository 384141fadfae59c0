"""Hugging Face: a folder that transformers loads without code of ours, as GPT-2 or Qwen3.

Example: write(source, Path("my_model"), "f32", advance)
         AutoModelForCausalLM.from_pretrained("my_model"); AutoTokenizer.from_pretrained("my_model")
The folder can be uploaded to the hub as it is.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nanogpt.config import GPTConfig
from nanogpt.export.card import model_card
from nanogpt.export.families import closest_family, pieces
from nanogpt.export.safetensors import write_tensors
from nanogpt.export.source import Advance, TrainedModel, to_dtype
from nanogpt.export.tokenizer_json import tokenizer_config, tokenizer_json
from nanogpt.model.gpt import default_hidden_dim

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")

TORCH_DTYPE = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}

CONV1D = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
"""Layers that transformers' GPT-2 keeps transposed, (in, out)."""


def misfits(source: TrainedModel) -> list[str]:
    """What of a model transformers cannot express."""
    return closest_family(source.config).misfits(source.config)


def write(source: TrainedModel, folder: Path, dtype: str, advance: Advance) -> None:
    """Write the folder. Raises: OSError; UserError if the weights are too large for the dtype."""
    folder.mkdir()
    family = closest_family(source.config)
    described = tokenizer_json(source.tokenizer)
    config = {
        **CONFIGS[family.key](source.config),
        "vocab_size": source.config.vocab_size,
        "tie_word_embeddings": source.config.tied,
        "bos_token_id": source.tokenizer.end_of_text,  # null is said: GPT-2's default is 50256
        "eos_token_id": source.tokenizer.end_of_text,
        "torch_dtype": TORCH_DTYPE[dtype],
    }
    tensors: dict[str, Tensor] = {}
    for name, _, tensor in pieces(family, source.config, source.weights):
        transposed = name.endswith(tuple(f"{layer}.weight" for layer in CONV1D))
        tensors[full_name(name, source.config)] = to_dtype(name, tensor.T if transposed else tensor, dtype)
        advance(tensor.numel())
    write_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", described)
    write_json(
        folder / "tokenizer_config.json",
        tokenizer_config(described, source.tokenizer, source.config.block_size),
    )
    (folder / "README.md").write_text(model_card(source, dtype), "utf-8")


def full_name(name: str, config: GPTConfig) -> str:
    """The name of a tensor in the file.

    transformers takes GPT-2 with and without "transformer.", and MLX only without; but beside an untied
    lm_head, transformers 4 takes it only with, and MLX has no such model.
    """
    bare = config.tied or config.positions != "learned" or name.startswith("lm_head.")
    return name if bare else f"transformer.{name}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def gpt2_config(config: GPTConfig) -> dict[str, Any]:
    """The settings of GPT2LMHeadModel."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.mlp_width or default_hidden_dim(config.n_embd, gated=False),
        "activation_function": {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[config.mlp],
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": config.attn_dropout,
    }


def qwen3_config(config: GPTConfig) -> dict[str, Any]:
    """The settings of Qwen3ForCausalLM. Version 5 of transformers reads rope_parameters, 4 rope_theta."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "max_position_embeddings": config.block_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head or config.n_head,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width or default_hidden_dim(config.n_embd, gated=True),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "attention_bias": False,
        "attention_dropout": config.attn_dropout,
        "use_sliding_window": False,
    }


CONFIGS: dict[str, Callable[[GPTConfig], dict[str, Any]]] = {"gpt2": gpt2_config, "qwen3": qwen3_config}
"""Key of a family -> the settings in its config.json."""
