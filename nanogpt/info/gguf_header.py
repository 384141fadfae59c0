"""The header of a GGUF file, read without a library: its settings, and type and shape of each tensor.

Example: header = read_header(Path("model.gguf")); header.settings["general.name"]; header.tensors
No length in the file is believed before it is compared with the size of the file, so a malicious one costs
neither time nor memory. Arrays of numbers are passed over. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanogpt.errors import UserError, require

MAGIC, VERSIONS = b"GGUF", (2, 3)

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Number of a type of settings -> its format for struct."""

STRING, ARRAY = 8, 9

TENSOR_TYPES = {0: "f32", 1: "f16", 8: "q8_0", 30: "bf16"}
"""Number of a type of tensors -> its name, of those that `nanogpt export` writes."""

WEIGHT_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "bf16": 2.0}
"""Bytes of a weight, by the name of its type."""

ALIGNMENT, DEFAULT_ALIGNMENT = "general.alignment", 32
"""The weights begin at a multiple of so many bytes."""

MAX_DIMENSIONS = 4


class TensorFacts(NamedTuple):
    """Type and shape of a tensor; its rows are the last dimension but one, as in PyTorch."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a file says beside its weights. settings: numbers, strings, and arrays of strings."""

    version: int
    settings: dict[str, Any]
    tensors: dict[str, TensorFacts]


class Cursor:
    """Reads values one after the other from bytes. Raises: ValueError where the bytes end."""

    def __init__(self, raw: mmap.mmap) -> None:
        self.raw, self.at = raw, 0

    def take(self, size: int) -> bytes:
        """The next bytes."""
        if size > len(self.raw) - self.at:
            raise ValueError("it is cut short")
        self.at += size
        return self.raw[self.at - size : self.at]

    def number(self, kind: str) -> Any:
        """A number, by its format for struct, little-endian."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def string(self) -> str:
        """A string, behind its length."""
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def count(self, least: int) -> int:
        """A number of items, of at least so many bytes each."""
        count = self.number("Q")
        if count > (len(self.raw) - self.at) // least:
            raise ValueError("it is cut short")
        return count

    def value(self, kind: int) -> Any:
        """A value of a type; None in place of an array of numbers."""
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        of = self.number("I")
        if of == STRING:
            return [self.string() for _ in range(self.count(8))]
        size = struct.calcsize(f"<{SCALARS[of]}")
        self.take(self.count(size) * size)
        return None


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> Header:
    """Read the header. Raises: UserError if the file is damaged, or of another version."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            cursor = Cursor(raw)
            cursor.take(len(MAGIC))
            version = cursor.number("I")
            require(version in VERSIONS, f"{path} is GGUF of version {version}: update NanoGPT")
            num_tensors, num_settings = cursor.count(24), cursor.count(13)
            settings = {cursor.string(): cursor.value(cursor.number("I")) for _ in range(num_settings)}
            found = [read_tensor(cursor) for _ in range(num_tensors)]
            alignment = max(1, int(settings.get(ALIGNMENT, DEFAULT_ALIGNMENT)))
            begin = -(-cursor.at // alignment) * alignment
            if begin + max((end for _, _, end in found), default=0) > len(raw):
                raise ValueError("it is cut short")
    except (ValueError, TypeError, KeyError, struct.error) as error:
        raise UserError(f"{path} is no GGUF file that can be read: {error}") from error
    return Header(version, settings, {name: tensor for name, tensor, _ in found})


def read_tensor(cursor: Cursor) -> tuple[str, TensorFacts, int]:
    """Name of a tensor, its type and shape, and where it ends, in bytes behind the start of all weights.

    Its dimensions stand in the file in the order of their strides. An unknown type counts as empty.
    """
    name, dimensions = cursor.string(), cursor.number("I")
    if dimensions > MAX_DIMENSIONS:
        raise ValueError(f"{name[:40]} has {dimensions} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    kind = cursor.number("I")
    dtype = TENSOR_TYPES.get(kind, f"type {kind}")
    start = cursor.number("Q")
    return name, TensorFacts(dtype, shape), start + int(math.prod(shape) * WEIGHT_BYTES.get(dtype, 0))
