"""A prepared data folder: train.pt, val.pt (or shards), and vocab.pt with their names and checksums.

Example:
    data = load_dataset(Path("data")); data.train[:10]; data.tokenizer.decode(data.train[:10].tolist())
data/prepare.py writes the folder. Whatever is in it, `load_dataset` returns the complete data set or says
in one line what is wrong. Knows nothing of batches.

"""

import math
import re
import shlex
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from nanogpt import __version__
from nanogpt.console import command
from nanogpt.data.config import PrepareConfig
from nanogpt.data.shards import Shards, Tokens
from nanogpt.data.swap import VOCAB_FILE, finish_interrupted_swap, read_journal
from nanogpt.data.token_map import TokenFile, check_ids, open_tokens
from nanogpt.errors import UserError, require
from nanogpt.seals import VERIFY_BYTES, Checksum, DamageError, load_with_checksum, verify
from nanogpt.text.addresses import without_secrets
from nanogpt.text.tiny_shakespeare import TINY_SHAKESPEARE
from nanogpt.tokenizer.base import Tokenizer
from nanogpt.tokenizer.registry import from_dict

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 2
"""Version of the data folder. Version 1, with characters alone and no count of bytes, is read too."""

SPLITS = ("train", "val")

MAX_SHARDS = 1_000_000
"""A larger number of shards is taken for damage."""

TOKENS_PER_CHECK = 1 << 24
"""Tokens to check at a time."""

MAX_TRIES = 3
"""How often to try to open a folder that another program is replacing."""


@dataclass(frozen=True)
class Dataset:
    """A prepared data folder. train, val: (N,) token ids, read from the disk as they are needed."""

    train: Tokens
    val: Tokens
    tokenizer: Tokenizer
    fingerprint: str
    val_bytes: int | None = None
    """Bytes of UTF-8 in the validation split; None, here and below, if they were not counted."""
    bytes: int | None = None
    """Bytes of UTF-8 in both splits."""
    characters: int | None = None
    """Characters in both splits."""
    sealed: bool = False
    """Whether the folder has checksums of its files; those of earlier versions have none."""

    def bits_per_byte(self, loss: float) -> float | None:
        """Convert the validation loss from nats per token (all but the first) to bits per byte of text.

        In this unit, and in no other, losses with different tokenizers can be compared.
        """
        if self.val_bytes is None:
            return None
        predicted = self.val_bytes - self.text_bytes(int(self.val[0]))
        return loss * (len(self.val) - 1) / math.log(2) / max(1, predicted)

    def text_bytes(self, token: int) -> int:
        """Bytes of text in a token: none for the token that ends a document."""
        return 0 if token == self.tokenizer.end_of_text else len(self.tokenizer.tokens[token])


def load_dataset(
    folder: Path, *, verify_bytes: int | None = VERIFY_BYTES, advance: Callable[[int], object] = int
) -> Dataset:
    """Open a prepared data folder; the tokens stay on the disk until they are read.

    verify_bytes: compare at most so many bytes of token files with their checksums, in blocks drawn at
    random (seals.verify); None: all. advance: called with the bytes compared since the last call.
    Raises: UserError if the folder is missing, incomplete, damaged, malformed or of a newer version.
    """
    for _ in range(MAX_TRIES - 1):
        finish_interrupted_swap(folder)
        before = vocab_file_id(folder)
        try:
            return read_folder(folder, verify_bytes, advance)
        except UserError:
            if read_journal(folder) is None and vocab_file_id(folder) == before:
                raise
    finish_interrupted_swap(folder)  # another program replaced the set meanwhile
    return read_folder(folder, verify_bytes, advance)


def vocab_file_id(folder: Path) -> tuple[int, int] | None:
    """Inode and time of vocab.pt, which change when another program replaces the data set."""
    try:
        stat = (folder / VOCAB_FILE).stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def read_folder(folder: Path, verify_bytes: int | None, advance: Callable[[int], object]) -> Dataset:
    """Load a folder, as `load_dataset` does, while no other program replaces it."""
    path = folder / VOCAB_FILE
    unprepared = prepare_advice(folder)
    elsewhere = "" if folder.is_dir() else " (or give --data_dir the folder that you prepared)"
    check_is_file(path, unprepared + elsewhere)
    with errors_with_advice(path, f"{unprepared} --overwrite"):
        content, sealed = load_with_checksum(path)
    content = cast(dict[str, Any], content) if isinstance(content, dict) else {}
    advice = f"{prepare_advice(folder, content)} --overwrite"
    version = content.get("format")
    is_number = isinstance(version, int)
    require(
        not is_number or version <= FORMAT_VERSION,
        f"{folder} has format {version}, and this NanoGPT ({__version__}) reads 1 to {FORMAT_VERSION}: "
        f"update NanoGPT, or {advice}",
    )
    require(
        is_number and version > 0 and "tokenizer" in content,
        f"{folder} was prepared by another version of NanoGPT: {advice}",
    )
    facts = VocabFile(content, path, advice)
    require(sealed or not facts.seals, f"{path} is damaged (its checksum is missing): {advice}")
    for name in facts.names:
        check_is_file(folder / name, advice.removesuffix(" --overwrite"))
    if facts.seals:
        with errors_with_advice(folder, advice):
            verify(folder, facts.seals, max_bytes=verify_bytes, advance=advance)
    with errors_with_advice(path, advice):
        tokenizer = facts.tokenizer
    train, val = (open_split(folder, facts, split, advice) for split in SPLITS)
    require(
        facts.tokens in (None, {"train": len(train), "val": len(val)}),
        f"the files in {folder} do not belong together: {advice}",
    )
    with errors_with_advice(folder, advice):
        check_ids_of_files(
            list(named_token_arrays(folder, facts, (train, val))), tokenizer.vocab_size, facts, verify_bytes
        )
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
def errors_with_advice(path: Path, advice: str) -> Generator[None]:
    """Turn any error about a file into a UserError that ends in advice."""
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
    except Exception as error:  # torch.load raises many kinds on a damaged file
        raise UserError(f"{path} is damaged: {advice}") from error


def check_is_file(path: Path, advice: str) -> None:
    """Raise UserError if a file is missing, or is something else, such as a pipe that would block."""
    require(path.exists(), f"{path} is missing: {advice}")
    require(path.is_file(), f"{path} is not a file: move it away, then {advice}")


def prepare_advice(folder: Path, vocabulary: Mapping[str, Any] | None = None) -> str:
    """Advice with the command that prepares a folder (again), as far as its vocab.pt tells."""
    vocabulary = vocabulary or {}
    source = vocabulary.get("source", None if vocabulary else "")  # in version 1
    source = source if isinstance(source, str) else None
    default_folder = str(folder) == PrepareConfig.data_dir
    arguments = vocabulary.get("arguments")
    words = [str(word) for word in cast(list[Any], arguments)] if isinstance(arguments, list) else []
    if arguments is None and source != TINY_SHAKESPEARE and (source or not default_folder):
        words += ["--input_file", str(source or "YOUR_TEXT")]
    if not default_folder:
        words += ["--data_dir", str(folder)]
    line = " ".join(shlex.join([*command("data"), *words]).splitlines())  # file names may have line ends
    return f"prepare it with: {line}"


def prepare_arguments(config: PrepareConfig) -> list[str]:
    """The arguments of the command that prepares the same data again, for advice to the user."""
    words: list[str] = []
    for name in ("input_file", "val_file"):
        values = getattr(config, name)
        words += [f"--{name}", *map(without_secrets, values)] if values else []
    default = PrepareConfig()
    words += ["--speakers", *config.speakers] if config.speakers else []
    for name in (
        "train_split",
        "split",
        "tokenizer",
        "vocab_size",
        "text_field",
        "input_format",
        "shard_tokens",
    ):
        if getattr(config, name) != getattr(default, name):
            words += [f"--{name}", str(getattr(config, name))]
    return words


class VocabFile:
    """The values in vocab.pt, checked. Raises: UserError naming one that is missing or of a wrong type."""

    def __init__(self, content: Mapping[str, Any], path: Path, advice: str) -> None:
        self.content, self.path, self.advice = content, path, advice
        self.fingerprint: str = self.get("fingerprint", is_string, needed=True)
        first = content["format"] == 1  # its first folders have no numbers of tokens
        self.tokens: dict[str, int] | None = self.get("tokens", is_count_per_split, needed=not first)
        self.bytes: dict[str, int] | None = self.get("bytes", is_count_per_split)
        self.characters: int | None = self.get("characters", is_count)
        shards: dict[str, int] | None = self.get("shards", is_shards)
        self.files = {
            split: [f"{split}.pt"] if shards is None else shard_names(split, shards[split])
            for split in SPLITS
        }
        self.names = [name for split in SPLITS for name in self.files[split]]
        self.seals = self.seals_of(self.get("sha256", is_digests) or {}, self.get("blocks", is_blocks) or {})

    def get(self, key: str, right: Callable[[Any], bool], *, needed: bool = False) -> Any:
        """A value; None if it is missing. Raises: UserError if it is not `right`, or `needed` but missing."""
        value = self.content.get(key)
        if value is None and not needed:
            return None
        if not right(value):
            self.refuse(f"{key}: {value!r}"[:100].splitlines()[0] if key in self.content else f"no {key}")
        return value

    def refuse(self, what: str) -> NoReturn:
        """Raise UserError: the file is malformed."""
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

    def seals_of(self, digests: Mapping[str, str], blocks: "Mapping[str, Tensor]") -> dict[str, Checksum]:
        """The checksums of the files, {} if there are none."""
        if digests and (set(digests) != set(self.names) or not set(blocks) <= set(digests)):
            self.refuse("sha256 names other files")
        arrays = {name: cast(NDArray[np.uint8], tensor.numpy()) for name, tensor in blocks.items()}
        return {name: Checksum(digest, arrays.get(name)) for name, digest in digests.items()}


def is_string(value: Any) -> bool:
    """Whether a value is a string."""
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    """Whether a value is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_count_per_split(value: Any) -> bool:
    """Whether a value has a count, or 0, for each split."""
    counts = cast(dict[Any, Any], value) if isinstance(value, dict) else {}
    return set(counts) == set(SPLITS) and all(is_count(count) or count == 0 for count in counts.values())


def is_shards(value: Any) -> bool:
    """Whether a value has a number of files for each split."""
    return is_count_per_split(value) and all(0 < count <= MAX_SHARDS for count in value.values())


def is_digests(value: Any) -> bool:
    """Whether a value has SHA-256s by file name."""
    digests = cast(dict[Any, Any], value) if isinstance(value, dict) else {"": ""}
    return all(is_string(item) and re.fullmatch("[0-9a-f]{64}", item) for item in digests.values())


def is_blocks(value: Any) -> bool:
    """Whether a value has tables of SHA-256s by file name, (n, 32) uint8 each."""
    from torch import Tensor  # the file was read with PyTorch

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
    """The names of the shards of a split."""
    return [f"{split}-{number:05}.pt" for number in range(count)]


def open_split(folder: Path, facts: VocabFile, split: str, advice: str) -> Tokens:
    """Open the tokens of a split, (N,): one file, or its shards."""
    parts: list[NDArray[Any]] = []
    for name in facts.files[split]:
        with errors_with_advice(folder / name, advice):
            parts.append(open_tokens(folder / name))
    for name, part in zip(facts.files[split], parts, strict=True):
        if part.dtype != parts[0].dtype:
            raise UserError(f"{folder / name} is malformed ({part.dtype}, others {parts[0].dtype}): {advice}")
        if isinstance(part, TokenFile) and part.guard is not None and facts.seals:
            part.guard.verify = partial(verify, folder, {name: facts.seals[name]})
    return parts[0] if facts.files[split] == [f"{split}.pt"] else Shards(parts)


def check_ids_of_files(
    files: list[tuple[Path, NDArray[Any]]], vocab_size: int, facts: VocabFile, verify_bytes: int | None
) -> None:
    """Check that every id is in the vocabulary: now if there are few, or when read if there are no checksums.

    Raises: DamageError that names the file.
    """
    if verify_bytes is None or sum(part.nbytes for _, part in files) <= verify_bytes:
        for path, part in files:
            for first in range(0, len(part), TOKENS_PER_CHECK):
                check_ids(part[first : first + TOKENS_PER_CHECK], vocab_size, path)
    elif not facts.seals:
        for _, part in files:
            if isinstance(part, TokenFile) and part.guard is not None:
                part.guard.vocab_size = vocab_size


def named_token_arrays(
    folder: Path, facts: VocabFile, splits: tuple[Tokens, Tokens]
) -> Iterator[tuple[Path, NDArray[Any]]]:
    """The path and the tokens of every token file."""
    for split, tokens in zip(SPLITS, splits, strict=True):
        parts = tokens.parts if isinstance(tokens, Shards) else [tokens]
        for name, part in zip(facts.files[split], parts, strict=True):
            yield folder / name, part
