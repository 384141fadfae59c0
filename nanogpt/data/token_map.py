"""Open one token file for reading, as a read-only memory map wherever that is possible.

Example: tokens = open_tokens(Path("train.pt")); tokens[100:200]
The file is a tensor as torch.save writes it. torch.load would map it writable and private, which the system
counts as memory. So this module finds the position of the tokens in the file and maps them read-only: the
file may be larger than memory and swap. Knows nothing of vocabularies; gives no advice about damaged files.
"""

import errno
import mmap
import os
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from nanogpt.errors import UserError, require
from nanogpt.storage.seals import DamageError
from nanogpt.terminal.console import warn

NAME_LENGTH_OFFSET = 26
"""Offset, in a zip entry's header, of the lengths of its name and extra field (APPNOTE.TXT 4.3.7)."""

MAX_HEADER_BYTES = 1 << 16
"""Maximum size of the description of a tensor: a longer one is hostile."""

DTYPES: dict[str, type[np.integer[Any]]] = {
    "torch ByteStorage": np.uint8,
    "torch CharStorage": np.int8,
    "torch ShortStorage": np.int16,
    "torch IntStorage": np.int32,
    "torch LongStorage": np.int64,
    "torch uint16": np.uint16,
    "torch uint32": np.uint32,
    "torch uint64": np.uint64,
}
"""Integer types by their names in torch.save."""

ARGUMENT_OPCODES = {"GLOBAL", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"}
CONSTANT_OPCODES: dict[str, Any] = {"NEWFALSE": False, "NEWTRUE": True, "EMPTY_TUPLE": ()}
IGNORED_OPCODES = {"PROTO", "BINPUT", "LONG_BINPUT", "BINPERSID", "STOP"}
"""Opcodes of a pickle: those that push their argument, those that push a constant, and those without effect
here (a storage is represented by its tuple)."""

NO_MMAP_ERRORS = {
    errno.ENODEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EACCES,
    errno.EPERM,
}
"""Error numbers of file systems that cannot map files (network drives, FUSE)."""

NO_MEMORY_ERRORS = {errno.ENOMEM, errno.EAGAIN}

WINDOWS_NO_MEMORY_ERRORS = {8, 14, 1455}
"""Windows' error numbers for too little memory; the last: the paging file is too small."""


class TensorLocation(NamedTuple):
    """A tensor in a file: its type, its length, and the byte offset of its values."""

    dtype: np.dtype[Any]
    length: int
    offset: int


class FileStamp(NamedTuple):
    """Identity, size in bytes and modification time of a file, to detect changes."""

    device_and_inode: tuple[int, int]
    size: int
    modified_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> "FileStamp":
        """The stamp of a file."""
        return cls((stat.st_dev, stat.st_ino), stat.st_size, stat.st_mtime_ns)


class ChangeGuard:
    """Checks that a mapped file has not changed, since reading from a truncated map kills the process.

    verify: raises DamageError if the file differs from its checksum (a new modification time alone is
    harmless); None: there is no checksum. vocab_size: limit of the ids, checked when read; None: not checked.
    """

    def __init__(self, path: Path, stamp: FileStamp) -> None:
        self.path, self.stamp = path.absolute(), stamp
        self.verify: Callable[[], None] | None = None
        self.vocab_size: int | None = None

    def check(self) -> None:
        """Raise UserError if the file was changed in place since it was opened."""
        try:
            now = FileStamp.of(self.path.stat())
        except OSError:
            return  # deleted or moved: the mapped content stays
        if now == self.stamp or now.device_and_inode != self.stamp.device_and_inode:  # another file by now
            return
        same = False
        if now.size == self.stamp.size and self.verify is not None:
            with suppress(DamageError, OSError):
                self.verify()
                same = True
        require(
            same,
            f"{self.path} was changed while it was in use: prepare the data again (data.py --overwrite), "
            "then go on with --resume",
        )
        self.stamp = now


class TokenFile(np.ndarray[Any, np.dtype[Any]]):
    """The tokens in a mapped file, (N,). A selection is a plain array; the file is checked for changes."""

    guard: ChangeGuard | None

    def __array_finalize__(self, array: NDArray[Any] | None) -> None:
        self.guard = getattr(array, "guard", None)

    def __getitem__(self, index: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.guard is None:
            return super().__getitem__(index)
        self.guard.check()
        found: Any = super().__getitem__(index)
        if isinstance(found, TokenFile):
            found = found.view(np.ndarray)
            if self.guard.vocab_size is not None:
                check_ids(found, self.guard.vocab_size, self.guard.path)
            if not np.may_share_memory(found, self):  # a copy: did the file change meanwhile?
                self.guard.check()
        return found


def check_ids(tokens: NDArray[Any], vocab_size: int, path: Path) -> None:
    """Raise DamageError if an id is outside a vocabulary of this size."""
    if len(tokens) and np.iinfo(tokens.dtype).max >= vocab_size and int(tokens.max()) >= vocab_size:
        raise DamageError(
            f"{path} is malformed (it has the id {int(tokens.max())}, the vocabulary {vocab_size:,})"
        )
    if len(tokens) and np.iinfo(tokens.dtype).min < 0 and int(tokens.min()) < 0:
        raise DamageError(f"{path} is malformed (it has the id {int(tokens.min())})")


def open_tokens(path: Path) -> NDArray[Any]:
    """Open the tokens in a file, (N,): a TokenFile; or an array, where the file system cannot map.

    Raises: DamageError if the file is not a vector of integers; UserError if memory is too short;
    OSError if it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            described = locate_tensor(file)
        except MemoryError:
            raise
        except Exception as error:  # a damaged archive raises many kinds, also for a wrong offset
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            raise DamageError(f"{path} is damaged") from error
        if described is None:
            raise DamageError(f"{path} does not hold tokens")
        stamp = FileStamp.of(os.fstat(file.fileno()))
        try:
            tokens = map_tokens(file, described).view(TokenFile)
        except ValueError as error:  # the file was truncated since
            raise DamageError(f"{path} is damaged") from error
        except OSError as error:
            return read_tokens(file, path, described, error)
        tokens.guard = ChangeGuard(path, stamp)
        return tokens


def locate_tensor(file: BinaryIO) -> TensorLocation | None:
    """Find the tensor in a .pt file without reading it; None if it is not a vector of integers.

    Raises: ValueError if the file is truncated; the errors of zipfile if it is no archive.
    """
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        header = next(entry for name, entry in entries.items() if name.endswith("/data.pkl"))
        if header.file_size > MAX_HEADER_BYTES:
            return None
        found = parse_tensor(archive.read(header))
        root = header.filename.removesuffix("data.pkl")
        order = entries.get(root + "byteorder")
        foreign = order is not None and archive.read(order).decode() != sys.byteorder
    if found is None or foreign:
        return None
    dtype, key, first, count = found
    entry = entries[f"{root}data/{key}"]
    file.seek(entry.header_offset + NAME_LENGTH_OFFSET)
    name, extra = struct.unpack("<HH", file.read(4))
    offset = entry.header_offset + NAME_LENGTH_OFFSET + 4 + name + extra + first * dtype.itemsize
    size = os.fstat(file.fileno()).st_size
    if entry.compress_type != zipfile.ZIP_STORED or offset + count * dtype.itemsize > size:
        raise ValueError("cut, or compressed")
    return TensorLocation(dtype, count, offset)


def parse_tensor(pickled: bytes) -> tuple[np.dtype[Any], str, int, int] | None:
    """Parse the pickle of one vector of integers: type, storage, index of its first value, length.

    The pickle is read as a list of opcodes and never run, so a hostile one can do nothing.
    """
    match read_pickle(pickled):
        case [
            "torch._utils _rebuild_tensor_v2" | "torch._utils _rebuild_tensor_v3",
            (("storage", kind, str(key), _, int()), int(first), (int(count),), (int(stride),), _, _, *more),
        ] if first >= 0 and count > 0 and (stride == 1 or count == 1):
            name = more[0] if more else kind
            dtype = DTYPES.get(name) if isinstance(name, str) else None
            return (np.dtype(dtype), key, first, count) if dtype else None
        case _:
            return None


def read_pickle(pickled: bytes) -> list[Any] | None:
    """The function that a pickle calls and its arguments; None if an opcode is not one of a tensor's."""
    stack: list[Any] = []
    marks: list[int] = []
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name == "MARK":
            marks.append(len(stack))
        elif name in ARGUMENT_OPCODES:
            stack.append(argument)
        elif name in CONSTANT_OPCODES:
            stack.append(CONSTANT_OPCODES[name])
        elif name.startswith("TUPLE"):
            first = marks.pop() if name == "TUPLE" else len(stack) - int(name[-1])
            stack[first:] = [tuple(stack[first:])]
        elif name == "REDUCE":
            stack[-2:] = [[stack[-2], stack[-1]]]
        elif name not in IGNORED_OPCODES:
            return None
    return cast("list[Any]", stack[-1]) if isinstance(stack[-1], list) else None


def map_tokens(file: BinaryIO, described: TensorLocation) -> NDArray[Any]:
    """Map the values of a file, read-only, (N,).

    Raises: OSError if they cannot be mapped, ValueError if the file is too short.
    """
    start = described.offset - described.offset % mmap.ALLOCATIONGRANULARITY
    size = described.offset + described.length * described.dtype.itemsize - start
    try:
        region = map_region(file.fileno(), size, start)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE) or not allow_more_files():
            raise
        region = map_region(file.fileno(), size, start)
    return np.frombuffer(region, described.dtype, described.length, described.offset - start)


def map_region(descriptor: int, size: int, start: int) -> mmap.mmap:
    """Map a part of a file, read-only. Before Python 3.13, a map keeps a file descriptor of its own."""
    if sys.version_info >= (3, 13) and sys.platform != "win32":
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ, offset=start, trackfd=False)
    return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ, offset=start)


def allow_more_files() -> bool:
    """Raise this process's limit of open files to the system's. False: it is there already."""
    if sys.platform == "win32":
        return False
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return True
    return False


def read_tokens(file: BinaryIO, path: Path, described: TensorLocation, error: OSError) -> NDArray[Any]:
    """Read the values into memory, (N,), after the system refused to map them with `error`.

    Raises: UserError if memory is too short.
    """
    size = described.length * described.dtype.itemsize
    lacking = f"not enough memory to map {path} ({size:,} bytes): end other programs, or raise `ulimit -v`"
    windows = getattr(error, "winerror", None)
    require(error.errno not in NO_MEMORY_ERRORS and windows not in WINDOWS_NO_MEMORY_ERRORS, lacking)
    require(
        error.errno not in (errno.EMFILE, errno.ENFILE),
        f"too many files are open to open {path}: raise `ulimit -n`, or prepare the data with a "
        "larger --shard_tokens",
    )
    if error.errno not in NO_MMAP_ERRORS:
        raise error
    warn(f"{path} cannot be mapped here ({error.strerror}): its {size:,} bytes are read into memory instead")
    try:
        file.seek(described.offset)
        tokens = np.fromfile(file, described.dtype, described.length)
    except MemoryError as lack:
        raise UserError(
            f"not enough memory for {path} ({size:,} bytes), which cannot be mapped here: copy the folder "
            "to a disk of this machine, and give it with --data_dir"
        ) from lack
    if len(tokens) < described.length:
        raise DamageError(f"{path} is damaged")
    return tokens
