"""vocab.pt of a data folder: its values, validated, and the names of the files that it lists.

Example: facts = VocabFile(content, Path("data/vocab.pt"), advice); facts.tokens; facts.files["train"]
prepare.py writes it, dataset.py opens the files. Reads no file itself.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from nanogpt.errors import UserError
from nanogpt.storage.seals import Checksum
from nanogpt.tokenizer.base import Tokenizer
from nanogpt.tokenizer.registry import from_dict

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION, MASKED_VERSION = 2, 3
"""Versions of the data folder, without and with masks (which earlier programs would ignore).

Version 1, which has only characters and no count of bytes, is also read."""

SPLITS = ("train", "val")

MASKS = {"train": "train_mask", "val": "val_mask"}
"""Split -> the name of its mask, which says which of its tokens count for the loss."""

MAX_SHARDS = 1_000_000
"""A larger number of shards counts as damage."""


class VocabFile:
    """The values in vocab.pt, checked. Raises: UserError naming one that is missing or of a wrong type."""

    def __init__(self, content: Mapping[str, Any], path: Path, advice: str) -> None:
        self.content, self.path, self.advice = content, path, advice
        self.fingerprint: str = self.get("fingerprint", is_string, needed=True)
        first = content["format"] == 1  # its first folders have no numbers of tokens
        self.tokens: dict[str, int] | None = self.get("tokens", is_count_per_split, needed=not first)
        self.bytes: dict[str, int] | None = self.get("bytes", is_count_per_split)
        self.characters: int | None = self.get("characters", is_count)
        masked = content["format"] == MASKED_VERSION
        self.counted, self.counted_bytes = (
            self.get(key, is_count_per_split, needed=True) if masked else None
            for key in ("counted", "counted_bytes")
        )
        self.arrays = {split: split for split in SPLITS}
        """Name of a file of tokens, or of their mask -> its split."""
        if masked:
            self.arrays |= {mask: split for split, mask in MASKS.items()}
        shards: dict[str, int] | None = self.get("shards", is_shards)
        self.files = {
            name: [f"{name}.pt"] if shards is None else shard_names(name, shards[split])
            for name, split in self.arrays.items()
        }
        self.names = [file for files in self.files.values() for file in files]
        self.seals = self.seals_of(self.get("sha256", is_digests) or {}, self.get("blocks", is_blocks) or {})

    def get(self, key: str, right: Callable[[Any], bool], *, needed: bool = False) -> Any:
        """A value; None if it is missing. Raises: UserError if it is not `right`, or `needed` but missing."""
        value = self.content.get(key)
        if value is None and not needed:
            return None
        if not right(value):
            self.refuse(f"{key}: {value!r}"[:100].splitlines()[0] if key in self.content else f"no {key}")
        return value

    def refuse(self, what: str) -> NoReturn:
        """Raise UserError: the file is malformed."""
        raise UserError(f"{self.path} is malformed ({what}): {self.advice}")

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        saved = self.content["tokenizer"]
        if not isinstance(saved, dict):
            self.refuse("tokenizer")
        try:
            return from_dict(cast(dict[str, Any], saved))
        except UserError as error:
            if "malformed" in str(error):
                self.refuse(str(error))
            raise

    def seals_of(self, digests: Mapping[str, str], blocks: "Mapping[str, Tensor]") -> dict[str, Checksum]:
        """The checksums of the files, {} if there are none."""
        if digests and (set(digests) != set(self.names) or not set(blocks) <= set(digests)):
            self.refuse("sha256 names other files")
        arrays = {name: cast(NDArray[np.uint8], tensor.numpy()) for name, tensor in blocks.items()}
        return {name: Checksum(digest, arrays.get(name)) for name, digest in digests.items()}


def is_string(value: Any) -> bool:
    """Whether a value is a string."""
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    """Whether a value is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_count_per_split(value: Any) -> bool:
    """Whether a value has a count, or 0, for each split."""
    counts = cast(dict[Any, Any], value) if isinstance(value, dict) else {}
    return set(counts) == set(SPLITS) and all(is_count(count) or count == 0 for count in counts.values())


def is_shards(value: Any) -> bool:
    """Whether a value has a number of files for each split."""
    return is_count_per_split(value) and all(0 < count <= MAX_SHARDS for count in value.values())


def is_digests(value: Any) -> bool:
    """Whether a value has SHA-256s by file name."""
    digests = cast(dict[Any, Any], value) if isinstance(value, dict) else {"": ""}
    return all(is_string(item) and re.fullmatch("[0-9a-f]{64}", item) for item in digests.values())


def is_blocks(value: Any) -> bool:
    """Whether a value has tables of SHA-256s by file name, (n, 32) uint8 each."""
    from torch import Tensor  # the file was read with PyTorch

    tables = cast(dict[Any, Any], value) if isinstance(value, dict) else {"": ""}
    return all(
        isinstance(item, Tensor)
        and str(item.dtype) == "torch.uint8"
        and not item.is_sparse
        and item.dim() == 2
        and item.shape[0] > 1
        and item.shape[1] == 32
        for item in tables.values()
    )


def shard_names(name: str, count: int) -> list[str]:
    """The names of the shards of a split, or of its mask."""
    return [f"{name}-{number:05}.pt" for number in range(count)]
