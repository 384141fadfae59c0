"""Write token files: append tokens, resume after a kill, and turn them into .pt files.

Example: work = EncodingJob(folder, config, paths); work.start(scanned, tokenizer)
         with work.open_token_files() as files: work.append(files, 0, ids, size); work.save_state(files)
         seal = write_tokens(work.token_path("train"), Path("train.pt"), np.uint16, 0, count)
"""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from nanogpt.data.config import PrepareConfig
from nanogpt.data.scan import ScanResult, tokenizer_settings
from nanogpt.data.vocab_file import FORMAT_VERSION, MASKS, SPLITS
from nanogpt.errors import UserError, require
from nanogpt.storage.files import atomic_write
from nanogpt.storage.pt_files import Stream, save
from nanogpt.storage.seals import BlockHasher, Checksum, HashingWriter, load_with_checksum, save_with_checksum
from nanogpt.tokenizer.base import Ids, Tokenizer
from nanogpt.tokenizer.registry import from_dict

COPY_BYTES = 1 << 22
"""Bytes to copy at a time."""


class EncodingJob:
    """An encoding in progress, whose state is saved in its own folder, so that it resumes after a kill.

    scanned: None if there is nothing to resume. tokens, bytes: of each split so far. counted, counted_bytes:
    those that count for the loss. batches: number encoded so far. masked: whether splits have masks.
    names: of the growing files: the splits, then the masks. ranges: for each file, the end (in bytes) and the
    SHA-256 of each range that was saved. unsaved: the running SHA-256 of what follows the last range.
    """

    def __init__(self, folder: Path, config: PrepareConfig, files: Sequence[Path]) -> None:
        self.folder = folder
        require(
            not folder.is_symlink() and (folder.is_dir() or not folder.exists()),
            f"{folder} is not a folder of this program: move it away",
        )
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        plan = json.dumps(
            [FORMAT_VERSION, {**asdict(config), "overwrite": False}, tokenizer_settings(config), stats]
        )
        self.key = hashlib.sha256(plan.encode("utf-8", "surrogateescape")).hexdigest()
        self.scanned: ScanResult | None = None
        self.masked = config.pair is not None
        self.names = [*SPLITS, *(MASKS.values() if self.masked else ())]
        self.tokens, self.bytes, self.batches = [0, 0], [0, 0], 0
        self.counted, self.counted_bytes = [0, 0], [0, 0]
        self.ranges: list[list[tuple[int, str]]] = [[] for _ in self.names]
        self.unsaved = [hashlib.sha256() for _ in self.names]
        state = self.load_state()
        if state is not None:
            for name in ("tokens", "bytes", "batches", "counted", "counted_bytes"):
                setattr(self, name, state[name])
            self.ranges = state["stretches"]
            self.tokenizer = from_dict(state["tokenizer"])
            self.scanned = ScanResult(first_val=state["first_val"])
            for name in ("characters", "digests"):
                getattr(self.scanned, name).frombytes(state[name].numpy().tobytes())
        elif folder.exists():
            shutil.rmtree(folder)

    def load_state(self) -> dict[str, Any] | None:
        """The saved state of this same preparation, if the token files match its checksums; else None."""
        paths = [self.folder / "state.pt", *map(self.token_path, self.names)]
        if any(path.is_symlink() or not path.is_file() for path in paths):  # a pipe would block
            return None
        try:
            content, sealed = load_with_checksum(paths[0])
            state = cast(dict[str, Any], content)
            if not sealed or state["key"] != self.key:
                return None
            same = all(map(matches_checksums, paths[1:], state["stretches"]))
            return state if same else None
        except MemoryError:
            raise
        except Exception:  # damaged: start over
            return None

    def token_path(self, name: str) -> Path:
        """Path of the growing tokens of a split, or of its mask."""
        return self.folder / f"{name}.tokens"

    def start(self, scanned: ScanResult, tokenizer: Tokenizer) -> None:
        """Start the encoding."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.scanned, self.tokenizer = scanned, tokenizer

    @contextmanager
    def open_token_files(self) -> Generator[list[BinaryIO]]:
        """Open the files to append to, cut back to the saved state. Raises: UserError for a full disk."""
        try:
            with ExitStack() as stack:
                files: list[BinaryIO] = []
                for name, size in zip(self.names, self.sizes(), strict=True):
                    file = stack.enter_context(open(self.token_path(name), "ab"))
                    file.truncate(size)
                    files.append(file)
                yield files
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder} ({error.strerror or error}): make room, then run the "
                "command again: it goes on where it was"
            ) from error

    def dtype(self, name: str) -> type[np.unsignedinteger[Any]]:
        """The type of the values in a file."""
        return self.tokenizer.dtype if name in SPLITS else np.uint8

    def sizes(self) -> list[int]:
        """Bytes in each file so far."""
        counts = [*self.tokens, *self.tokens][: len(self.names)]
        dtypes = map(self.dtype, self.names)
        return [np.dtype(dtype).itemsize * count for dtype, count in zip(dtypes, counts, strict=True)]

    def append(self, files: Sequence[BinaryIO], side: int, ids: Ids, size: int) -> None:
        """Append the tokens of `size` bytes of text to a split. Raises: OSError if the disk is full."""
        self.write(files, side, ids.tobytes())
        self.tokens[side] += len(ids)
        self.bytes[side] += size

    def append_mask(self, files: Sequence[BinaryIO], side: int, mask: NDArray[np.bool_], size: int) -> None:
        """Append which tokens count, with `size` bytes of text in them, to the mask of a split."""
        self.write(files, len(SPLITS) + side, mask.astype(np.uint8).tobytes())
        self.counted[side] += int(mask.sum())
        self.counted_bytes[side] += size

    def write(self, files: Sequence[BinaryIO], number: int, raw: bytes) -> None:
        """Append to a file."""
        files[number].write(raw)
        self.unsaved[number].update(raw)

    def save_state(self, files: Sequence[BinaryIO]) -> None:
        """Sync the token files, and save the progress of the encoding."""
        assert self.scanned is not None
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        for number, size in enumerate(self.sizes()):
            self.ranges[number].append((size, self.unsaved[number].hexdigest()))
            self.unsaved[number] = hashlib.sha256()
        state = {
            "key": self.key,
            "tokenizer": self.tokenizer.to_dict(),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "counted": self.counted,
            "counted_bytes": self.counted_bytes,
            "batches": self.batches,
            "stretches": self.ranges,
            "first_val": self.scanned.first_val,
            "characters": as_array(self.scanned.characters),
            "digests": as_array(self.scanned.digests),
        }
        save_with_checksum(self.folder / "state.pt", state)

    def remove(self) -> None:
        """Remove the folder: the preparation is done."""
        shutil.rmtree(self.folder, ignore_errors=True)


def as_array(values: "array[int]") -> NDArray[np.int64]:
    """64-bit numbers as signed ones, (N,), which is what PyTorch has."""
    return np.frombuffer(values, np.int64)


def matches_checksums(path: Path, ranges: Sequence[tuple[int, str]]) -> bool:
    """Whether a file begins with byte ranges that have these ends and SHA-256s. Raises: OSError."""
    position = 0
    with open(path, "rb") as file:
        for end, expected in ranges:
            digest = hashlib.sha256()
            while position < end and (block := file.read(min(end - position, COPY_BYTES))):
                digest.update(block)
                position += len(block)
            if position < end or digest.hexdigest() != expected:
                return False
    return True


def write_tokens(
    raw: Path, path: Path, dtype: type[np.unsignedinteger[Any]], first: int, count: int
) -> Checksum:
    """Write a .pt file with one tensor, (count,), of the tokens in `raw` from number `first` on.

    They are copied block by block, to save memory. Returns the file's checksum, computed on the way.
    Raises: UserError if the disk is full.
    """
    width, sealing = np.dtype(dtype).itemsize, BlockHasher()
    with atomic_write(path) as file:
        blocks = read_range(raw, width * first, width * count)
        save(Stream(np.dtype(dtype), count, blocks), HashingWriter(file, sealing))
    return sealing.checksum()


def read_range(path: Path, start: int, size: int) -> Iterator[bytes]:
    """The `size` bytes of a file from `start` on, in blocks. Raises: UserError if they are not all there."""
    with open(path, "rb") as file:
        file.seek(start)
        while size and (block := file.read(min(size, COPY_BYTES))):
            yield block
            size -= len(block)
    require(not size, f"{path} was cut while it was being read: run the command again")
