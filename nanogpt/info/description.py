"""The description of a file or folder: what every format says of itself, in one form.

Example: described = describe(Path("out")); described.parameters; described.recipe      # info/registry.py
A reader of a format fills in what its files say, without reading weights. What is not known is empty or None.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nanogpt.config import GPTConfig, TrainConfig, to_dict
from nanogpt.errors import UserError, first_line
from nanogpt.export.card import recipe_command
from nanogpt.export.source import Evaluation
from nanogpt.model.size import meta_model
from nanogpt.tokenizer.base import Tokenizer
from nanogpt.units import plural

VerifyProgress = Callable[[int], object]
"""Called with the number of bytes that were compared with a checksum since the last call."""


@dataclass(frozen=True)
class Weights:
    """Weights that stay on the disk until they are read. read: the weight of a name, of any dtype."""

    names: Sequence[str]
    read: Callable[[str], Tensor]


@dataclass(frozen=True)
class TokenizerFacts:
    """A tokenizer. tokens: the bytes of each id; None if only their number is known."""

    kind: str
    vocab_size: int
    unit: str = "tokens"
    end_of_text: int | None = None
    tokens: Sequence[bytes] | None = None
    sha256: str = ""
    """Of all that it is: equal for equal tokenizers."""


@dataclass(frozen=True)
class Description:
    """A file or folder."""

    path: Path
    kind: str
    """What it is, with an article."""
    version: str = ""
    """Version of its format, in words."""
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    """Part -> bytes."""
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The architecture: the fields of a GPTConfig, or settings as another program names them."""
    model: str = ""
    """The architecture in words."""
    parameters: int | None = None
    dtypes: Mapping[str, int] = field(default_factory=dict[str, int])
    """Type of weights -> how many have it."""
    tokenizer: TokenizerFacts | None = None
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What is known of the text: fingerprint, number of tokens, ..."""
    training: TrainConfig | None = None
    progress: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """step, best_val_loss, elapsed_s, ..."""
    curve: Sequence[Evaluation] = ()
    notes: Mapping[str, str] = field(default_factory=dict[str, str])
    """Further lines, by their labels."""
    damage: str = ""
    """The error of a part that cannot be read; the rest is described."""
    weights: Callable[[], Weights] | None = None
    """Opens the weights that sampling uses, by our names, without a tied head; None if they have others."""

    @property
    def recipe(self) -> str | None:
        """The training as a command: the settings that differ from their defaults."""
        return recipe_command(self.training) if self.training else None

    def to_json(self) -> dict[str, Any]:
        """Everything but the weights, as JSON has it."""
        tokenizer = self.tokenizer
        return {
            "path": str(self.path),
            "kind": self.kind,
            "version": self.version,
            "bytes": sum(self.sizes.values()),
            "sizes": dict(self.sizes),
            "config": {name: finite(value) for name, value in self.config.items()},
            "parameters": self.parameters,
            "dtypes": dict(self.dtypes),
            "tokenizer": None
            if tokenizer is None
            else {
                "kind": tokenizer.kind,
                "vocab_size": tokenizer.vocab_size,
                "end_of_text": tokenizer.end_of_text,
                "sha256": tokenizer.sha256 or None,
            },
            "data": dict(self.data),
            "training": None if self.training is None else to_dict(self.training),
            "recipe": self.recipe,
            "progress": {name: finite(value) for name, value in self.progress.items()},
            "curve": [{"step": point.step, "val_loss": finite(point.loss)} for point in self.curve],
            "notes": dict(self.notes),
            "damage": self.damage or None,
        }


def finite(value: Any) -> Any:
    """A number as JSON has it: None in place of infinity and NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shape_facts(config: GPTConfig) -> dict[str, Any]:
    """The fields of a Description that follow from an architecture of ours."""
    return {
        "config": to_dict(config),
        "model": f"{plural(config.n_layer, 'layer')}, {plural(config.n_head, 'head')}, "
        f"width {config.n_embd:,}, context {config.block_size:,}, vocabulary {config.vocab_size:,}",
        "parameters": num_parameters(config),
    }


def num_parameters(config: GPTConfig) -> int:
    """Number of parameters, from models of one and two layers: a malicious file may say a billion layers.

    Raises: UserError if a layer is too large for any tensor.
    """
    try:
        one, two = (meta_model(replace(config, n_layer=n)).num_parameters() for n in (1, 2))
    except (RuntimeError, TypeError, OverflowError) as error:
        raise UserError(f"its settings describe a model that is too large ({first_line(error)})") from error
    return one + (config.n_layer - 1) * (two - one)


def tokenizer_facts(tokenizer: Tokenizer) -> TokenizerFacts:
    """The facts of a tokenizer of ours."""
    described = json.dumps(tokenizer.to_dict(), sort_keys=True).encode()
    return TokenizerFacts(
        tokenizer.kind,
        tokenizer.vocab_size,
        tokenizer.unit,
        tokenizer.end_of_text,
        tokenizer.tokens,
        hashlib.sha256(described).hexdigest(),
    )


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else 0


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors. Those that share their memory, as a tied head does, count once."""
    total, seen = 0, set[int]()
    for tensor in tensors:
        start = 0 if tensor.is_meta else tensor.data_ptr()
        if start == 0 or start not in seen:
            total += tensor.nbytes
        seen.add(start)
    return total


def count_by_dtype(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, int]:
    """Dtype -> number of weights that have it. tensors: their dtypes and shapes."""
    counts: dict[str, int] = {}
    for dtype, shape in tensors:
        counts[dtype] = counts.get(dtype, 0) + math.prod(shape)
    return counts
