"""Text to token files, and token files to batches.

Run:    python data.py                              Tiny Shakespeare into data/
        python data.py --input_file my.txt --data_dir my_data
Writes: train.pt, val.pt (1-D token tensors of the narrowest type) and vocab.pt (the tokenizer
        and a fingerprint of the text).
Use:    data = load(Path("data")); batches = Batches(data.train, block_size=256, batch_size=64, seed=1)
        windows = Windows(data.train, device); x, y = windows(batches(step), 256)
Does not know the model.

# B batch, T block_size, N tokens in the split, W windows in an epoch
"""

import hashlib
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanogpt import tokenizer as tokenizers
from nanogpt.config import DataConfig, UserError, require
from nanogpt.console import command, progress_bar, say
from nanogpt.corpus import TINY_SHAKESPEARE, Source, read_text, tiny_shakespeare
from nanogpt.files import replacing
from nanogpt.tokenizer import CharTokenizer

FORMAT = 1
"""Version of the data folder's format."""

SPLITS = ("train", "val")

RESIDENT_SHARE, RESIDENT_BYTES = 1 / 8, 4
"""Share of a GPU's free memory that a split may take, and the most that a token takes there."""

PIECE = 2**24
"""Tokens copied to a GPU at a time."""


@dataclass(frozen=True)
class Dataset:
    """A prepared data folder. train, val: (N,) token ids, read from the disk as they are needed."""

    train: NDArray[Any]
    val: NDArray[Any]
    tokenizer: CharTokenizer
    fingerprint: str


def main(config: DataConfig) -> int:
    """Prepare a data folder and say what was made. Returns the exit code."""
    folder = Path(config.data_dir)
    path = config.input_file
    source = tiny_shakespeare(folder) if path is None else read_text(Path(path))
    for note in source.notes:
        say(f"{source.name}: {note}")
    prepare(source, config)
    return 0


def prepare(source: Source, config: DataConfig) -> None:
    """Write train.pt, val.pt and vocab.pt for `source` into config.data_dir, and say what they hold.

    Errors: UserError if the text is too short for the split, if the folder holds another data
    set and overwrite is off, or if it cannot be written.
    """
    folder, text = Path(config.data_dir), source.text
    boundary = int(len(text) * config.train_split)
    require(
        boundary >= 2 and len(text) - boundary >= 2,
        f"{source.name} has {len(text)} characters: too short for --train_split "
        f"{config.train_split}, both splits need at least 2",
    )
    fingerprint = fingerprint_of(text, config.train_split)
    if is_prepared(folder, fingerprint, config.overwrite):
        say(f"{folder} is already prepared from this text")
        return
    (folder / "vocab.pt").unlink(missing_ok=True)  # written last: without it the folder is incomplete
    sizes: dict[str, int] = {}
    with progress_bar("Characters") as bar:
        advance = partial(bar.advance, bar.add_task("", total=2 * len(text), detail=""))
        tokenizer = CharTokenizer.train(text, advance)
        for name, part in zip(SPLITS, (text[:boundary], text[boundary:]), strict=True):
            ids = tokenizer.encode(part, advance)
            sizes[name] = len(ids)
            save_plain(folder / f"{name}.pt", torch.from_numpy(ids))
    vocabulary = {
        "format": FORMAT,
        "tokenizer": tokenizer.to_dict(),
        "fingerprint": fingerprint,
        "source": source.name,
        "train_split": config.train_split,
        "tokens": sizes,
    }
    save_plain(folder / "vocab.pt", vocabulary)
    say(f"Characters: {len(text):,}")
    say(f"Vocabulary: {tokenizer.vocab_size:,} different characters")
    for name, size in sizes.items():
        say(f"{folder / name}.pt: {size:,} tokens ({size / len(text):.0%})")


def fingerprint_of(text: str, train_split: float) -> str:
    """Identifies a data set: SHA-256 of its text and its split."""
    digest = hashlib.sha256(f"nanogpt data {FORMAT} char {train_split!r}\n".encode())
    for chunk in tokenizers.chunks(text):
        digest.update(chunk.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def is_prepared(folder: Path, fingerprint: str, overwrite: bool) -> bool:
    """Whether `folder` holds the data set with this fingerprint, whole.

    Errors: UserError if it holds something else and `overwrite` is off.
    """
    if not (folder / "vocab.pt").exists():  # empty, or a preparation that was cut short
        return False
    try:
        if load(folder).fingerprint == fingerprint:
            return True
        found = "another data set"
    except UserError:
        found = "a damaged data set"
    require(overwrite, f"{folder} holds {found}: give --overwrite to replace it, or another --data_dir")
    return False


def save_plain(path: Path, value: object) -> None:
    """torch.save, atomically."""
    with replacing(path) as file:
        torch.save(value, file)


def load(folder: Path) -> Dataset:
    """Open a prepared data folder; the tokens stay on the disk until they are read.

    Errors: UserError if it is missing, incomplete, damaged or of a newer format.
    """
    vocabulary = load_plain(folder / "vocab.pt", how_to_prepare(folder))
    vocabulary = cast(dict[str, Any], vocabulary) if isinstance(vocabulary, dict) else {}
    advice = how_to_prepare(folder, vocabulary.get("source"))
    require(
        vocabulary.get("format") == FORMAT and "tokenizer" in vocabulary,
        f"{folder} was prepared by another version of NanoGPT: {advice} --overwrite",
    )
    train, val = (load_tokens(folder / f"{name}.pt", advice) for name in SPLITS)
    require(
        vocabulary.get("tokens") == {"train": len(train), "val": len(val)},
        f"the files in {folder} do not belong together: {advice} --overwrite",
    )
    return Dataset(train, val, tokenizers.from_dict(vocabulary["tokenizer"]), vocabulary["fingerprint"])


def how_to_prepare(folder: Path, source: object = None) -> str:
    """The command that prepares a folder (again), from `source` if that is known."""
    words = command("data")
    if source != TINY_SHAKESPEARE and (source or str(folder) != DataConfig.data_dir):
        words += ["--input_file", str(source or "YOUR_TEXT")]
    if str(folder) != DataConfig.data_dir:
        words += ["--data_dir", str(folder)]
    return f"prepare it with: {shlex.join(words)}"


def load_tokens(path: Path, advice: str) -> NDArray[Any]:
    """The tokens of a split, (N,), mapped from the file. Errors: UserError if it holds anything else."""
    tokens = load_plain(path, advice, mmap=True)
    if not isinstance(tokens, Tensor) or tokens.dim() != 1 or tokens.is_floating_point():
        raise UserError(f"{path} does not hold tokens: {advice} --overwrite")
    return tokens.numpy()


def load_plain(path: Path, advice: str, *, mmap: bool = False) -> object:
    """torch.load of plain types. Errors: UserError ending in `advice` if missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {advice}")
    try:
        return torch.load(path, mmap=mmap, weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is damaged: {advice} --overwrite") from error


class Batches:
    """The training batches, as a pure function of (seed, order, step).

    An epoch cuts the tokens into W windows of T + 1 tokens (each overlaps the next by the one
    token it predicts), from an offset that changes with the epoch, and visits each window once,
    in shuffled order. There is no state: resuming at step s needs s and nothing else.

    order: another number gives other shuffles of the same windows (train.py uses it to step
    around a batch that broke the training).
    """

    def __init__(self, tokens: NDArray[Any], *, block_size: int, batch_size: int, seed: int) -> None:
        require(
            len(tokens) > block_size,
            f"--block_size {block_size} is too long for the training split of {len(tokens):,} tokens: "
            f"use at most {len(tokens) - 1}, or more text",
        )
        self.tokens, self.block_size, self.batch_size, self.seed = tokens, block_size, batch_size, seed
        # One window fewer than fit leaves room for the offset: every token gets its turn.
        self.windows = max(1, (len(tokens) - 1) // block_size - 1)
        self.offsets = len(tokens) - self.windows * block_size
        self._epoch: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every window is seen once."""
        return self.windows / self.batch_size

    def __call__(self, step: int, order: int = 0) -> NDArray[np.int64]:
        """Where the windows of a step begin, (B,)."""
        numbers = step * self.batch_size + np.arange(self.batch_size)
        starts = np.empty(self.batch_size, dtype=np.int64)
        epochs = numbers // self.windows
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            starts[inside] = self.starts(epoch, order)[numbers[inside] % self.windows]
        return starts

    def starts(self, epoch: int, order: int) -> NDArray[np.int64]:
        """Where the windows of an epoch begin, in the order of visiting, (W,)."""
        if self._epoch is None or self._epoch[0] != (epoch, order):
            random = np.random.default_rng([self.seed, order, epoch])
            offset = int(random.integers(self.offsets))
            self._epoch = (epoch, order), offset + self.block_size * random.permutation(self.windows)
        return self._epoch[1]


def gather(tokens: NDArray[Any], starts: NDArray[np.int64], length: int) -> tuple[Tensor, Tensor]:
    """Inputs tokens[s : s + length] and targets one further, for each s, (len(starts), length) int64."""
    windows = cut(tokens, starts, length)
    return windows[:, :-1], windows[:, 1:]


def cut(tokens: NDArray[Any], starts: NDArray[np.int64], length: int) -> Tensor:
    """The length + 1 tokens from each start, (len(starts), length + 1) int64."""
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64))


class Windows:
    """Cuts windows out of a split, on the device where they are needed.

    A split that takes no more than RESIDENT_SHARE of a GPU's free memory lives there: a batch is
    then the numbers of its windows and nothing more. Otherwise windows travel, in the background
    where the memory they leave is pinned.
    """

    def __init__(self, tokens: NDArray[Any], device: torch.device) -> None:
        self.tokens, self.device = tokens, device
        self.resident: Tensor | None = None
        if device.type == "cuda" and RESIDENT_BYTES * len(tokens) <= free_memory(device) * RESIDENT_SHARE:
            self.make_resident()

    def make_resident(self) -> None:
        """Copy the split to the device."""
        dtype = torch.uint8 if self.tokens.dtype == np.uint8 else torch.int32
        self.resident = torch.empty(len(self.tokens), dtype=dtype, device=self.device)
        for first in range(0, len(self.tokens), PIECE):  # the host need not hold it all
            piece = self.tokens[first : first + PIECE].astype(np.int32)
            self.resident[first : first + PIECE] = torch.from_numpy(piece).to(self.device)

    def __call__(self, starts: NDArray[np.int64], length: int) -> tuple[Tensor, Tensor]:
        """The inputs and targets that `gather` gives, on the device."""
        if self.resident is None:
            windows = self.send(cut(self.tokens, starts, length))
        else:
            offsets = torch.arange(length + 1, device=self.device)
            windows = self.resident[self.send(torch.from_numpy(starts))[:, None] + offsets].long()
        return windows[:, :-1], windows[:, 1:]  # of (B, T + 1)

    def send(self, values: Tensor) -> Tensor:
        """Contiguous values on the device.

        Only what is pinned is copied in the background: other memory may be gone by then.
        """
        if self.device.type == "cuda":
            return values.pin_memory().to(self.device, non_blocking=True)
        return values.to(self.device)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU."""
    return torch.cuda.mem_get_info(device)[0]


def evaluation_batches(
    tokens: NDArray[Any], *, block_size: int, batch_size: int, most: int | None = None
) -> list[tuple[NDArray[np.int64], int]]:
    """Cover a split in order, every token after the first predicted exactly once.

    Returns (starts, length) for gather, batch by batch: full windows, then the shorter tail.
    most: keep at most this many batches, evenly spread and always the same ones.
    """
    predicted = len(tokens) - 1
    whole = predicted // block_size
    starts = np.arange(whole, dtype=np.int64) * block_size
    batches = [(starts[i : i + batch_size], block_size) for i in range(0, whole, batch_size)]
    tail = predicted - whole * block_size
    if tail:
        batches.append((np.array([whole * block_size], dtype=np.int64), tail))
    if most is not None and most < len(batches):
        batches = [batches[i * len(batches) // most] for i in range(most)]
    return batches
