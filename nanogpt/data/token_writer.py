"""Token files while they are written: they grow, survive a kill, and become .pt files in the end.

Use:    work = Work(folder, config, files); work.begin(survey, tokenizer)
        with work.writing() as files: work.add(files, 0, ids, size); work.save(files)
        seal = write_tokens(work.tokens_file("train"), Path("train.pt"), np.uint16, 0, count)
"""

import hashlib
import json
import os
import shutil
import struct
import zipfile
from array import array
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray

from nanogpt.config import DataConfig
from nanogpt.data.dataset import FORMAT, SPLITS
from nanogpt.data.scan import ScanResult, tokenizer_settings
from nanogpt.data.token_map import PLACE
from nanogpt.errors import UserError, require
from nanogpt.files import atomic_write
from nanogpt.seals import BlockHasher, Checksum, load_with_checksum, save_with_checksum
from nanogpt.tokenizer.base import Ids, Tokenizer
from nanogpt.tokenizer.registry import from_dict

COPIED = 1 << 22
"""Bytes copied at a time."""


class EncodingJob:
    """A preparation on its way, in a folder of its own, so that it can go on after a kill.

    survey: None if there is nothing to go on with. tokens, bytes: of each split, so far; batches: how many
    batches of text these are. stretches: of each split, where every stretch that was saved at once ends, in
    bytes, and its SHA-256; new: the same of what was added since.
    """

    def __init__(self, folder: Path, config: DataConfig, files: Sequence[Path]) -> None:
        self.folder = folder
        require(
            not folder.is_symlink() and (folder.is_dir() or not folder.exists()),
            f"{folder} is not a folder of this program: move it away",
        )
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        plan = json.dumps([FORMAT, {**asdict(config), "overwrite": False}, tokenizer_settings(config), stats])
        self.key = hashlib.sha256(plan.encode("utf-8", "surrogateescape")).hexdigest()
        self.survey: ScanResult | None = None
        self.tokens, self.bytes, self.batches = [0, 0], [0, 0], 0
        self.stretches: list[list[tuple[int, str]]] = [[], []]
        self.new = [hashlib.sha256(), hashlib.sha256()]
        state = self.saved()
        if state is not None:
            self.tokens, self.bytes, self.batches = state["tokens"], state["bytes"], state["batches"]
            self.stretches = state["stretches"]
            self.tokenizer = from_dict(state["tokenizer"])
            self.survey = ScanResult(first_val=state["first_val"])
            for name in ("characters", "digests"):
                getattr(self.survey, name).frombytes(state[name].numpy().tobytes())
        elif folder.exists():
            shutil.rmtree(folder)

    def saved(self) -> dict[str, Any] | None:
        """What was saved of this very preparation, if its token files are, to the bit, what it speaks of."""
        paths = [self.folder / "state.pt", *map(self.tokens_file, SPLITS)]
        if any(path.is_symlink() or not path.is_file() for path in paths):  # a pipe would be waited for
            return None
        try:
            content, sealed = load_with_checksum(paths[0])
            state = cast(dict[str, Any], content)
            if not sealed or state["key"] != self.key:
                return None
            same = all(map(has_stretches, paths[1:], state["stretches"]))
            return state if same else None
        except MemoryError:
            raise
        except Exception:  # damaged: begin again
            return None

    def tokens_file(self, name: str) -> Path:
        """Where the tokens of a split grow."""
        return self.folder / f"{name}.tokens"

    def begin(self, survey: ScanResult, tokenizer: Tokenizer) -> None:
        """Start with the encoding."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.survey, self.tokenizer = survey, tokenizer

    @contextmanager
    def writing(self) -> Generator[list[BinaryIO]]:
        """The files to append to, cut back to what was saved. Errors: UserError if the disk is full."""
        width = np.dtype(self.tokenizer.dtype).itemsize
        try:
            with ExitStack() as stack:
                files: list[BinaryIO] = []
                for name, count in zip(SPLITS, self.tokens, strict=True):
                    file = stack.enter_context(open(self.tokens_file(name), "ab"))
                    file.truncate(width * count)
                    files.append(file)
                yield files
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder} ({error.strerror or error}): make room, then run the "
                "command again: it goes on where it was"
            ) from error

    def add(self, files: Sequence[BinaryIO], side: int, ids: Ids, size: int) -> None:
        """Append tokens, of `size` bytes of text, to a split. Errors: OSError if the disk is full."""
        raw = ids.tobytes()
        files[side].write(raw)
        self.new[side].update(raw)
        self.tokens[side] += len(ids)
        self.bytes[side] += size

    def save(self, files: Sequence[BinaryIO]) -> None:
        """Remember how far the encoding is."""
        assert self.survey is not None
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        width = np.dtype(self.tokenizer.dtype).itemsize
        for side, count in enumerate(self.tokens):
            self.stretches[side].append((width * count, self.new[side].hexdigest()))
            self.new[side] = hashlib.sha256()
        state = {
            "key": self.key,
            "tokenizer": self.tokenizer.to_dict(),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "batches": self.batches,
            "stretches": self.stretches,
            "first_val": self.survey.first_val,
            "characters": as_tensor(self.survey.characters),
            "digests": as_tensor(self.survey.digests),
        }
        save_with_checksum(self.folder / "state.pt", state)

    def remove(self) -> None:
        """It is done."""
        shutil.rmtree(self.folder, ignore_errors=True)


def as_tensor(values: "array[int]") -> torch.Tensor:
    """64-bit numbers as a tensor, which torch.save takes."""
    return torch.from_numpy(np.frombuffer(values, np.int64).copy())


def has_stretches(path: Path, stretches: Sequence[tuple[int, str]]) -> bool:
    """Whether a file begins with stretches of bytes of these ends and SHA-256s. Errors: OSError."""
    place = 0
    with open(path, "rb") as file:
        for end, expected in stretches:
            digest = hashlib.sha256()
            while place < end and (piece := file.read(min(end - place, COPIED))):
                digest.update(piece)
                place += len(piece)
            if place < end or digest.hexdigest() != expected:
                return False
    return True


def write_tokens(
    raw: Path, path: Path, dtype: type[np.unsignedinteger[Any]], first: int, count: int
) -> Checksum:
    """Make of bare tokens, `count` in `raw` from the `first` on, a .pt file with one tensor, (count,).

    torch.save writes the file without the tokens; they are then copied to their place in it, so that
    little is in memory at a time. Returns its seal, taken on the way. Errors: UserError if the disk is full.
    """
    width, sealing = np.dtype(dtype).itemsize, BlockHasher()
    with atomic_write(path) as file:
        with torch.serialization.skip_data():
            torch.save(torch.from_numpy(stand_in(raw, dtype, count)), file)
        with zipfile.ZipFile(file) as archive:
            entry = next(item for item in archive.infolist() if item.filename.endswith("/data/0"))
        file.seek(entry.header_offset + PLACE)
        name, extra = struct.unpack("<HH", file.read(4))
        head = entry.header_offset + PLACE + 4 + name + extra
        file.seek(0)
        sealing.update(file.read(head))
        with open(raw, "rb") as tokens:
            tokens.seek(width * first)
            left = width * count
            file.seek(head)
            while left and (block := tokens.read(min(left, COPIED))):
                file.write(block)
                sealing.update(block)
                left -= len(block)
        require(not left, f"{raw} was cut while it was being read: run the command again")
        sealing.update(file.read())
    return sealing.checksum()


def stand_in(raw: Path, dtype: type[np.unsignedinteger[Any]], count: int) -> NDArray[Any]:
    """Any `count` values, (count,), that take no memory: of more tokens than fit into it, too.

    torch.save asks for a tensor although it skips the values. A map of the file that has them will do, not
    written to; an empty array where files cannot be mapped.
    """
    require(
        raw.stat().st_size >= np.dtype(dtype).itemsize * count,
        f"{raw} was cut while it was being read: run the command again",
    )
    try:
        return np.asarray(np.memmap(raw, dtype, "r+", shape=(count,)))
    except (OSError, ValueError):
        return np.empty(count, dtype)
