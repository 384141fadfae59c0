"""Karpathy's nanoGPT: its ckpt.pt, with the vocabulary in a meta.pkl or GPT-2's.

Example: if matches(path): source = read("out-shakespeare-char", path)
meta.pkl is looked for beside ckpt.pt, and in data/DATASET of nanoGPT's folder. It is a pickle, which could
run any program: it is read as far as it is strings, numbers, lists, tuples and dictionaries, and no further.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

from torch import Tensor

from nanogpt.config import GPTConfig
from nanogpt.errors import UserError, first_line, require
from nanogpt.initialize.names import to_our_names
from nanogpt.initialize.source import PretrainedModel, count, read_torch, tensors_in
from nanogpt.model.foreign_names import GPT2
from nanogpt.tokenizer.base import CharTokenizer, Tokenizer
from nanogpt.tokenizer.registry import existing_tokenizer

GPT2_TOKENS, GPT2_ROWS = 50257, 50304
"""Tokens of GPT-2, and rows that nanoGPT makes for them: a multiple of 64."""

MAX_META_BYTES = 1 << 26

PLAIN = (str, int, float, bool, type(None), list, tuple, dict)


def matches(path: Path) -> bool:
    """Whether a file is a checkpoint of nanoGPT."""
    if not path.is_file() or path.suffix not in (".pt", ".pth", ".ckpt"):
        return False
    try:
        content = read_torch(path)
    except UserError:
        return False
    return isinstance(content, dict) and {"model", "model_args"} <= cast(dict[Any, Any], content).keys()


def read(name: str, path: Path) -> PretrainedModel:
    """The model in a checkpoint. Raises: UserError that lists what does not fit."""
    content: Mapping[str, Any] = read_torch(path)
    tensors = bare_names(tensors_in(content["model"], path))
    settings = content["model_args"]
    require(isinstance(settings, dict), f"--init_from {name} is malformed: model_args is not a dictionary")
    rows = tensors["wte.weight"].shape[0] if "wte.weight" in tensors else count(settings, "vocab_size")
    config = GPTConfig(
        block_size=count(settings, "block_size"),
        n_layer=count(settings, "n_layer"),
        n_head=count(settings, "n_head"),
        n_embd=count(settings, "n_embd"),
        bias="ln_f.bias" in tensors,
        vocab_size=rows,
    )
    training = content.get("config")
    dataset = cast(dict[str, Any], training).get("dataset") if isinstance(training, dict) else None
    meta = find_meta(path, dataset)
    require(
        meta is not None or rows in (GPT2_TOKENS, GPT2_ROWS),
        f"--init_from {name} has {rows} tokens, and its meta.pkl, which says which, is missing: copy it from "
        f"nanoGPT's data/{dataset or 'DATASET'} to {path.parent}",
    )

    def weights() -> dict[str, Tensor]:
        """The weights."""
        return to_our_names(GPT2, config, bare_names(tensors_in(read_torch(path)["model"], path)), name)

    def tokenizer() -> Tokenizer:
        """Its characters, or GPT-2's tokens."""
        found = read_meta(meta) if meta else existing_tokenizer("gpt2")
        assert found is not None
        return found

    prepare_with, tokens = ("char", None) if meta else ("gpt2", GPT2_TOKENS)
    return PretrainedModel(name, "nanoGPT", config, weights, tokenizer, prepare_with, tokens)


def bare_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the prefixes of their names, and without the masks that old versions saved."""
    bare = {name.removeprefix("_orig_mod.").removeprefix("transformer."): w for name, w in tensors.items()}
    return {name: w for name, w in bare.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}


def find_meta(checkpoint: Path, dataset: object) -> Path | None:
    """The meta.pkl of a checkpoint; None if there is none."""
    folders = [checkpoint.parent]
    if isinstance(dataset, str) and "\0" not in dataset:
        folders += [root / "data" / dataset for root in (checkpoint.absolute().parent.parent, Path())]
    paths = (folder / "meta.pkl" for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def read_meta(path: Path) -> CharTokenizer:
    """The characters in a meta.pkl. Raises: UserError if it holds anything else."""
    try:
        require(
            path.stat().st_size <= MAX_META_BYTES, f"{path} is too large to be a vocabulary of characters"
        )
        with open(path, "rb") as file:
            content = PlainUnpickler(file).load()
        require_plain(content)
        names = content["itos"]
        chars = [names[i] for i in range(len(names))]
    except UserError:
        raise
    except Exception as error:  # an unpickler may raise anything
        raise UserError(f"{path} is not nanoGPT's: {type(error).__name__}: {first_line(error)}") from error
    is_characters = all(isinstance(char, str) and len(char) == 1 for char in chars)
    require(
        is_characters and len(set(chars)) == len(chars), f"{path} has a vocabulary that is not characters"
    )
    return CharTokenizer("".join(chars))


class PlainUnpickler(pickle.Unpickler):
    """Reads a pickle that builds no objects but Python's own containers, strings and numbers."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        """Refuse every name: a function that is found can be called."""
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def require_plain(value: object) -> None:
    """Raise TypeError unless a value is strings, numbers, lists, tuples and dictionaries all through."""
    if type(value) not in PLAIN:
        raise TypeError(f"it holds a {type(value).__name__}")
    if isinstance(value, dict):
        items = cast(dict[object, object], value)
        for item in (*items.keys(), *items.values()):
            require_plain(item)
    elif isinstance(value, (list, tuple)):
        for item in cast(list[object], value):
            require_plain(item)
