"""A prepared data folder: train.pt, val.pt (or shards), and vocab.pt with their names and checksums.

Example: data = load_dataset(Path("data")); data.train[:10]; data.tokenizer.decode(data.train[:10].tolist())
data/prepare.py writes the folder. Whatever is in it, `load_dataset` returns the complete data set or says in
one line what is wrong. With pairs, it also has train_mask.pt and val_mask.pt. Knows nothing of batches.
"""

import math
import shlex
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from nanogpt import __version__
from nanogpt.data.config import PrepareConfig
from nanogpt.data.shards import Shards, Tokens
from nanogpt.data.swap import VOCAB_FILE, finish_interrupted_swap, read_journal
from nanogpt.data.token_map import TokenFile, check_ids, open_tokens
from nanogpt.data.vocab_file import MASKED_VERSION, MASKS, SPLITS, VocabFile
from nanogpt.errors import UserError, require
from nanogpt.storage.seals import VERIFY_BYTES, DamageError, load_with_checksum, verify
from nanogpt.terminal.console import command
from nanogpt.text.addresses import without_secrets
from nanogpt.text.options import ReadOptions
from nanogpt.text.tiny_shakespeare import TINY_SHAKESPEARE
from nanogpt.tokenizer.base import Tokenizer

TOKENS_PER_CHECK = 1 << 24
"""Tokens to check at a time."""

MAX_PROMPT = 1 << 16
"""Number of tokens in which to look for the end of the first prompt."""

MAX_TRIES = 3
"""Attempts to open a folder that another program is replacing."""


@dataclass(frozen=True)
class Dataset:
    """A prepared data folder. train, val: (N,) token ids, read from the disk when needed.

    train_mask, val_mask: (N,) uint8, 1 where a token counts for the loss, else 0; None: all count.
    """

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
    """Whether the folder has checksums of its files; folders of earlier versions have none."""
    train_mask: Tokens | None = None
    val_mask: Tokens | None = None
    counted: Mapping[str, int] | None = None
    """With masks: the number of tokens that count, of each split."""
    counted_bytes: Mapping[str, int] | None = None
    """With masks: the bytes of UTF-8 in these tokens, of each split."""

    def bits_per_byte(self, loss: float) -> float | None:
        """Convert the validation loss from nats per token (all but the first) to bits per byte of text.

        Only in this unit can losses with different tokenizers be compared. With a mask, tokens and bytes that
        do not count are left out; the first token, being of a prompt, is one of them.
        """
        if self.counted is not None and self.counted_bytes is not None:
            return loss * self.counted["val"] / math.log(2) / max(1, self.counted_bytes["val"])
        if self.val_bytes is None:
            return None
        predicted = self.val_bytes - self.text_bytes(int(self.val[0]))
        return loss * (len(self.val) - 1) / math.log(2) / max(1, predicted)

    @property
    def first_prompt(self) -> int:
        """Number of validation tokens that a sample continues: one or, with pairs, the first prompt."""
        if self.val_mask is None:
            return 1
        return max(1, int(np.argmax(self.val_mask[:MAX_PROMPT])))

    def text_bytes(self, token: int) -> int:
        """Bytes of text in a token: 0 for the one that ends a document."""
        return 0 if token == self.tokenizer.end_of_text else len(self.tokenizer.tokens[token])


def load_dataset(
    folder: Path, *, verify_bytes: int | None = VERIFY_BYTES, advance: Callable[[int], object] = int
) -> Dataset:
    """Open a prepared data folder; the tokens stay on the disk until they are read.

    verify_bytes: maximum number of bytes of token files to compare with their checksums, in random blocks
    (seals.verify); None: all. advance: called with the number of bytes compared since the last call.
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
    """Load a folder, as `load_dataset` does, assuming that no other program is replacing it."""
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
        not is_number or version <= MASKED_VERSION,
        f"{folder} has format {version}, and this NanoGPT ({__version__}) reads 1 to {MASKED_VERSION}: "
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
    arrays = {name: open_array(folder, facts, name, advice) for name in facts.files}
    counts = facts.tokens or {name: len(array) for name, array in arrays.items()}
    belong = all(len(arrays[name]) == counts[split] for name, split in facts.arrays.items())
    require(belong, f"the files in {folder} do not belong together: {advice}")
    with errors_with_advice(folder, advice):
        check_values(folder, facts, arrays, tokenizer.vocab_size, verify_bytes)
    sizes = facts.bytes
    return Dataset(
        arrays["train"],
        arrays["val"],
        tokenizer,
        facts.fingerprint,
        val_bytes=sizes["val"] if sizes else None,
        bytes=sum(sizes.values()) if sizes else None,
        characters=facts.characters,
        sealed=bool(facts.seals),
        train_mask=arrays.get(MASKS["train"]),
        val_mask=arrays.get(MASKS["val"]),
        counted=facts.counted,
        counted_bytes=facts.counted_bytes,
    )


@contextmanager
def errors_with_advice(path: Path, advice: str) -> Generator[None]:
    """Turn any error about a file into a UserError that ends with advice."""
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
    """Advice: the command that prepares a folder (again), as far as its vocab.pt tells."""
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
    names = dict.fromkeys(
        (
            *("input_file", "val_file", "speakers"),
            *("train_split", "split", "tokenizer", "vocab_size", "shard_tokens"),
            *("text_field", "prompt_field", "completion_field", "separator"),
            *(field.name for field in fields(ReadOptions)),
        )
    )
    words: list[str] = []
    default = PrepareConfig()
    for name in names:
        value = getattr(config, name)
        if value != getattr(default, name):
            texts = cast(tuple[str, ...], value) if isinstance(value, tuple) else (str(value),)
            shown = without_secrets if name in ("input_file", "val_file") else str
            words += [f"--{name}", *map(shown, texts)]
    return words


def open_array(folder: Path, facts: VocabFile, array: str, advice: str) -> Tokens:
    """Open the tokens of a split, or its mask, (N,): one file, or its shards."""
    parts: list[NDArray[Any]] = []
    for name in facts.files[array]:
        with errors_with_advice(folder / name, advice):
            parts.append(open_tokens(folder / name))
    for name, part in zip(facts.files[array], parts, strict=True):
        if part.dtype != parts[0].dtype:
            raise UserError(f"{folder / name} is malformed ({part.dtype}, others {parts[0].dtype}): {advice}")
        if isinstance(part, TokenFile) and part.guard is not None and facts.seals:
            part.guard.verify = partial(verify, folder, {name: facts.seals[name]})
    return parts[0] if facts.files[array] == [f"{array}.pt"] else Shards(parts)


def check_values(
    folder: Path, facts: VocabFile, arrays: Mapping[str, Tokens], vocab_size: int, verify_bytes: int | None
) -> None:
    """Check that every id is in the vocabulary, and that masks hold only 0 and 1.

    This is done now if there are few values, or when they are read if there are no checksums.
    Raises: DamageError that names the file.
    """
    files = list(named_parts(folder, facts, arrays))
    few = verify_bytes is None or sum(part.nbytes for _, _, part in files) <= verify_bytes
    for array, path, part in files:
        limit = vocab_size if array in SPLITS else 2
        if few:
            for first in range(0, len(part), TOKENS_PER_CHECK):
                check_ids(part[first : first + TOKENS_PER_CHECK], limit, path)
        elif not facts.seals and isinstance(part, TokenFile) and part.guard is not None:
            part.guard.vocab_size = limit


def named_parts(
    folder: Path, facts: VocabFile, arrays: Mapping[str, Tokens]
) -> Iterator[tuple[str, Path, NDArray[Any]]]:
    """The name of the array, the path and the values of every file."""
    for array, values in arrays.items():
        parts = values.parts if isinstance(values, Shards) else [values]
        for name, part in zip(facts.files[array], parts, strict=True):
            yield array, folder / name, part
