"""Token files while they are written: they grow, survive a kill, and become .pt files in the end.

Use:    work = Work(folder, config, files); work.begin(survey, tokenizer)
        with work.writing() as files: ids.tofile(files[0]); work.save(files)
        write_tokens(work.tokens_file("train"), Path("train.pt"), np.uint16, count)
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

from nanogpt.config import DataConfig, UserError
from nanogpt.data import FORMAT, SPLITS, save_plain
from nanogpt.files import replacing
from nanogpt.survey import Survey, tokenizer_settings
from nanogpt.tokenizer import Tokenizer
from nanogpt.vocabulary import from_dict

COPIED = 1 << 22
"""Bytes copied at a time."""

PLACE = 26
"""Where a zip entry's header says how long its name and its extra field are (APPNOTE.TXT 4.3.7)."""


class Work:
    """A preparation on its way, in a folder of its own, so that it can go on after a kill.

    survey: None if there is nothing to go on with. tokens, bytes: of each split, so far; batches: how many
    batches of text these are.
    """

    def __init__(self, folder: Path, config: DataConfig, files: Sequence[Path]) -> None:
        self.folder = folder
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        plan = json.dumps([FORMAT, {**asdict(config), "overwrite": False}, tokenizer_settings(config), stats])
        self.key = hashlib.sha256(plan.encode("utf-8", "surrogateescape")).hexdigest()
        self.survey: Survey | None = None
        self.tokens, self.bytes, self.batches = [0, 0], [0, 0], 0
        state = self.saved()
        if state is not None:
            self.tokens, self.bytes, self.batches = state["tokens"], state["bytes"], state["batches"]
            self.tokenizer = from_dict(state["tokenizer"])
            self.survey = Survey(first_val=state["first_val"])
            for name in ("characters", "digests"):
                getattr(self.survey, name).frombytes(state[name].numpy().tobytes())
        elif folder.exists():
            shutil.rmtree(folder)

    def saved(self) -> dict[str, Any] | None:
        """What was saved of this very preparation, if its token files have all that it speaks of."""
        try:
            state = cast(dict[str, Any], torch.load(self.folder / "state.pt", weights_only=True))
            there = [self.tokens_file(name).stat().st_size for name in SPLITS]
            enough = all(size >= width for size, width in zip(there, state["sizes"], strict=True))
            return state if state["key"] == self.key and enough else None
        except Exception:  # none, or damaged: begin again
            return None

    def tokens_file(self, name: str) -> Path:
        """Where the tokens of a split grow."""
        return self.folder / f"{name}.tokens"

    def begin(self, survey: Survey, tokenizer: Tokenizer) -> None:
        """Start with the encoding."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.survey, self.tokenizer = survey, tokenizer

    @contextmanager
    def writing(self) -> Generator[list[BinaryIO]]:
        """The files to append to, cut back to what was saved. Errors: UserError on a full disk."""
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
            raise UserError(f"cannot write {self.folder}: {error.strerror or error}") from error

    def save(self, files: Sequence[BinaryIO]) -> None:
        """Remember how far the encoding is."""
        assert self.survey is not None
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        width = np.dtype(self.tokenizer.dtype).itemsize
        state = {
            "key": self.key,
            "tokenizer": self.tokenizer.to_dict(),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "batches": self.batches,
            "sizes": [width * count for count in self.tokens],
            "first_val": self.survey.first_val,
            "characters": as_tensor(self.survey.characters),
            "digests": as_tensor(self.survey.digests),
        }
        save_plain(self.folder / "state.pt", state)

    def remove(self) -> None:
        """It is done."""
        shutil.rmtree(self.folder, ignore_errors=True)


def as_tensor(values: "array[int]") -> torch.Tensor:
    """64-bit numbers as a tensor, which torch.save takes."""
    return torch.from_numpy(np.frombuffer(values, np.int64).copy())


def write_tokens(raw: Path, path: Path, dtype: type[np.unsignedinteger[Any]], first: int, count: int) -> None:
    """Make of bare tokens, `count` in `raw` from the `first` on, a .pt file with one tensor, (count,).

    torch.save writes the file without the tokens; they are then copied to their place in it, so that
    little is in memory at a time. Errors: UserError if the disk is full.
    """
    width = np.dtype(dtype).itemsize
    with replacing(path) as file:
        with torch.serialization.skip_data():
            torch.save(torch.from_numpy(np.empty(count, dtype)), file)
        with zipfile.ZipFile(file) as archive:
            entry = next(item for item in archive.infolist() if item.filename.endswith("/data/0"))
        file.seek(entry.header_offset + PLACE)
        name, extra = struct.unpack("<HH", file.read(4))
        file.seek(name + extra, os.SEEK_CUR)
        with open(raw, "rb") as tokens:
            tokens.seek(width * first)
            left = width * count
            while left and (block := tokens.read(min(left, COPIED))):
                file.write(block)
                left -= len(block)
        file.seek(0, os.SEEK_END)
