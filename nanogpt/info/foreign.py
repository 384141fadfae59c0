"""Descriptions of models of other programs that --init_from takes: nanoGPT, litgpt, transformers.

Example: describe_foreign(Path("gpt2_folder"))
A folder that `nanogpt export --format hf` wrote is one of transformers. An architecture that is not ours is
refused with the reason, as --init_from refuses it. Nothing is downloaded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from nanogpt.errors import UserError
from nanogpt.info.description import (
    Description,
    TokenizerFacts,
    Weights,
    bytes_of,
    count_by_dtype,
    shape_facts,
    size_of,
    tokenizer_facts,
)
from nanogpt.info.exports import safetensors_tensors
from nanogpt.initialize import original
from nanogpt.initialize.registry import FORMATS, Format
from nanogpt.initialize.source import PretrainedModel, read_torch

SHOWN_SETTINGS = ("dataset", "max_iters", "batch_size", "learning_rate")
"""Settings of a training with nanoGPT that a description shows."""


def checkpoint_in(path: Path) -> Path:
    """The checkpoint in a run folder of nanoGPT; any other path stays."""
    inside = path / "ckpt.pt"
    return inside if inside.is_file() else path


def row_of(path: Path) -> Format | None:
    """The row of the format that is at a path."""
    return next((row for row in FORMATS if row.matches(checkpoint_in(path))), None)


def is_foreign(path: Path) -> bool:
    """Whether --init_from knows the format."""
    return row_of(path) is not None


def describe_foreign(path: Path) -> Description:
    """A model of another program. Raises: UserError if it does not fit, or is damaged."""
    row, file = row_of(path), checkpoint_in(path)
    assert row is not None
    source = row.read(str(path), file)
    tokenizer, notes = open_tokenizer(source)
    content: Mapping[str, Any] = read_torch(file) if row.read is original.read else {}
    return Description(
        path,
        row.title,
        **shape_facts(source.config),
        **(checkpoint_facts(content, size_of(file)) if content else folder_facts(file)),
        tokenizer=tokenizer,
        progress=progress_of(content),
        notes=notes | settings_of(content),
        weights=lambda: open_weights(source),
    )


def open_tokenizer(source: PretrainedModel) -> tuple[TokenizerFacts | None, dict[str, str]]:
    """The tokenizer, and a note if there is none. GPT-2's is not here and is not downloaded."""
    if source.prepare_with == "gpt2":
        return TokenizerFacts("gpt2", source.num_tokens or source.config.vocab_size), {}
    try:
        return tokenizer_facts(source.tokenizer()), {}
    except UserError as error:
        return None, {"Tokenizer": str(error)}


def open_weights(source: PretrainedModel) -> Weights:
    """The weights under our names, converted to float32 in memory. Raises: UserError if they do not fit."""
    weights = source.weights()
    return Weights(list(weights), weights.__getitem__)


def folder_facts(folder: Path) -> dict[str, Any]:
    """Bytes of each file in a folder, and dtypes as far as the headers of the files say them."""
    files = sorted(folder.iterdir())
    tensors = [safetensors_tensors(file).values() for file in files if file.suffix == ".safetensors"]
    return {
        "sizes": {file.name: size_of(file) for file in files},
        "dtypes": count_by_dtype([tensor for found in tensors for tensor in found]),
    }


def checkpoint_facts(content: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Bytes of the parts of a checkpoint of nanoGPT, and its dtypes. size: of the whole file, in bytes."""
    weights = tensors_within(content["model"])
    sizes = {"weights": bytes_of(weights), "optimizer": bytes_of(tensors_within(content.get("optimizer")))}
    dtypes = ((str(one.dtype).removeprefix("torch."), tuple(one.shape)) for one in weights)
    return {
        "sizes": {**sizes, "rest": size - sum(sizes.values())},
        "dtypes": count_by_dtype(dtypes),
    }


def tensors_within(value: Any) -> list[Tensor]:
    """All tensors in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(cast(dict[Any, Any], value).values())
    if isinstance(value, list):
        return [tensor for item in cast(list[Any], value) for tensor in tensors_within(item)]
    return []


def progress_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """How far a training with nanoGPT was."""
    step, loss = content.get("iter_num"), content.get("best_val_loss")
    loss = loss.item() if isinstance(loss, Tensor) and loss.numel() == 1 else loss
    found: dict[str, Any] = {"step": step} if isinstance(step, int) else {}
    return {**found, "best_val_loss": float(loss)} if isinstance(loss, int | float) else found


def settings_of(content: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a training with nanoGPT, as a note."""
    settings = content.get("config")
    if not isinstance(settings, dict):
        return {}
    named = cast(dict[str, Any], settings)
    shown = [f"{name} {named[name]}" for name in SHOWN_SETTINGS if name in named]
    return {"Settings": ", ".join(shown)} if shown else {}
