"""The tokenizer that --tokenizer names: gpt2, one in a tokenizer.json, or one in a saved file of ours.

Example: given = given_tokenizer("out/ckpt.pt"); tokenizer = with_characters_of(given, text)
A checkpoint, an exported .safetensors and the vocab.pt of a data folder contain their tokenizer. So data can
be prepared with the tokens of the model that a training will start from (--init_from).
"""

import json
import warnings
from pathlib import Path
from typing import Any, cast

from nanogpt.errors import UserError, require
from nanogpt.tokenizer.base import CharTokenizer, Tokenizer, TrainingText
from nanogpt.tokenizer.registry import SAVED_SUFFIXES, existing_tokenizer, from_dict

METADATA_KEY = "nanogpt"
"""Our entry in the metadata of a safetensors file."""


def given_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer that --tokenizer names if it exists already; None if it is made from the text.

    Raises: UserError if it cannot be downloaded or opened.
    """
    return open_saved(Path(name)) if name.endswith(SAVED_SUFFIXES) else existing_tokenizer(name)


def open_saved(path: Path) -> Tokenizer:
    """The tokenizer in a saved file. Raises: UserError if there is none."""
    require(path.is_file(), f"--tokenizer {path} does not exist: check the path")
    try:
        content = safetensors_content(path) if path.suffix == ".safetensors" else torch_content(path)
    except Exception as error:  # torch.load may raise anything for a malicious file
        raise UserError(f"--tokenizer {path} cannot be read: {type(error).__name__}") from error
    saved = cast(dict[Any, Any], content).get("tokenizer") if isinstance(content, dict) else None
    require(
        isinstance(saved, dict), f"--tokenizer {path} has no tokenizer in it: give a ckpt.pt or a vocab.pt"
    )
    return from_dict(cast(dict[str, Any], saved))


def torch_content(path: Path) -> Any:
    """What is in a ckpt.pt or vocab.pt; its tensors stay on the disk."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unusual pickles
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def safetensors_content(path: Path) -> Any:
    """What the metadata of an exported .safetensors says of the model."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(size, path.stat().st_size)))
    return json.loads(header["__metadata__"][METADATA_KEY])


def with_characters_of(tokenizer: Tokenizer, text: TrainingText) -> Tokenizer:
    """Extend a vocabulary of characters by those of the text; other tokenizers stay unchanged."""
    if not isinstance(tokenizer, CharTokenizer):
        return tokenizer
    chars = "".join(sorted({*tokenizer.chars, *text.characters}))
    return CharTokenizer(chars, end_of_text=tokenizer.end_of_text is not None or text.documents > 1)
