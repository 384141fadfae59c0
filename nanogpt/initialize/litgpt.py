"""litgpt: a folder with lit_model.pth and model_config.yaml, where its architecture is one of ours.

Example: if matches(folder): source = read("checkpoints/mine", folder)
It has many architectures. Those fit that have RoPE over whole heads and the MLP behind the attention, not
beside it, as a small Qwen3.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

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
    read_torch,
    refuse,
    rope_config,
    tensors_in,
)
from nanogpt.model.foreign_names import LITGPT, LITGPT_GATED
from nanogpt.tokenizer.base import Tokenizer
from nanogpt.tokenizer.registry import from_file

WEIGHTS, SETTINGS = "lit_model.pth", "model_config.yaml"

NORM_EPS = {"LayerNorm": 1e-5, "RMSNorm": 1e-6}
"""Our epsilon of each of its norms."""

NONE = Need((None,), None)
NO = Need((False, None), False)

NEEDS = {
    "norm_class_name": Need(tuple(NORM_EPS), "LayerNorm"),
    "mlp_class_name": Need(("GptNeoxMLP", "LLaMAMLP"), "GptNeoxMLP"),
    "gelu_approximate": Need(("none", "tanh"), "none"),
    "norm_qk_type": Need(("default",), "default"),
    "norm_1": Need((True,), True),
    "norm_2": Need((True,), True),
    "parallel_residual": Need((False,), True),
    "rotary_percentage": Need((1.0,), 0.25),
    "rope_condense_ratio": Need((1,), 1),
    "n_expert": Need((0,), 0),
    **dict.fromkeys(
        ("post_attention_norm", "post_mlp_norm", "shared_attention_norm", "scale_embeddings", "lm_head_bias"),
        NO,
    ),
    **dict.fromkeys(
        (
            "attention_scores_scalar",
            "sliding_window_size",
            "attention_logit_softcapping",
            "rope_adjustments",
            "rope_local_base_freq",
            "rope_indices",
            "latent_attention",
        ),
        NONE,
    ),
}


def matches(folder: Path) -> bool:
    """Whether a folder is a model of litgpt."""
    return (folder / WEIGHTS).is_file() and (folder / SETTINGS).is_file()


def read(name: str, folder: Path) -> PretrainedModel:
    """The model in a folder. Raises: UserError that lists what does not fit."""
    content = read_settings(folder / SETTINGS)
    refuse(name, [*misfits(content, NEEDS), *other_problems(content)])
    config = config_of(content)
    names = LITGPT_GATED if config.mlp == "swiglu" else LITGPT

    def weights() -> dict[str, Tensor]:
        """The weights, which a fine-tuning of litgpt saves one level deeper."""
        saved: Any = read_torch(folder / WEIGHTS)
        inner = cast(dict[Any, Any], saved).get("model") if isinstance(saved, dict) else None
        tensors = tensors_in(saved if inner is None else inner, folder / WEIGHTS)
        return to_our_names(names, config, tensors, name)

    path = folder / "tokenizer.json"

    def tokenizer() -> Tokenizer:
        """The tokenizer."""
        require(path.is_file(), f"--init_from {name} has no tokenizer.json: copy that of the model there")
        return from_file(path)

    return PretrainedModel(name, "litgpt", config, weights, tokenizer, str(path))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in model_config.yaml. Raises: UserError."""
    try:
        import yaml

        content: Any = yaml.safe_load(path.read_text("utf-8"))
    except ModuleNotFoundError as error:
        raise UserError(f"{path} needs the package pyyaml: pip install nanogpt[finetune]") from error
    except Exception as error:  # the library has classes of its own
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    require(isinstance(content, dict), f"{path} is not a dictionary")
    return cast(dict[str, Any], content)


def other_problems(content: Mapping[str, Any]) -> list[str]:
    """What does not fit and is not in NEEDS."""
    norm = content.get("norm_class_name", "LayerNorm")
    problems: list[str] = []
    eps, ours = content.get("norm_eps", 1e-5), NORM_EPS.get(norm)
    if ours is not None and eps != ours:
        problems.append(f"norm_eps is {eps} (here {ours} for {norm})")
    model = str(content.get("name"))
    if "Gemma" in model or "OLMo" in model:
        problems.append(f"norms as {model} has them")
    return problems


def config_of(content: Mapping[str, Any]) -> GPTConfig:
    """The architecture. The head is never tied: litgpt keeps two matrices."""
    width, heads = count(content, "n_embd"), count(content, "n_head")
    gated = content.get("mlp_class_name") == "LLaMAMLP"
    exact = content.get("gelu_approximate", "none") == "none"
    rows, multiple = count(content, "vocab_size"), count(content, "padding_multiple", 512)
    return rope_config(
        block_size=count(content, "block_size"),
        n_layer=count(content, "n_layer"),
        n_head=heads,
        n_kv_head=count(content, "n_query_groups", heads),
        head_width=count(content, "head_size", width // heads),
        n_embd=width,
        norm="rmsnorm" if content.get("norm_class_name") == "RMSNorm" else "layernorm",
        rope_base=number(content, "rope_base", 10_000),
        mlp="swiglu" if gated else "gelu" if exact else "gelu_tanh",
        mlp_width=count(content, "intermediate_size", 4 * width),
        bias=bool(content.get("bias", True)),
        qk_norm=bool(content.get("norm_qk", False)),
        tied=False,
        logit_cap=float(content.get("final_logit_softcapping") or 0.0),
        vocab_size=count(content, "padded_vocab_size", -(-rows // multiple) * multiple),
    )
