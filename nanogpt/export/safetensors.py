"""safetensors: one file with the weights under our names; settings and tokenizer in its metadata.

Example: write(source, Path("model.safetensors"), "f32", advance)
         json.loads(safe_open("model.safetensors", "pt").metadata()["nanogpt"])["config"]
Every model fits. The names and shapes are those of nanogpt/model/gpt.py; a tied head is left out.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from nanogpt.config import to_dict
from nanogpt.export.source import Advance, TrainedModel, to_dtype
from nanogpt.export.tokenizer_json import tokenizer_json

KEY, VERSION = "nanogpt", 1
"""Name of the only entry of the metadata (the library writes several in random order); its version."""

MARK = (8, b'{"__metadata__":{"nanogpt":')
"""What a file begins with, after the length of its header."""


def misfits(source: TrainedModel) -> list[str]:
    """What of a model the format cannot carry: nothing."""
    del source
    return []


def write(source: TrainedModel, path: Path, dtype: str, advance: Advance) -> None:
    """Write the file. Raises: OSError; UserError if the weights are too large for the dtype."""
    tensors: dict[str, Tensor] = {}
    for name, weight in source.weights.items():
        tensors[name] = to_dtype(name, weight, dtype)
        advance(weight.numel())
    write_tensors(tensors, path, {KEY: json.dumps(metadata(source))})


def metadata(source: TrainedModel) -> dict[str, object]:
    """What the file says beside the weights.

    config: GPTConfig. tokenizer: Tokenizer.to_dict. tokenizer.json: the same tokenizer for Hugging Face's
    tokenizers. training: TrainConfig without the names of folders and of the model that it started from.
    val_loss: None if it was not evaluated.
    """
    settings = to_dict(source.train_config).items()
    training = {name: value for name, value in settings if name not in ("data_dir", "out_dir")}
    return {
        "version": VERSION,
        "config": to_dict(source.config),
        "tokenizer": source.tokenizer.to_dict(),
        "tokenizer.json": tokenizer_json(source.tokenizer),
        "training": training,
        "step": source.step,
        "val_loss": source.val_loss,
        "data_fingerprint": source.saved.fingerprint,
    }


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors, none of which share memory, to a file. Raises: OSError.

    The library's save_file is not used: it makes a temporary file of its own, which a kill leaves behind, and
    which only its owner may read.
    """
    from safetensors.torch import save  # pyright: ignore[reportUnknownVariableType]

    path.write_bytes(save(dict(tensors), dict(metadata)))
