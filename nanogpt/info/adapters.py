"""The description of adapters in peft's format (LoRA and its like), of a training here or by any program.

Example: describe_adapter(Path("out/adapter"))
peft's files say which model they are for, and not what that is: its shape is not known here.
"""

import math
from pathlib import Path
from typing import Any, cast

from nanogpt.checkpoint.format import ADAPTER_FILE
from nanogpt.errors import require
from nanogpt.info.description import Description, count_by_dtype, size_of
from nanogpt.info.exports import open_safetensors, safetensors_tensors
from nanogpt.initialize.source import read_json
from nanogpt.training.adapters import WEIGHTS_FILE

NAMED_SETTINGS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
}
"""Settings that a description names, by peft's names."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters."""
    return (folder / ADAPTER_FILE).is_file()


def describe_adapter(folder: Path) -> Description:
    """Adapters. Raises: UserError if a file is missing or malformed."""
    settings = read_json(folder / ADAPTER_FILE)
    require((folder / WEIGHTS_FILE).is_file(), f"{folder} has no {WEIGHTS_FILE}: the adapters are not in it")
    tensors = safetensors_tensors(folder / WEIGHTS_FILE)
    named = [f"{label} {settings[name]}" for name, label in NAMED_SETTINGS.items() if name in settings]
    return Description(
        folder,
        "adapters of peft",
        sizes={file.name: size_of(file) for file in sorted(folder.iterdir())},
        config=settings,
        model=", ".join([str(settings.get("peft_type", "of a kind that is not named")), *named]),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        dtypes=count_by_dtype(tensors.values()),
        notes={
            "Base model": str(settings.get("base_model_name_or_path") or "not named"),
            "Targets": in_words(settings.get("target_modules")),
        },
        weights=lambda: open_safetensors(folder / WEIGHTS_FILE),
    )


def in_words(targets: Any) -> str:
    """The layers that have adapters: peft has a list of their names, or a pattern."""
    names = cast(list[Any], targets) if isinstance(targets, list) else [targets or "not named"]
    return ", ".join(map(str, names))
