"""Our own models: a checkpoint (ckpt.pt, last.pt), or the safetensors file of `nanogpt export`.

Example: if is_checkpoint(path): source = read_checkpoint("out", path)
With a moving average of the weights, a new training starts from that; with adapters (LoRA), from the weights
that they are merged into.
"""

import json
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from nanogpt.checkpoint.format import has_seal, load_checkpoint, open_checkpoint, read_plain
from nanogpt.config import GPTConfig, from_dict
from nanogpt.errors import UserError, first_line, require
from nanogpt.initialize.source import PretrainedModel, read_safetensors, refuse, to_float32
from nanogpt.model.size import meta_model
from nanogpt.tokenizer.registry import from_dict as tokenizer_from_dict

KEY, VERSION = "nanogpt", 1
"""The entry in the metadata of an exported safetensors file, and its version."""


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint: it ends with a seal, or is one of the first, which have none."""
    if not path.is_file():
        return False
    if has_seal(path):
        return True
    try:
        content = read_plain(path, mmap=True)
    except Exception:  # torch.load may raise anything for another file
        return False
    named = cast(dict[Any, Any], content) if isinstance(content, dict) else {}
    return named.get("format") == 1 and {"model", "fingerprint"} <= named.keys()


def read_checkpoint(name: str, path: Path) -> PretrainedModel:
    """The model in a checkpoint. Raises: UserError if it is damaged."""
    try:
        saved = open_checkpoint(path)
    except UserError:  # load_checkpoint says whether it is damaged
        saved = load_checkpoint(path)
    config = saved.model_config

    def weights() -> dict[str, Tensor]:
        """The verified weights."""
        return without_tied_head(load_checkpoint(path).weights, config)

    described = saved.tokenizer
    tokenizer = lambda: tokenizer_from_dict(described)  # noqa: E731
    return PretrainedModel(name, "NanoGPT", config, weights, tokenizer, str(path))


def without_tied_head(weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The weights but for a head that is tied to the embedding."""
    return {name: w for name, w in weights.items() if not (config.tied and name == "head.weight")}


def is_safetensors(path: Path) -> bool:
    """Whether a file is a safetensors file with our metadata."""
    return path.is_file() and path.suffix == ".safetensors" and KEY in metadata(path)


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file: eight bytes of length, and so many of JSON, begin it."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, path.stat().st_size)))
        return cast(dict[str, str], header.get("__metadata__") or {})
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def read_safetensors_file(name: str, path: Path) -> PretrainedModel:
    """The model in an exported safetensors file. Raises: UserError."""
    try:
        described: dict[str, Any] = json.loads(metadata(path)[KEY])
        version = described["version"]
        require(version == VERSION, f"--init_from {name} is of version {version}: update NanoGPT")
        config = from_dict(GPTConfig, described["config"])
        saved = described["tokenizer"]
        tokenizer = tokenizer_from_dict(saved)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--init_from {name} is malformed: {first_line(error)}") from error

    def weights() -> dict[str, Tensor]:
        """The weights."""
        return checked(read_safetensors(path), config, name)

    return PretrainedModel(name, "NanoGPT", config, weights, lambda: tokenizer, str(path))


def checked(tensors: dict[str, Tensor], config: GPTConfig, name: str) -> dict[str, Tensor]:
    """Weights by our names, in float32. Raises: UserError that lists what is missing, unknown, misshapen."""
    expected = without_tied_head(meta_model(config).state_dict(), config)
    problems = [f"{key} is missing" for key in expected.keys() - tensors.keys()]
    problems += [f"{key} is unknown" for key in tensors.keys() - expected.keys()]
    problems += [
        f"{key} is of shape {tuple(tensors[key].shape)}, not {tuple(weight.shape)}"
        for key, weight in expected.items()
        if key in tensors and tensors[key].shape != weight.shape
    ]
    refuse(name, sorted(problems))
    return to_float32(tensors)
