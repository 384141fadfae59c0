"""A trained model to start from: its architecture, its tokenizer, its weights under our names.

Example: source = open_source("gpt2"); source.settings; source.weights()      # initialize/registry.py
A reader of a format makes a PretrainedModel from what a file says about itself. The weights are read when
they are asked for. What of a model has no counterpart here is refused, all of it in one message (`refuse`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from nanogpt.checkpoint.format import read_plain
from nanogpt.config import SHAPE_FIELDS, GPTConfig, MLPKind
from nanogpt.errors import UserError, first_line, require
from nanogpt.model.gpt import default_hidden_dim
from nanogpt.settings import show_value
from nanogpt.tokenizer.base import Tokenizer

MAX_PROBLEMS = 12
"""Problems that a message lists."""


@dataclass(frozen=True)
class PretrainedModel:
    """A trained model."""

    name: str
    """What --init_from says."""
    program: str
    """The program that it is from."""
    config: GPTConfig
    """The architecture. vocab_size: rows of the embedding, which may be more than tokens."""
    weights: Callable[[], dict[str, Tensor]]
    """Reads the weights: by our names, float32, without a head that is tied."""
    tokenizer: Callable[[], Tokenizer]
    """Opens the tokenizer."""
    prepare_with: str
    """What `data.py --tokenizer` takes for the same tokens."""
    num_tokens: int | None = None
    """Number of tokens, where it is known before the tokenizer is opened."""

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of a TrainConfig that the architecture decides."""
        return {name: getattr(self.config, name) for name in SHAPE_FIELDS}


class Need(NamedTuple):
    """What a setting of another program must be."""

    values: tuple[object, ...]
    """The values that this program can express."""
    default: object
    """The value if the file has none."""


def misfits(content: Mapping[str, Any], needs: Mapping[str, Need]) -> list[str]:
    """The settings with a value that this program cannot express, in words. needs: by name."""
    found: list[str] = []
    for name, need in needs.items():
        value = content.get(name, need.default)
        if value not in need.values:
            can = " or ".join(show_value(value) for value in need.values)
            found.append(f"{name} is {show_value(value)} (here {can})")
    return found


def refuse(name: str, problems: Sequence[str]) -> None:
    """Raise UserError with all problems of the model `name`, if there are any."""
    more = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
    require(
        not problems,
        f"--init_from {name} has what this program does not: {'; '.join(problems[:MAX_PROBLEMS])}{more}",
    )


def count(content: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A positive whole number in the settings of a model. Raises: UserError if there is none."""
    value = content.get(name)
    value = default if value is None else value
    require(type(value) is int and value > 0, f"the model's settings have {name} {show_value(value)}")
    return cast(int, value)


def number(content: Mapping[str, Any], name: str, default: float) -> float:
    """A number in the settings of a model. Raises: UserError if there is none."""
    value = content.get(name)
    value = default if value is None else value
    require(type(value) in (int, float), f"the model's settings have {name} {show_value(value)}")
    return float(cast(float, value))


def rope_config(
    *, n_embd: int, n_head: int, n_kv_head: int, head_width: int, mlp_width: int, mlp: MLPKind, **others: Any
) -> GPTConfig:
    """The architecture of a model with RoPE: widths that are our defaults become None, as we have them.

    others: further fields of GPTConfig.
    """
    return GPTConfig(
        n_embd=n_embd,
        n_head=n_head,
        n_kv_head=None if n_kv_head == n_head else n_kv_head,
        head_dim=None if head_width * n_head == n_embd else head_width,
        mlp=mlp,
        mlp_width=own_width(mlp_width, n_embd, gated=mlp == "swiglu"),
        positions="rope",
        **others,
    )


def own_width(width: int, n_embd: int, *, gated: bool) -> int | None:
    """The value of mlp_width for a width; None for the default."""
    return None if width == default_hidden_dim(n_embd, gated=gated) else width


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a dictionary. Raises: UserError if it cannot be read."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    require(isinstance(content, dict), f"{path} is not a dictionary")
    return cast(dict[str, Any], content)


def read_torch(path: Path) -> Any:
    """What torch.save wrote: tensors and plain types alone, memory-mapped. Raises: UserError."""
    try:
        try:
            return read_plain(path, mmap=True)
        except RuntimeError:  # the format before PyTorch 1.6, or a file system without memory maps
            return read_plain(path)
    except Exception as error:  # torch.load may raise anything for a malicious file
        raise UserError(f"{path} holds no weights that can be read: {first_line(error)}") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, memory-mapped. Raises: UserError."""
    try:
        from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

        return load_file(path)
    except ModuleNotFoundError as error:
        raise UserError(f"{path} needs the package safetensors: pip install nanogpt[finetune]") from error
    except Exception as error:  # the library raises a class of its own
        raise UserError(f"{path} holds no weights that can be read: {first_line(error)}") from error


def tensors_in(content: Any, path: Path) -> dict[str, Tensor]:
    """A state_dict. Raises: UserError if it is none."""
    named = cast(dict[Any, Any], content) if isinstance(content, dict) else {}
    is_state = all(isinstance(name, str) and isinstance(value, Tensor) for name, value in named.items())
    require(bool(named) and is_state, f"{path} holds no weights by name")
    return cast(dict[str, Tensor], named)


def to_float32(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the dtype of training. Raises: UserError if they are not floating-point numbers."""
    wrong = [name for name, weight in weights.items() if not weight.is_floating_point()]
    require(not wrong, f"{', '.join(wrong[:1])} is quantized: give the model with its full weights")
    return {name: weight.to(torch.float32) for name, weight in weights.items()}
