"""Checksums (SHA-256) of saved files: inside a small file, and of token files as a whole and by blocks.

Example: save_with_checksum(path, content); content, has_checksum = load_with_checksum(path)
         hasher = BlockHasher(); hasher.update(piece); checksum = hasher.checksum()
         verify(folder, {"train.pt": checksum}, max_bytes=VERIFY_BYTES)
A small file of plain types ends with its checksum, after the bytes that torch.load reads. The checksum of a
token file is in vocab.pt, together with those of its blocks: a few blocks can be verified where reading the
whole file would take minutes.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from nanogpt.errors import UserError
from nanogpt.storage import pt_files
from nanogpt.storage.files import atomic_write

CHECKSUM_MARK = b"\nnanogpt sha256 "
"""Bytes before the 32 bytes of SHA-256 at the end of a file."""

CHECKSUM_SIZE = len(CHECKSUM_MARK) + 32

BLOCK_BYTES = 1 << 20
"""Size of a block of a token file that has a checksum of its own."""

VERIFY_BYTES = 1 << 30
"""Bytes of token files to verify when a training begins: 0.5 to 3 seconds, depending on the processor."""

DAMAGED = "is damaged (its checksum does not match)"


class DamageError(UserError):
    """A file has changed since it was written. The message names the file and gives no advice."""


@dataclass(frozen=True)
class Checksum:
    """SHA-256 of a file, in hexadecimal. blocks: of its blocks, (n, 32) uint8; None for a single block."""

    sha256: str
    blocks: NDArray[np.uint8] | None = None


class BlockHasher:
    """Computes the checksum of a file piece by piece."""

    def __init__(self) -> None:
        self.whole, self.block, self.room = hashlib.sha256(), hashlib.sha256(), BLOCK_BYTES
        self.digests: list[bytes] = []

    def update(self, piece: bytes) -> None:
        """Add the next bytes of the file."""
        self.whole.update(piece)
        view = memoryview(piece)
        while view:
            part, view = view[: self.room], view[self.room :]
            self.block.update(part)
            self.room -= len(part)
            if not self.room:
                self.digests.append(self.block.digest())
                self.block, self.room = hashlib.sha256(), BLOCK_BYTES

    def checksum(self) -> Checksum:
        """The checksum of the bytes so far."""
        digests = [*self.digests, *([self.block.digest()] if self.room < BLOCK_BYTES else [])]
        blocks = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32) if len(digests) > 1 else None
        return Checksum(self.whole.hexdigest(), blocks)


def verify(
    folder: Path,
    checksums: Mapping[str, Checksum],
    *,
    max_bytes: int | None = VERIFY_BYTES,
    advance: Callable[[int], object] = int,
) -> None:
    """Compare files with their checksums.

    max_bytes: verify everything if the files are no larger in all (None: however large). Otherwise verify as
    many bytes: the first block of every file, the last one of every file, and other blocks at random.
    advance: called with the number of bytes verified since the last call.
    Raises: DamageError that names the file; OSError if it cannot be read.
    """
    sizes = {name: (folder / name).stat().st_size for name in checksums}
    if max_bytes is None or sum(sizes.values()) <= max_bytes:
        for name, checksum in checksums.items():
            digest = hashlib.sha256()
            with open(folder / name, "rb") as file:
                while piece := file.read(BLOCK_BYTES):
                    digest.update(piece)
                    advance(len(piece))
            if digest.hexdigest() != checksum.sha256:
                raise DamageError(f"{folder / name} {DAMAGED}")
        return
    for name, number in pick_blocks(checksums, sizes, max_bytes // BLOCK_BYTES):
        checksum = checksums[name]
        expected = (
            bytes.fromhex(checksum.sha256) if checksum.blocks is None else checksum.blocks[number].tobytes()
        )
        with open(folder / name, "rb") as file:
            file.seek(number * BLOCK_BYTES)
            piece = file.read(BLOCK_BYTES)
        advance(len(piece))
        if hashlib.sha256(piece).digest() != expected or sizes[name] > count_blocks(checksum) * BLOCK_BYTES:
            raise DamageError(f"{folder / name} {DAMAGED}")


def count_blocks(checksum: Checksum) -> int:
    """Number of blocks of a file."""
    return 1 if checksum.blocks is None else len(checksum.blocks)


def pick_blocks(
    checksums: Mapping[str, Checksum], sizes: Mapping[str, int], count: int
) -> Iterator[tuple[str, int]]:
    """Names of files and numbers of blocks to verify: first blocks, then last ones, then random ones."""
    random = np.random.default_rng()  # not the global generator, which the training uses
    names = [name for name in checksums if sizes[name]]
    ends = list(accumulate(count_blocks(checksums[name]) for name in names))
    firsts = [0, *ends[:-1]]
    places: list[int] = []
    for group in (firsts, [end - 1 for end in ends], range(ends[-1])):
        places += [group[i] for i in random.permutation(len(group))[:count].tolist()]
    for place in sorted(set(places[:count])):  # in the order on the disk
        file = bisect_right(ends, place)
        yield names[file], place - firsts[file]


class Hasher(Protocol):
    """A digest that is fed piece by piece: of hashlib, or a BlockHasher."""

    def update(self, piece: bytes, /) -> object:
        """Add the next bytes."""
        ...


class HashingWriter:
    """A file to write to, that adds the bytes written to a digest."""

    def __init__(self, file: BinaryIO, digest: Hasher) -> None:
        self.file, self.digest = file, digest

    def write(self, piece: bytes) -> int:
        """Write the bytes and add them to the digest."""
        self.digest.update(piece)
        return self.file.write(piece)

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()


def save_with_checksum(
    path: Path,
    content: object,
    mark: bytes = CHECKSUM_MARK,
    save: Callable[[object, Any], object] = pt_files.save,
) -> None:
    """Save `content` as a .pt file, atomically, followed by `mark` and the SHA-256.

    save: writes content to an open file; for tensors torch.save.
    Raises: UserError if the folder cannot be written or the disk is full.
    """
    with atomic_write(path) as file:
        digest = hashlib.sha256()
        save(content, HashingWriter(file, digest))
        file.write(mark + digest.digest())


def load_with_checksum(path: Path) -> tuple[object, bool]:
    """Load plain types and tensors. Returns them and whether the file has a checksum, which older files lack.

    Raises: DamageError if the checksum does not match; OSError; the errors of torch.load.
    """
    with open(path, "rb") as file:
        raw = file.read()
    body, seal = raw[:-CHECKSUM_SIZE], raw[-CHECKSUM_SIZE:]
    sealed = seal.startswith(CHECKSUM_MARK)
    if sealed and seal != CHECKSUM_MARK + hashlib.sha256(body).digest():
        raise DamageError(f"{path} {DAMAGED}")
    import torch  # writing needs none

    return torch.load(path, map_location="cpu", weights_only=True), sealed
