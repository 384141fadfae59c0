"""Seals: digests that tell a file that was changed from the one that was written.

Use:    write_sealed(path, facts); facts = read_sealed(path)
        sealing = Sealing(); sealing.update(piece); seal = sealing.seal()
        verify(folder, {"train.pt": seal}, most=CHECKED)
A small file of plain types carries its SHA-256 at its own end, behind what torch.load reads. A token file's
SHA-256 stands in vocab.pt, and beside it the SHA-256 of each of its blocks, so that a look at a few blocks is
possible where the whole file would take minutes.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray

from nanogpt.errors import UserError
from nanogpt.files import atomic_write

CHECKSUM_MARK = b"\nnanogpt sha256 "
"""What stands before the 32 bytes of SHA-256 at the end of a sealed file."""

CHECKSUM_SIZE = len(CHECKSUM_MARK) + 32

BLOCK_BYTES = 1 << 20
"""Bytes of a token file that have a digest of their own."""

VERIFY_BYTES = 1 << 30
"""Bytes of token files that are verified when a training begins: half a second to three, by processor."""

DAMAGED = "is damaged (its checksum does not match)"


class DamageError(UserError):
    """A file is not the one that was written. The message names it and gives no advice."""


@dataclass(frozen=True)
class Checksum:
    """The SHA-256 of a whole file, in hexadecimal; blocks: of each BLOCK of it, (n, 32) uint8, or None."""

    sha256: str
    blocks: NDArray[np.uint8] | None = None


class BlockHasher:
    """Makes the seal of a file while its bytes pass by."""

    def __init__(self) -> None:
        self.whole, self.block, self.room = hashlib.sha256(), hashlib.sha256(), BLOCK_BYTES
        self.digests: list[bytes] = []

    def update(self, piece: bytes) -> None:
        """Take the next bytes of the file."""
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
        """The seal of all that passed; a file of one block needs no digest of it."""
        digests = [*self.digests, *([self.block.digest()] if self.room < BLOCK_BYTES else [])]
        blocks = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32) if len(digests) > 1 else None
        return Checksum(self.whole.hexdigest(), blocks)


def verify(
    folder: Path,
    seals: Mapping[str, Checksum],
    *,
    max_bytes: int | None = VERIFY_BYTES,
    advance: Callable[[int], object] = int,
) -> None:
    """Compare files with their seals.

    most: up to so many bytes in all, everything is compared; of more, the first block of every file, the last
    ones, and others drawn at random, another time others, until so many bytes are. None: everything.
    advance: called with the number of bytes that were compared since the last call.
    Errors: DamageError that names the file; OSError if it cannot be read.
    """
    sizes = {name: (folder / name).stat().st_size for name in seals}
    if max_bytes is None or sum(sizes.values()) <= max_bytes:
        for name, seal in seals.items():
            digest = hashlib.sha256()
            with open(folder / name, "rb") as file:
                while piece := file.read(BLOCK_BYTES):
                    digest.update(piece)
                    advance(len(piece))
            if digest.hexdigest() != seal.sha256:
                raise DamageError(f"{folder / name} {DAMAGED}")
        return
    for name, number in pick_blocks(seals, sizes, max_bytes // BLOCK_BYTES):
        seal = seals[name]
        expected = bytes.fromhex(seal.sha256) if seal.blocks is None else seal.blocks[number].tobytes()
        with open(folder / name, "rb") as file:
            file.seek(number * BLOCK_BYTES)
            piece = file.read(BLOCK_BYTES)
        advance(len(piece))
        if hashlib.sha256(piece).digest() != expected or sizes[name] > count_blocks(seal) * BLOCK_BYTES:
            raise DamageError(f"{folder / name} {DAMAGED}")


def count_blocks(seal: Checksum) -> int:
    """How many blocks a file has."""
    return 1 if seal.blocks is None else len(seal.blocks)


def pick_blocks(
    seals: Mapping[str, Checksum], sizes: Mapping[str, int], most: int
) -> Iterator[tuple[str, int]]:
    """Files and numbers of blocks in them, `most` in all: the first of each, the last of each, any others."""
    random = np.random.default_rng()  # of its own, never that of a training
    names = [name for name in seals if sizes[name]]
    ends = list(accumulate(count_blocks(seals[name]) for name in names))
    firsts = [0, *ends[:-1]]
    places: list[int] = []
    for group in (firsts, [end - 1 for end in ends], range(ends[-1])):
        places += [group[i] for i in random.permutation(len(group))[:most].tolist()]
    for place in sorted(set(places[:most])):  # in the order of the disk
        file = bisect_right(ends, place)
        yield names[file], place - firsts[file]


class HashingWriter:
    """A file to write to that keeps the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, piece: bytes) -> int:
        """Write and count in."""
        self.digest.update(piece)
        return self.file.write(piece)

    def flush(self) -> None:
        """Pass the call on."""
        self.file.flush()


def save_with_checksum(path: Path, content: object, mark: bytes = CHECKSUM_MARK) -> None:
    """torch.save `content`, atomically, with the seal behind it: a mark of its kind, and the SHA-256.

    Errors: UserError if the folder cannot be written or the disk is full.
    """
    with atomic_write(path) as file:
        hashing = HashingWriter(file)
        torch.save(content, cast(BinaryIO, hashing))
        file.write(mark + hashing.digest.digest())


def load_with_checksum(path: Path) -> tuple[object, bool]:
    """The plain types in a file, and whether it bears a seal; older ones bear none.

    Errors: DamageError if the seal does not match; OSError, or whatever torch.load raises.
    """
    with open(path, "rb") as file:
        raw = file.read()
    body, seal = raw[:-CHECKSUM_SIZE], raw[-CHECKSUM_SIZE:]
    sealed = seal.startswith(CHECKSUM_MARK)
    if sealed and seal != CHECKSUM_MARK + hashlib.sha256(body).digest():
        raise DamageError(f"{path} {DAMAGED}")
    return torch.load(path, map_location="cpu", weights_only=True), sealed
