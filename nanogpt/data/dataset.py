"""A prepared data folder, opened: train.pt, val.pt (or shards) and vocab.pt, which names and seals them.

Use:    data = load_dataset(Path("data")); data.train[:10]; data.tokenizer.decode(data.train[:10].tolist())
Whatever is in the folder, `load_dataset` gives the data set whole or says in one line what is wrong. The
files are those that data/prepare.py wrote. Knows nothing of batches.
"""

import math
import re
import shlex
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nanogpt.config import DataConfig
from nanogpt.console import command
from nanogpt.data.shards import Shards, Tokens
from nanogpt.data.swap import LAST, finish_what_was_begun, journal
from nanogpt.data.token_map import TokenFile, check_ids, open_tokens
from nanogpt.errors import UserError, require
from nanogpt.seals import VERIFY_BYTES, Checksum, DamageError, load_with_checksum, verify
from nanogpt.text.tiny_shakespeare import TINY_SHAKESPEARE
from nanogpt.tokenizer.base import Tokenizer
from nanogpt.tokenizer.registry import from_dict

FORMAT = 2
"""Version of the data folder's format. 1 had characters alone and did not count bytes; it is read too."""

SPLITS = ("train", "val")

MOST_SHARDS = 1_000_000
"""More files than this are no shards but a damaged number."""

PIECE = 1 << 24
"""Tokens looked at at a time."""

TRIES = 3
"""How often a folder is opened that another program replaces at this very moment."""


@dataclass(frozen=True)
class Dataset:
    """A prepared data folder. train, val: (N,) token ids, read from the disk as they are needed."""

    train: Tokens
    val: Tokens
    tokenizer: Tokenizer
    fingerprint: str
    val_bytes: int | None = None
    """Bytes of UTF-8 that the validation split stands for; None, as below, if they were not counted."""
    bytes: int | None = None
    """Bytes of UTF-8 that both splits stand for."""
    characters: int | None = None
    """Characters that both splits stand for."""
    sealed: bool = False
    """Whether the folder tells what its files have to be, to the bit; older ones do not."""

    def bits_per_byte(self, loss: float) -> float | None:
        """The validation loss (nats a token, over every token but the first) in bits a byte of text.

        Tokenizers compare in this unit alone.
        """
        if self.val_bytes is None:
            return None
        predicted = self.val_bytes - self.text_bytes(int(self.val[0]))
        return loss * (len(self.val) - 1) / math.log(2) / max(1, predicted)

    def text_bytes(self, token: int) -> int:
        """Bytes of text that a token stands for: none for the one that ends a document."""
        return 0 if token == self.tokenizer.end_of_text else len(self.tokenizer.tokens[token])


def load_dataset(
    folder: Path, *, most: int | None = VERIFY_BYTES, advance: Callable[[int], object] = int
) -> Dataset:
    """Open a prepared data folder; the tokens stay on the disk until they are read.

    most: how many bytes of token files are compared with their seals: all if there are no more, else some
    blocks (seals.verify). None: all. advance: called with the bytes compared since the last call.
    Errors: UserError if it is missing, incomplete, damaged, malformed or of a newer format.
    """
    for _ in range(TRIES - 1):
        finish_what_was_begun(folder)
        before = identity(folder)
        try:
            return read(folder, most, advance)
        except UserError:
            if journal(folder) is None and identity(folder) == before:
                raise
    finish_what_was_begun(folder)  # another program replaced the set meanwhile
    return read(folder, most, advance)


def identity(folder: Path) -> tuple[int, int] | None:
    """Which file vocab.pt is: another one after a swap."""
    try:
        stat = (folder / LAST).stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def read(folder: Path, most: int | None, advance: Callable[[int], object]) -> Dataset:
    """As `load_dataset`, of a folder that nobody replaces meanwhile."""
    path = folder / LAST
    unprepared = how_to_prepare(folder)
    elsewhere = "" if folder.is_dir() else " (or give --data_dir the folder that you prepared)"
    check_is_file(path, unprepared + elsewhere)
    with advising(path, f"{unprepared} --overwrite"):
        content, sealed = load_with_checksum(path)
    content = cast(dict[str, Any], content) if isinstance(content, dict) else {}
    advice = f"{how_to_prepare(folder, content)} --overwrite"
    version = content.get("format")
    require(
        isinstance(version, int) and version in (1, FORMAT) and "tokenizer" in content,
        f"{folder} was prepared by another version of NanoGPT: {advice}",
    )
    facts = Facts(content, path, advice)
    require(sealed or not facts.seals, f"{path} is damaged (its checksum is missing): {advice}")
    for name in facts.names:
        check_is_file(folder / name, advice.removesuffix(" --overwrite"))
    if facts.seals:
        with advising(folder, advice):
            verify(folder, facts.seals, max_bytes=most, advance=advance)
    with advising(path, advice):
        tokenizer = facts.tokenizer
    train, val = (open_split(folder, facts, split, advice) for split in SPLITS)
    require(
        facts.tokens == {"train": len(train), "val": len(val)},
        f"the files in {folder} do not belong together: {advice}",
    )
    with advising(folder, advice):
        look_at_ids(list(parts_of(folder, facts, (train, val))), tokenizer.vocab_size, facts, most)
    sizes = facts.bytes
    return Dataset(
        train,
        val,
        tokenizer,
        facts.fingerprint,
        val_bytes=sizes["val"] if sizes else None,
        bytes=sum(sizes.values()) if sizes else None,
        characters=facts.characters,
        sealed=bool(facts.seals),
    )


@contextmanager
def advising(path: Path, advice: str) -> Generator[None]:
    """Turn what goes wrong with a file into a UserError that ends in advice."""
    try:
        yield
    except DamageError as error:
        raise UserError(f"{error}: {advice}") from error
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"not enough memory to open {path}: end other programs") from error
    except OSError as error:
        if error.errno is None:
            raise UserError(f"{path} is damaged: {advice}") from error
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    except Exception as error:  # whatever torch.load makes of a damaged file
        raise UserError(f"{path} is damaged: {advice}") from error


def check_is_file(path: Path, advice: str) -> None:
    """Errors: UserError if it is missing, or something that one would wait for, as a pipe is."""
    require(path.exists(), f"{path} is missing: {advice}")
    require(path.is_file(), f"{path} is not a file: move it away, then {advice}")


def how_to_prepare(folder: Path, vocabulary: Mapping[str, Any] | None = None) -> str:
    """The command that prepares a folder (again), as far as its vocab.pt tells."""
    vocabulary = vocabulary or {}
    source = vocabulary.get("source", None if vocabulary else "")  # of format 1
    source = source if isinstance(source, str) else None
    own_place = str(folder) == DataConfig.data_dir
    arguments = vocabulary.get("arguments")
    words = [str(word) for word in cast(list[Any], arguments)] if isinstance(arguments, list) else []
    if arguments is None and source != TINY_SHAKESPEARE and (source or not own_place):
        words += ["--input_file", str(source or "YOUR_TEXT")]
    if not own_place:
        words += ["--data_dir", str(folder)]
    line = " ".join(
        shlex.join([*command("data"), *words]).splitlines()
    )  # the name of a file may have several
    return f"prepare it with: {line}"


def arguments(config: DataConfig) -> list[str]:
    """The arguments that prepare the same data again, for advice to the user."""
    words: list[str] = []
    for name in ("input_file", "val_file"):
        values = getattr(config, name)
        words += [f"--{name}", *values] if values else []
    default = DataConfig()
    for name in ("train_split", "split", "tokenizer", "vocab_size", "text_field", "shard_tokens"):
        if getattr(config, name) != getattr(default, name):
            words += [f"--{name}", str(getattr(config, name))]
    return words


class Facts:
    """What vocab.pt says, every value of its type. Errors: UserError naming the one that is not."""

    def __init__(self, content: Mapping[str, Any], path: Path, advice: str) -> None:
        self.content, self.path, self.advice = content, path, advice
        self.fingerprint: str = self.get("fingerprint", is_text, needed=True)
        self.tokens: dict[str, int] = self.get("tokens", is_count_of_splits, needed=True)
        self.bytes: dict[str, int] | None = self.get("bytes", is_count_of_splits)
        self.characters: int | None = self.get("characters", is_count)
        shards: dict[str, int] | None = self.get("shards", is_shards)
        self.files = {
            split: [f"{split}.pt"] if shards is None else shard_names(split, shards[split])
            for split in SPLITS
        }
        self.names = [name for split in SPLITS for name in self.files[split]]
        self.seals = self.seals_of(self.get("sha256", is_digests) or {}, self.get("blocks", is_blocks) or {})

    def get(self, key: str, right: Callable[[Any], bool], *, needed: bool = False) -> Any:
        """A value, None if it is not there. Errors: UserError if it is not right, or needed and missing."""
        value = self.content.get(key)
        if value is None and not needed:
            return None
        if not right(value):
            self.refuse(f"{key}: {value!r}"[:100].splitlines()[0] if key in self.content else f"no {key}")
        return value

    def refuse(self, what: str) -> NoReturn:
        """Raise UserError."""
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

    def seals_of(self, digests: Mapping[str, str], blocks: Mapping[str, Tensor]) -> dict[str, Checksum]:
        """The seals of the files, {} if there are none."""
        if digests and (set(digests) != set(self.names) or not set(blocks) <= set(digests)):
            self.refuse("sha256 names other files")
        arrays = {name: cast(NDArray[np.uint8], tensor.numpy()) for name, tensor in blocks.items()}
        return {name: Checksum(digest, arrays.get(name)) for name, digest in digests.items()}


def is_text(value: Any) -> bool:
    """Whether it is a string."""
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    """Whether it is a number of things."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_count_of_splits(value: Any) -> bool:
    """Whether it is a number for each split."""
    counts = cast(dict[Any, Any], value) if isinstance(value, dict) else {}
    return set(counts) == set(SPLITS) and all(is_count(count) or count == 0 for count in counts.values())


def is_shards(value: Any) -> bool:
    """Whether it is a number of files for each split."""
    return is_count_of_splits(value) and all(0 < count <= MOST_SHARDS for count in value.values())


def is_digests(value: Any) -> bool:
    """Whether it is SHA-256s by name."""
    digests = cast(dict[Any, Any], value) if isinstance(value, dict) else {"": ""}
    return all(is_text(item) and re.fullmatch("[0-9a-f]{64}", item) for item in digests.values())


def is_blocks(value: Any) -> bool:
    """Whether it is tables of SHA-256s by name, (n, 32) uint8 each."""
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


def shard_names(split: str, count: int) -> list[str]:
    """What the files of a split are called."""
    return [f"{split}-{number:05}.pt" for number in range(count)]


def open_split(folder: Path, facts: Facts, split: str, advice: str) -> Tokens:
    """The tokens of a split, (N,): of one file, or of its shards."""
    parts: list[NDArray[Any]] = []
    for name in facts.files[split]:
        with advising(folder / name, advice):
            parts.append(open_tokens(folder / name))
    for name, part in zip(facts.files[split], parts, strict=True):
        if part.dtype != parts[0].dtype:
            raise UserError(f"{folder / name} is malformed ({part.dtype}, others {parts[0].dtype}): {advice}")
        if isinstance(part, TokenFile) and part.guard is not None and facts.seals:
            part.guard.verify = partial(verify, folder, {name: facts.seals[name]})
    return parts[0] if facts.files[split] == [f"{split}.pt"] else Shards(parts)


def look_at_ids(
    files: list[tuple[Path, NDArray[Any]]], vocab_size: int, facts: Facts, most: int | None
) -> None:
    """See that every id is one of the vocabulary's: now, if there are few; else, unsealed, when read.

    Errors: DamageError that names the file.
    """
    if most is None or sum(part.nbytes for _, part in files) <= most:
        for path, part in files:
            for first in range(0, len(part), PIECE):
                check_ids(part[first : first + PIECE], vocab_size, path)
    elif not facts.seals:
        for _, part in files:
            if isinstance(part, TokenFile) and part.guard is not None:
                part.guard.above = vocab_size


def parts_of(
    folder: Path, facts: Facts, splits: tuple[Tokens, Tokens]
) -> Iterator[tuple[Path, NDArray[Any]]]:
    """The token files and what is in them."""
    for split, tokens in zip(SPLITS, splits, strict=True):
        parts = tokens.parts if isinstance(tokens, Shards) else [tokens]
        for name, part in zip(facts.files[split], parts, strict=True):
            yield folder / name, part
