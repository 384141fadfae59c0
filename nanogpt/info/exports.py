"""Descriptions of what `nanogpt export` writes: safetensors, GGUF, ONNX, and pages of HTML.

Example: describe_gguf(Path("my_gpt.gguf"))
Its folders for transformers are read as any folder of transformers (foreign.py).
"""

import json
import math
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from nanogpt.config import GPTConfig, TrainConfig, from_dict
from nanogpt.errors import UserError, first_line, require
from nanogpt.info.description import (
    Description,
    TokenizerFacts,
    Weights,
    count_by_dtype,
    shape_facts,
    size_of,
    tokenizer_facts,
)
from nanogpt.info.gguf_header import TensorFacts, read_header
from nanogpt.initialize.ours import KEY, metadata, read_safetensors_file
from nanogpt.initialize.source import read_json
from nanogpt.tokenizer.registry import from_file

MAX_HEADER_BYTES = 1 << 28
"""Longest header of a safetensors file that is read."""

ONNX_FILE = "onnx/model.onnx"

ONNX_SETTINGS = {
    "n_layer": "layers",
    "num_hidden_layers": "layers",
    "n_head": "heads",
    "num_attention_heads": "heads",
    "n_embd": "width",
    "hidden_size": "width",
    "n_positions": "context",
    "max_position_embeddings": "context",
    "vocab_size": "vocabulary",
}
"""Name in config.json -> what it says of the shape."""

PAGE_MODEL = re.compile(rb'<script[^>]* id="model"[^>]*>(.*?)</script>', re.DOTALL)
"""The element of a page that describes its model."""


# --- safetensors ---


def safetensors_tensors(path: Path) -> dict[str, TensorFacts]:
    """Type and shape of each tensor in a safetensors file. Raises: UserError if it is malformed."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            require(size <= min(path.stat().st_size, MAX_HEADER_BYTES), f"{path} is cut short, or damaged")
            header: dict[str, Any] = json.loads(file.read(size))
        ends = [int(item["data_offsets"][1]) for name, item in header.items() if name != "__metadata__"]
        whole = 8 + size + max(ends, default=0)
        require(
            path.stat().st_size >= whole, f"{path} is cut short: {path.stat().st_size:,} of {whole:,} bytes"
        )
        return {
            name: TensorFacts(str(item["dtype"]).lower(), tuple(int(n) for n in item["shape"]))
            for name, item in header.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no safetensors file that can be read: {first_line(error)}") from error


def describe_safetensors(path: Path) -> Description:
    """An exported safetensors file. Raises: UserError if it is malformed."""
    source = read_safetensors_file(str(path), path)
    described: Mapping[str, Any] = json.loads(metadata(path)[KEY])
    tensors = safetensors_tensors(path)
    return Description(
        path,
        "an exported safetensors file",
        f"version {described['version']}",
        {"file": size_of(path)},
        **shape_facts(source.config),
        dtypes=count_by_dtype(tensors.values()),
        tokenizer=tokenizer_facts(source.tokenizer()),
        data={"fingerprint": described.get("data_fingerprint")},
        training=training_in(described),
        progress=progress_in(described),
        weights=lambda: open_safetensors(path),
    )


def training_in(described: Mapping[str, Any]) -> TrainConfig | None:
    """The settings of the training that the metadata have, if they have any. Raises: UserError."""
    settings = described.get("training")
    return from_dict(TrainConfig, cast(dict[str, Any], settings)) if isinstance(settings, dict) else None


def progress_in(described: Mapping[str, Any]) -> dict[str, Any]:
    """How far the training was, as far as the metadata say."""
    step, loss = described.get("step"), described.get("val_loss")
    found: dict[str, Any] = {"step": step} if isinstance(step, int) else {}
    return {**found, "best_val_loss": loss} if isinstance(loss, float) else found


def open_safetensors(path: Path) -> Weights:
    """The weights of a safetensors file, which is open only while one is read.

    Raises: UserError if they cannot be read.
    """
    try:
        from safetensors import safe_open
    except ModuleNotFoundError as error:
        raise UserError(f"{path} needs the package safetensors: pip install nanogpt[export]") from error

    def read(name: str) -> Tensor:
        """A weight."""
        with cast(Any, safe_open)(path, "pt") as file:
            return file.get_tensor(name)

    try:
        with cast(Any, safe_open)(path, "pt") as file:
            names = list(file.keys())
    except Exception as error:  # the library raises a class of its own
        raise UserError(f"{path} holds no weights that can be read: {first_line(error)}") from error
    return Weights(names, read)


# --- GGUF ---


def describe_gguf(path: Path) -> Description:
    """A GGUF file, of ours or of any other program. Raises: UserError if it is malformed."""
    header = read_header(path)
    settings = header.settings
    kind = str(settings.get("general.architecture", "unknown"))
    shape = {
        label: settings.get(f"{kind}.{key}")
        for label, key in {
            "layers": "block_count",
            "heads": "attention.head_count",
            "width": "embedding_length",
            "context": "context_length",
        }.items()
    }
    tokens: Any = settings.get("tokenizer.ggml.tokens")
    tokenizer = TokenizerFacts(
        f"{settings.get('tokenizer.ggml.model')} ({settings.get('tokenizer.ggml.pre', 'no rule for words')})",
        len(cast(list[str], tokens)) if isinstance(tokens, list) else 0,
        end_of_text=settings.get("tokenizer.ggml.eos_token_id"),
    )
    labels = {"Name": "general.name", "Says": "general.description"}
    return Description(
        path,
        "a GGUF file",
        f"version {header.version}",
        {"file": size_of(path)},
        config={name: value for name, value in settings.items() if not isinstance(value, list | None)},
        model=f"{kind}, {', '.join(f'{name} {value}' for name, value in shape.items() if value is not None)}",
        parameters=sum(math.prod(tensor.shape) for tensor in header.tensors.values()),
        dtypes=count_by_dtype(header.tensors.values()),
        tokenizer=tokenizer if tokens else None,
        notes={label: str(settings[key]) for label, key in labels.items() if key in settings},
    )


# --- ONNX ---


def is_onnx(folder: Path) -> bool:
    """Whether a folder is an exported graph, and not one of transformers that has a graph too."""
    is_graph = (folder / ONNX_FILE).is_file() and (folder / "config.json").is_file()
    return is_graph and not any(folder.glob("*.safetensors"))


def describe_onnx(folder: Path) -> Description:
    """A folder with a graph. Its config.json says what transformers.js needs, and no more.

    Raises: UserError if it is malformed.
    """
    content = read_json(folder / "config.json")
    found = {label: content[name] for name, label in ONNX_SETTINGS.items() if name in content}
    words = ", ".join(f"{label} {value}" for label, value in found.items())
    path = folder / "tokenizer.json"
    return Description(
        folder,
        "an exported ONNX folder",
        sizes={file.name: size_of(file) for file in sorted(folder.iterdir())},
        config={name: value for name, value in content.items() if isinstance(value, str | int | float)},
        model=f"to transformers.js a {content.get('model_type')}: {words}",
        tokenizer=tokenizer_facts(from_file(path)) if path.is_file() else None,
    )


# --- HTML ---


def page_model(path: Path) -> dict[str, Any] | None:
    """What a page says of its model; None if it is no page of ours."""
    if not path.is_file() or path.suffix.lower() not in (".html", ".htm") or not path.stat().st_size:
        return None
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        found = PAGE_MODEL.search(raw)
        text = found[1] if found else b""
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return cast(dict[str, Any], content) if isinstance(content, dict) else None


def is_page(path: Path) -> bool:
    """Whether a file is an exported page."""
    return page_model(path) is not None


def describe_page(path: Path) -> Description:
    """An exported page. Raises: UserError if it is malformed."""
    content = page_model(path) or {}
    try:
        config = from_dict(GPTConfig, content["config"])
        tokenizer = cast(dict[str, Any], content["tokenizer"])
        end = tokenizer["end"]
        facts = TokenizerFacts(str(tokenizer["kind"]), config.vocab_size, end_of_text=end)
        texts = {"Name": str(content["name"]), "Says": str(content["about"])}
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is a page that is malformed: {first_line(error)}") from error
    return Description(
        path,
        "an exported page",
        "",
        {"file": size_of(path)},
        **shape_facts(config),
        tokenizer=facts,
        notes={**texts, "Weights": "8 bits, with a scale for each row of a matrix"},
    )
