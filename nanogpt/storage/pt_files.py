"""The .pt files of torch.save, written without PyTorch, whose import takes longer than tokenizing a novel.

Example: with open("table.pt", "wb") as file: save({"step": 3, "table": np.arange(4)}, file)
         torch.load("table.pt", weights_only=True, mmap=True)        an array is a tensor there
A .pt file is a zip archive. Its data.pkl is a pickle in which each tensor is described by the type, shape and
number of its storage; data/0, data/1, ... are the bytes of the storages, uncompressed and aligned, so that
they can be mapped into memory. (torch/serialization.py and caffe2/serialize/inline_container.cc)
PyTorch reads these files, and data/token_map.py reads token files.
"""

import pickle
import struct
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

ROOT = "archive"
"""Folder of all files in the archive, named as torch.save names it."""

ALIGNMENT = 64
"""Every storage begins at a multiple of this many bytes."""

PADDING_ID = 0x4246
"""Id of the extra field with which PyTorch pads a zip entry's header: "FB"."""

HEADER_BYTES, EXTRA_BYTES, ZIP64_BYTES = 30, 4, 20
"""Size of a zip entry's header without name and extra fields; of the header of an extra field; and of the
extra field of a large entry (APPNOTE.TXT 4.3.7, 4.5)."""

ZIP64_MIN = 1 << 30
"""From this size on, an entry's header has 8 bytes for the size."""

STORAGES = {"uint8": "ByteStorage", "int64": "LongStorage", "int32": "IntStorage"}
"""Types of storages by the dtype in them. Newer dtypes are in an UntypedStorage."""

PROTOCOL = 2
"""Version of pickle that torch.load reads."""


class Output(Protocol):
    """A file to write to, from its start to its end."""

    def write(self, piece: bytes, /) -> int:
        """Write the bytes."""
        ...

    def flush(self) -> None:
        """Flush the file."""
        ...


@dataclass(frozen=True)
class Stream:
    """A vector, (count,), whose bytes come one block after the other: it may be larger than memory."""

    dtype: "np.dtype[Any]"
    count: int
    blocks: Iterable[bytes]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, as of an array."""
        return (self.count,)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.count * self.dtype.itemsize


Array = NDArray[Any] | Stream


class CountingOutput:
    """An output that counts its bytes. zipfile cannot seek in it, and so writes it in order."""

    def __init__(self, file: Output) -> None:
        self.file, self.count = file, 0

    def write(self, piece: bytes) -> int:
        """Write the bytes and count them."""
        self.count += len(piece)
        return self.file.write(piece)

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()


def save(value: object, file: Output) -> None:
    """Write a value for torch.load(weights_only=True): plain types, and arrays, which become tensors.

    The file is written from its start to its end. Raises: OSError; TypeError for any other type.
    """
    arrays: list[Array] = []
    pickled = pickle.PROTO + bytes([PROTOCOL]) + pickle_value(value, arrays) + pickle.STOP
    output = CountingOutput(file)
    with zipfile.ZipFile(cast(Any, output), "w") as archive:
        add_entry(archive, output, "data.pkl", len(pickled), [pickled])
        texts = {".format_version": "1", ".storage_alignment": f"{ALIGNMENT}", "byteorder": sys.byteorder}
        for name, text in texts.items():
            add_entry(archive, output, name, len(text), [text.encode()])
        for number, array in enumerate(arrays):
            blocks = array.blocks if isinstance(array, Stream) else [array.tobytes()]
            add_entry(archive, output, f"data/{number}", array.nbytes, blocks)
        add_entry(archive, output, "version", 2, [b"3\n"])


def add_entry(
    archive: zipfile.ZipFile, output: CountingOutput, name: str, size: int, blocks: Iterable[bytes]
) -> None:
    """Add a file of `size` bytes, which begin at a multiple of ALIGNMENT: its header is padded."""
    entry, large = zipfile.ZipInfo(f"{ROOT}/{name}"), size >= ZIP64_MIN
    header = HEADER_BYTES + len(entry.filename) + EXTRA_BYTES + (ZIP64_BYTES if large else 0)
    padding = -(output.count + header) % ALIGNMENT
    entry.extra = struct.pack("<HH", PADDING_ID, padding) + b"Z" * padding
    with archive.open(entry, "w", force_zip64=large) as file:
        for block in blocks:
            file.write(block)


def pickle_value(value: object, arrays: list[Array]) -> bytes:
    """The opcodes that push a value. Appends to `arrays` those in it: the storages, in their order."""
    match value:
        case np.ndarray() | Stream():
            arrays.append(cast(Array, value))
            return pickle_tensor(arrays[-1], number=len(arrays) - 1)
        case dict():
            items = cast(dict[Any, Any], value).items()
            pairs = [pickle_plain(key) + pickle_value(item, arrays) for key, item in items]
            return pickle.EMPTY_DICT + pickle.MARK + b"".join(pairs) + pickle.SETITEMS
        case list():
            pushed = [pickle_value(item, arrays) for item in cast(list[Any], value)]
            return pickle.EMPTY_LIST + pickle.MARK + b"".join(pushed) + pickle.APPENDS
        case tuple():
            pushed = [pickle_value(item, arrays) for item in cast(tuple[Any, ...], value)]
            return pickle.MARK + b"".join(pushed) + pickle.TUPLE
        case None | bool() | int() | float() | str():
            return pickle_plain(value)
        case _:
            raise TypeError(f"{type(value).__name__} is no plain type")


def pickle_plain(value: object) -> bytes:
    """The opcodes that push a value: its pickle, without the opcodes at the start and the end."""
    return pickle.dumps(value, PROTOCOL)[2:-1]


def pickle_tensor(array: Array, number: int) -> bytes:
    """The opcodes that push a tensor, contiguous and on the CPU, whose bytes are storage `number`."""
    name, shape = array.dtype.name, array.shape
    strides = tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))
    typed = name in STORAGES
    kind = (
        pickle_global("torch", STORAGES[name]) if typed else pickle_global("torch.storage", "UntypedStorage")
    )
    length = array.nbytes // array.dtype.itemsize if typed else array.nbytes
    storage = pickle_plain("storage") + kind + b"".join(map(pickle_plain, (f"{number}", "cpu", length)))
    no_hooks = pickle_global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    return b"".join([
        pickle_global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"),
        pickle.MARK,
        pickle.MARK + storage + pickle.TUPLE + pickle.BINPERSID,
        *map(pickle_plain, (0, shape, strides)),  # the first element is element 0 of the storage
        pickle.NEWFALSE,  # requires no gradient
        no_hooks,
        b"" if typed else pickle_global("torch", name),
        pickle.TUPLE + pickle.REDUCE,
    ])  # fmt: skip


def pickle_global(module: str, name: str) -> bytes:
    """The opcode that pushes a name of a module, which need not be imported to write it."""
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
