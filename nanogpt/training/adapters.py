"""LoRA adapters of a training as a folder that peft loads on top of the base model.

Example: save_adapters(Path("out/adapter"), load_checkpoint(Path("out/ckpt.pt")))
         PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(...), "out/adapter")
transformers keeps Qwen3's query, key and value, and the two halves of its MLP, in separate matrices: each
gets the adapter's A and its own rows of B, which gives the same product.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from nanogpt.checkpoint.format import ADAPTER_FILE, Checkpoint
from nanogpt.config import GPTConfig
from nanogpt.model.foreign_names import GPT2, QWEN3, Names, foreign_names, piece_sizes
from nanogpt.model.lora import A, B, alpha_of
from nanogpt.storage.files import atomic_write, make_folder

WEIGHTS_FILE = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""What peft puts before the name of a layer."""


def save_adapters(folder: Path, saved: Checkpoint) -> bool:
    """Write the adapters in a checkpoint. Returns False if transformers has no such model to load them into.

    Raises: UserError if the folder cannot be written; ModuleNotFoundError without safetensors.
    """
    from safetensors.torch import save  # pyright: ignore[reportUnknownVariableType]

    names = names_of(saved.model_config)
    if names is None:
        return False
    tensors = peft_tensors(names, saved)
    config = saved.train_config
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.init_from,
        "r": config.lora_rank,
        "lora_alpha": alpha_of(config),
        "lora_dropout": config.lora_dropout,
        "target_modules": sorted({target(name) for name in tensors}),
        "bias": "none",
        "fan_in_fan_out": names is GPT2,
        "inference_mode": True,
    }
    make_folder(folder)
    with atomic_write(folder / WEIGHTS_FILE) as file:
        file.write(save(tensors, {"format": "pt"}))
    with atomic_write(folder / ADAPTER_FILE) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
    return True


def names_of(config: GPTConfig) -> Names | None:
    """The names that transformers has for a model's layers; None if it has no such architecture."""
    if config.logit_cap or config.ngram_vocab:
        return None
    kv_heads, heads_width = config.n_kv_head or config.n_head, config.n_head * config.head_width
    gpt2 = ("learned", "layernorm", False, config.n_head, config.n_embd), ("gelu", "gelu_tanh")
    qwen3 = ("rope", "rmsnorm", True, kv_heads, heads_width), ("swiglu",)
    shape = (config.positions, config.norm, config.qk_norm, kv_heads, heads_width)
    for names, (wanted, activations) in ((GPT2, gpt2), (QWEN3, qwen3)):
        if shape == wanted and config.mlp in activations and (names is GPT2 or not config.bias):
            return names
    return None


def peft_tensors(names: Names, saved: Checkpoint) -> dict[str, Tensor]:
    """The adapters under peft's names: each part of a layer of ours gets all of A, and its rows of B."""
    config, weights = saved.model_config, saved.average or saved.model
    prefix = PREFIX + ("transformer." if names is GPT2 else "")
    found: dict[str, Tensor] = {}
    for name, a in weights.items():
        layer, _, kind = name.rpartition(".")
        if kind != A:
            continue
        parts = foreign_names(names, f"{layer}.weight")
        b = weights[f"{layer}.{B}"]
        sizes = piece_sizes(config, len(b), len(parts))
        for part, rows in zip(parts, torch.split(b, sizes), strict=True):
            module = prefix + part.removesuffix(".weight")
            found[f"{module}.lora_A.weight"] = a.detach().clone()  # tensors in one file share no memory
            found[f"{module}.lora_B.weight"] = rows.detach().clone()
    return found


def target(name: str) -> str:
    """The name of a module within its block, such as attn.c_attn, from the name of a tensor."""
    return ".".join(name.split(".")[-4:-2])
