"""The formats that a training can start from: a row for each, and `open_source`, which finds the right one.

Example: source = open_source("out/ckpt.pt"); TrainConfig(init_from="out/ckpt.pt", **source.settings)
To add a format, write a file with `matches(path)` and `read(name, path)`, and give it a row in FORMATS.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from nanogpt.checkpoint.format import checkpoint_in, refuse_adapter
from nanogpt.errors import UserError
from nanogpt.initialize import hf, litgpt, original, ours
from nanogpt.initialize.source import PretrainedModel


class Format(NamedTuple):
    """A format of trained models."""

    title: str
    matches: Callable[[Path], bool]
    """Whether a file or folder is of this format."""
    read: Callable[[str, Path], PretrainedModel]
    """The model, by what --init_from says and where it is. Raises: UserError."""


def is_nanochat(folder: Path) -> bool:
    """Whether a folder has checkpoints of nanochat."""
    return folder.is_dir() and any(folder.glob("meta_*.json")) and any(folder.glob("model_*.pt"))


def refuse_nanochat(name: str, folder: Path) -> NoReturn:
    """Raise UserError."""
    raise UserError(
        f"--init_from {name} is a model of nanochat, whose blocks (value embeddings, smearing, norms without "
        "gains) are not ours: it cannot be read"
    )


FORMATS = (
    Format("a checkpoint", ours.is_checkpoint, ours.read_checkpoint),
    Format("an exported .safetensors file", ours.is_safetensors, ours.read_safetensors_file),
    Format("a checkpoint of nanoGPT", original.matches, original.read),
    Format("a folder of litgpt", litgpt.matches, litgpt.read),
    Format("a folder of transformers", hf.matches, hf.read),
    Format("a folder of nanochat", is_nanochat, refuse_nanochat),
)
"""The formats, in the order in which they are tried."""


def open_source(name: str) -> PretrainedModel:
    """The model that --init_from names. Raises: UserError if there is none, or it does not fit."""
    path = Path(name)
    if not path.exists() and hf.is_hub_name(name):
        path = hf.download(name)
    try:
        path = checkpoint_in(path) or path
        for row in FORMATS:
            if row.matches(path):
                return row.read(name, path)
    except OSError as error:
        raise UserError(f"--init_from {name} cannot be read: {error.strerror}") from error
    if not path.exists():
        raise UserError(f"--init_from {name} does not exist: check the path")
    refuse_adapter("--init_from", path)
    known = ", ".join(row.title for row in FORMATS[:-1])
    raise UserError(f"--init_from {name} is none of {known} (or it is damaged)")
