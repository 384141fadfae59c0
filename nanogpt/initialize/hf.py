"""transformers: a folder with config.json and the weights, of a GPT-2 or a Qwen3, here or on the hub.

Example: if matches(folder): source = read("gpt2", folder); folder = download("gpt2")
The weights are in model.safetensors or pytorch_model.bin, in one file or in several with an index; a .bin is
read without running what a pickle may hold. The tokenizer is tokenizer.json.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor

from nanogpt.config import GPTConfig
from nanogpt.errors import UserError, first_line, require
from nanogpt.initialize.names import to_our_names
from nanogpt.initialize.source import (
    Need,
    PretrainedModel,
    count,
    misfits,
    number,
    own_width,
    read_json,
    read_safetensors,
    read_torch,
    refuse,
    rope_config,
    tensors_in,
)
from nanogpt.model.foreign_names import GPT2, QWEN3, Names
from nanogpt.terminal.console import say
from nanogpt.tokenizer.base import Tokenizer
from nanogpt.tokenizer.registry import from_file

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

HUB_FILES = ("config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json")
HUB_BIN_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""Weights that GPT-2 keeps transposed, (in, out)."""

BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
"""Ends of the names of constants that old versions saved."""

ROPE_KEYS = ("rope_type", "type", "rope_theta")

COMMON_NEEDS = {"is_decoder": Need((False, True), False), "quantization_config": Need((None,), None)}

GPT2_NEEDS = {
    **COMMON_NEEDS,
    "activation_function": Need(("gelu", "gelu_new", "gelu_pytorch_tanh"), "gelu_new"),
    "layer_norm_epsilon": Need((1e-5,), 1e-5),
    "scale_attn_weights": Need((True,), True),
    "scale_attn_by_inverse_layer_idx": Need((False,), False),
    "add_cross_attention": Need((False,), False),
}

QWEN3_NEEDS = {
    **COMMON_NEEDS,
    "hidden_act": Need(("silu",), "silu"),
    "rms_norm_eps": Need((1e-6,), 1e-6),
    "rope_type": Need(("default",), "default"),
    "rope_parameters": Need(([], None), None),
    "attention_bias": Need((False,), False),
    "use_sliding_window": Need((False,), False),
}


class Family(NamedTuple):
    """An architecture of transformers that is one of ours."""

    needs: Mapping[str, Need]
    names: Names
    config: Callable[[Mapping[str, Any]], GPTConfig]
    """The architecture that config.json describes, if it is as the needs say."""
    problems: Callable[[Mapping[str, Any]], list[str]]
    """What else of config.json does not fit."""
    prefix: str
    """What the names of all tensors but the head begin with, if the model was saved with its head."""


def matches(folder: Path) -> bool:
    """Whether a folder is a model of transformers."""
    return (folder / "config.json").is_file()


def read(name: str, folder: Path) -> PretrainedModel:
    """The model in a folder. Raises: UserError that lists what does not fit."""
    content = read_json(folder / "config.json")
    kind = content.get("model_type")
    require(
        isinstance(kind, str) and kind in FAMILIES,
        f"--init_from {name} is a model of type {kind}: this program has {' and '.join(FAMILIES)}",
    )
    family = FAMILIES[cast(str, kind)]
    content |= rope_settings(content)
    refuse(name, [*misfits(content, family.needs), *family.problems(content)])
    config = family.config(content)

    def weights() -> dict[str, Tensor]:
        """The weights, from all files."""
        tensors = {key: tensor for path in weight_files(folder) for key, tensor in read_file(path).items()}
        return to_our_names(family.names, config, to_linear(tensors, family), name)

    path = folder / "tokenizer.json"

    def tokenizer() -> Tokenizer:
        """The tokenizer."""
        require(path.is_file(), f"--init_from {name} has no tokenizer.json: save that of the model there")
        return from_file(path)

    weight_files(folder)  # that they are there is seen before anything is made
    return PretrainedModel(name, "transformers", config, weights, tokenizer, str(path))


def rope_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of RoPE, which version 5 has in rope_parameters, and 4 beside the others.

    rope_parameters: the names of those that are not known here.
    """
    described: Any = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(described, dict):
        return {"rope_type": described}
    nested = cast(dict[str, Any], described)
    others = sorted(name for name, value in nested.items() if name not in ROPE_KEYS and value is not None)
    settings = {
        "rope_type": nested.get("rope_type", nested.get("type", "default")),
        "rope_parameters": others,
    }
    return settings | ({"rope_theta": nested["rope_theta"]} if "rope_theta" in nested else {})


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights. Raises: UserError if one is missing."""
    for single in WEIGHT_FILES:
        if (folder / single).is_file():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            parts: Any = read_json(index).get("weight_map")
            require(isinstance(parts, dict), f"{index} has no weight_map")
            names = sorted({str(part) for part in cast(dict[str, Any], parts).values()})
            for name in names:
                require(Path(name).name == name, f"{index} names a file elsewhere: {name}")
                require((folder / name).is_file(), f"{folder / name} is missing: copy all files of the model")
            return [folder / name for name in names]
    raise UserError(f"{folder} has no weights: {' or '.join(WEIGHT_FILES)}")


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of weights."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return tensors_in(read_torch(path), path)


def to_linear(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Tensors by the names in the family's table, in the layout of nn.Linear, without constants."""
    found: dict[str, Tensor] = {}
    whole = any(name.startswith(family.prefix) for name in tensors)
    for name, tensor in tensors.items():
        if name.endswith(BUFFERS):
            continue
        bare = name.removeprefix(family.prefix) if whole else name
        key = bare if family.names is GPT2 or name.startswith("lm_head.") else f"{family.prefix}{bare}"
        found[key] = tensor.T if family.names is GPT2 and name.endswith(CONV1D) else tensor
    return found


def gpt2_config(content: Mapping[str, Any]) -> GPTConfig:
    """GPT-2."""
    exact = content.get("activation_function", "gelu_new") == "gelu"
    width = count(content, "n_embd", 768)
    return GPTConfig(
        block_size=count(content, "n_positions", 1024),
        n_layer=count(content, "n_layer", 12),
        n_head=count(content, "n_head", 12),
        n_embd=width,
        mlp="gelu" if exact else "gelu_tanh",
        mlp_width=own_width(count(content, "n_inner", 4 * width), width, gated=False),
        tied=bool(content.get("tie_word_embeddings", True)),
        vocab_size=count(content, "vocab_size", 50257),
    )


def gpt2_problems(content: Mapping[str, Any]) -> list[str]:
    """Nothing beside the needs."""
    del content
    return []


def qwen3_config(content: Mapping[str, Any]) -> GPTConfig:
    """Qwen3."""
    width, heads = count(content, "hidden_size"), count(content, "num_attention_heads")
    return rope_config(
        block_size=count(content, "max_position_embeddings"),
        n_layer=count(content, "num_hidden_layers"),
        n_head=heads,
        n_kv_head=count(content, "num_key_value_heads", heads),
        head_width=count(content, "head_dim", 128),
        n_embd=width,
        norm="rmsnorm",
        rope_base=number(content, "rope_theta", 10_000.0),
        mlp="swiglu",
        mlp_width=count(content, "intermediate_size"),
        bias=False,
        qk_norm=True,
        tied=bool(content.get("tie_word_embeddings", False)),
        vocab_size=count(content, "vocab_size"),
    )


def qwen3_problems(content: Mapping[str, Any]) -> list[str]:
    """Layers that see a part of the text."""
    layers = set(cast("list[str]", content.get("layer_types") or [])) - {"full_attention"}
    return [f"layer_types has {kind} (here full_attention)" for kind in sorted(layers)]


FAMILIES = {
    "gpt2": Family(GPT2_NEEDS, GPT2, gpt2_config, gpt2_problems, "transformer."),
    "qwen3": Family(QWEN3_NEEDS, QWEN3, qwen3_config, qwen3_problems, "model."),
}
"""Every model_type that fits -> its architecture."""

# --- the hub ---


def is_hub_name(name: str) -> bool:
    """Whether a name can be that of a model on the hub: NAME or OWNER/NAME, and no file of a usual kind."""
    is_file = name.endswith((".pt", ".pth", ".bin", ".safetensors", ".json", ".gguf"))
    return not is_file and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) is not None


def download(name: str) -> Path:
    """The folder of a model of the hub, downloaded unless it is in the cache. Raises: UserError."""
    import huggingface_hub

    fetch = partial(cast(Any, huggingface_hub).snapshot_download, repo_id=name)
    try:
        return Path(fetch(allow_patterns=[*HUB_FILES, *HUB_BIN_FILES], local_files_only=True))
    except Exception:  # not in the cache: the library has a class for each reason
        say(f"Downloading {name} from the hub")
    try:
        folder = Path(fetch(allow_patterns=list(HUB_FILES)))
        if not list(folder.glob("*.safetensors")):
            folder = Path(fetch(allow_patterns=[*HUB_FILES, *HUB_BIN_FILES]))
    except Exception as error:
        raise UserError(
            f"--init_from {name} is neither here nor can it be had from the hub ({first_line(error)}): check "
            "the path, or the name"
        ) from error
    return folder
