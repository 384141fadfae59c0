"""The `data` command: a corpus to token files.

Run:    python data.py                                          Tiny Shakespeare into data/
        python data.py --input_file books/ dump.jsonl.gz --tokenizer bpe --data_dir my_data
Writes: train.pt, val.pt (1-D token tensors of the narrowest type) and vocab.pt (the tokenizer, counts,
        a fingerprint of the text, and the SHA-256 of each token file). What was there is replaced when
        all of them are whole (data/swap.py).
One pass over the corpus counts (data/scan.py), one encodes; each holds a few pieces of text and no more,
whatever the size, and shares the work among threads. Killed, the second goes on where it was.
"""

import re
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nanogpt.config import DataConfig
from nanogpt.console import progress_bar, say, warn
from nanogpt.data.dataset import FORMAT, SPLITS, arguments, load_dataset, shard_names
from nanogpt.data.scan import Split, all_chunks, batches, fingerprint_of, in_order, scan
from nanogpt.data.swap import WORK, commit, finish, fresh
from nanogpt.data.token_writer import EncodingJob, write_tokens
from nanogpt.data.tokenizer_choice import given_tokenizer, learned_tokenizer
from nanogpt.errors import UserError, require
from nanogpt.files import atomic_write
from nanogpt.locking import lock
from nanogpt.seals import Checksum, save_with_checksum
from nanogpt.text.corpus import Corpus, find
from nanogpt.text.documents import Chunk, SkipReport, counted
from nanogpt.text.tiny_shakespeare import TINY_SHAKESPEARE, tiny_shakespeare
from nanogpt.tokenizer.base import CharTokenizer, Ids, Tokenizer

SAVE_SECONDS = 5.0
"""Seconds of encoding that a kill may cost."""

MOST_FILES = 10_000
"""Files that a data set may have: the system lets a process map some 65,000, and each is synced twice."""

OUT_OF_MEMORY = (
    "can't start new thread",
    "not enough memory",
    "annot allocate memory",
    "failed to map segment",
    "bad_alloc",
)

STDIN = "stdin.txt"

SHOWN = 5
"""Broken records that are shown; the rest are in broken.txt."""


def main(config: DataConfig) -> int:
    """Prepare a data folder and say what was made. Returns the exit code."""
    folder = Path(config.data_dir)
    try:
        with lock(folder, f"another program is writing to {folder}: use another --data_dir"):
            try:
                prepare(config)
            finally:
                if "-" in config.input_file + config.val_file:
                    (folder / STDIN).unlink(missing_ok=True)
    except FileExistsError as error:
        raise UserError(f"--data_dir {folder} is a file: give a folder") from error
    except (MemoryError, RuntimeError, ImportError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "not enough memory to prepare the data: end other programs, or give a smaller --vocab_size"
        ) from error
    return 0


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory is what was missing: threads, tensors and libraries to be loaded say it in words."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def prepare(config: DataConfig) -> None:
    """Write train.pt, val.pt and vocab.pt into config.data_dir, and say what they hold.

    Errors: UserError if the text cannot be read or is too short for the split, if the folder holds
    another data set and overwrite is off, or if it cannot be written.
    """
    folder = Path(config.data_dir)
    finish(folder)  # a swap that was cut short
    corpora = open_corpora(config, folder)
    work = EncodingJob(folder / WORK, config, [path for corpus in corpora.values() for path in corpus.files])
    given = None if work.survey else given_tokenizer(config)  # before a long pass: it may not be there
    survey = work.survey or scan(corpora, config)
    fingerprint = fingerprint_of(survey, config)
    if is_prepared(folder, fingerprint, config.overwrite):
        if work.survey is None:
            report_broken(survey.report, folder)
        say(f"{folder} is already prepared from this text")
        work.remove()
        return
    split = Split(survey, config)
    if work.survey is None:
        report_broken(survey.report, folder)
        work.begin(survey, given or learned_tokenizer(config, corpora, split, survey))
    else:
        say(f"Going on with the preparation that was cut short, after {counted(sum(work.tokens), 'token')}")
    encode(corpora, split, work, config.shard_tokens)
    facts = write_set(config, folder, work, fingerprint)
    work.remove()
    describe(folder, facts, work.tokenizer, split)


def write_set(config: DataConfig, folder: Path, work: EncodingJob, fingerprint: str) -> dict[str, Any]:
    """Write the files of the set, then replace by them what is in the folder. Returns what vocab.pt says.

    Errors: UserError if the disk is full; then what was there still is.
    """
    assert work.survey is not None
    tokens, sizes = (dict(zip(SPLITS, values, strict=True)) for values in (work.tokens, work.bytes))
    facts: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer": work.tokenizer.to_dict(),
        "fingerprint": fingerprint,
        "arguments": arguments(config),
        "characters": work.survey.total,
        "documents": len(work.survey.characters),
        "tokens": tokens,
        "bytes": sizes,
    }
    most = config.shard_tokens or max(tokens.values())
    counts = {name: -(-count // most) for name, count in tokens.items()}
    if config.shard_tokens is not None:
        facts["shards"] = counts
    new, seals = fresh(folder), dict[str, Checksum]()
    for split, count in tokens.items():
        names = [f"{split}.pt"] if config.shard_tokens is None else shard_names(split, counts[split])
        for name, first in zip(names, range(0, count, most), strict=True):
            size = min(most, count - first)
            seals[name] = write_tokens(work.tokens_file(split), new / name, work.tokenizer.dtype, first, size)
    facts["sha256"] = {name: seal.sha256 for name, seal in seals.items()}
    tables = {name: seal.blocks for name, seal in seals.items() if seal.blocks is not None}
    facts["blocks"] = {name: torch.from_numpy(table.copy()) for name, table in tables.items()}
    save_with_checksum(new / "vocab.pt", facts)
    commit(folder, [*seals, "vocab.pt"], set(token_files(folder)) - set(seals))
    return facts


def open_corpora(config: DataConfig, folder: Path) -> dict[str, Corpus]:
    """The corpus that is split ("train"), and the one for validation alone ("val") if there is one."""
    given: dict[str, tuple[str, ...]] = {"train": config.input_file}
    if not config.input_file:
        path, note = tiny_shakespeare(folder)
        say(f"{TINY_SHAKESPEARE}: {note}")
        given["train"] = (str(path),)
    if config.val_file:
        given["val"] = config.val_file
    corpora: dict[str, Corpus] = {}
    for side, names in given.items():
        files = [str(keep_standard_input(folder)) if name == "-" else name for name in names]
        corpora[side] = find(files, config.text_field)
    return corpora


def keep_standard_input(folder: Path) -> Path:
    """Standard input as a file for as long as the preparation takes, since it is read more than once.

    Errors: UserError if it is closed, cannot be read, or does not fit on the disk.
    """
    require(sys.stdin is not None, "--input_file - is standard input, which is closed: pipe a text into it")
    path = folder / STDIN
    with atomic_write(path) as file:
        while True:
            try:
                piece = sys.stdin.buffer.read(1 << 20)
            except (OSError, ValueError) as error:
                why = (isinstance(error, OSError) and error.strerror) or str(error)
                raise UserError(f"--input_file - cannot be read: {why}") from error
            if not piece:
                return path
            file.write(piece)


def is_prepared(folder: Path, fingerprint: str, overwrite: bool) -> bool:
    """Whether `folder` holds the data set with this fingerprint, whole.

    Errors: UserError if it holds something else and `overwrite` is off.
    """
    if not (folder / "vocab.pt").exists():  # empty, or a preparation that was cut short
        return False
    try:
        if load_dataset(folder, most=None).fingerprint == fingerprint:
            return True
        found = "another data set"
    except UserError:
        found = "a damaged data set"
    require(overwrite, f"{folder} holds {found}: give --overwrite to replace it, or another --data_dir")
    return False


def report_broken(report: SkipReport, folder: Path) -> None:
    """Say how the corpus was read and which records were left out; all of those are listed in broken.txt."""
    for note in report.notes[:SHOWN]:
        say(note)
    if len(report.notes) > SHOWN:
        say(f"... and {counted(len(report.notes) - SHOWN, 'more note')} of that kind")
    if report.repaired:
        say(f"Records with what is no character, which became U+FFFD: {report.repaired:,}")
    (folder / "broken.txt").unlink(missing_ok=True)
    if report.broken_count:
        for line in report.broken[:SHOWN]:
            warn(f"left out: {line}")
        with atomic_write(folder / "broken.txt") as file:
            file.write(("\n".join(report.broken) + "\n").encode("utf-8", "replace"))
        warn(f"Broken records or files left out: {report.broken_count:,}, listed in {folder / 'broken.txt'}")


class Encoded(NamedTuple):
    """The tokens of a batch that go to one side, and the bytes of text they stand for."""

    ids: Ids
    bytes: int


def reject_many_files(tokens: Sequence[int], shard_tokens: int | None) -> None:
    """Raise UserError if the tokens so far make too many files already."""
    files = sum(-(-count // shard_tokens) for count in tokens) if shard_tokens else 0
    require(
        files <= MOST_FILES,
        f"--shard_tokens {shard_tokens} makes more than {MOST_FILES:,} files: "
        "give a larger one, a million or more",
    )


def encode(
    corpora: Mapping[str, Corpus], split: Split, work: EncodingJob, shard_tokens: int | None = None
) -> None:
    """Append the tokens of every document to its side's file, from where `work` stands.

    Errors: UserError if the disk is full, or if files of `shard_tokens` are too many.
    """
    with progress_bar("Encoding", size_in_bytes=True) as bar:
        task = bar.add_task("", total=sum(corpus.size for corpus in corpora.values()), detail="")
        pieces = split(all_chunks(corpora, partial(bar.advance, task)))
        left = islice(batches(pieces, lambda piece: len(piece[0].raw)), work.batches, None)
        began = saved = time.monotonic()
        with work.writing() as files:
            for sides in in_order(partial(encode_batch, work.tokenizer), left):
                for side, part in enumerate(sides):
                    work.add(files, side, part.ids, part.bytes)
                work.batches += 1
                reject_many_files(work.tokens, shard_tokens)
                if time.monotonic() - saved > SAVE_SECONDS:
                    work.save(files)
                    saved = time.monotonic()
            if saved > began:  # a long one: nor shall it be done again if the next step is killed
                work.save(files)


def encode_batch(tokenizer: Tokenizer, batch: list[tuple[Chunk, int]]) -> list[Encoded]:
    """The tokens of a batch for each side, with end-of-text after every document that ends."""
    encoded: list[Encoded] = []
    for side in range(len(SPLITS)):
        pieces = [piece for piece, its_side in batch if its_side == side]
        ids, lengths = tokenizer.encode_batch([piece.raw for piece in pieces])
        if tokenizer.end_of_text is not None:
            ends = np.array([piece.ends for piece in pieces], np.bool_)
            ids = np.insert(ids, np.cumsum(lengths)[ends], tokenizer.end_of_text)
        encoded.append(Encoded(ids, sum(len(piece.raw) for piece in pieces)))
    return encoded


def token_files(folder: Path) -> list[str]:
    """The names of the token files of the data set in a folder."""
    patterns = [re.compile(rf"{split}(-\d{{5,}})?\.pt") for split in SPLITS]
    return [path.name for path in folder.iterdir() if any(p.fullmatch(path.name) for p in patterns)]


def describe(folder: Path, facts: Mapping[str, Any], tokenizer: Tokenizer, split: Split) -> None:
    """Say what was made."""
    say(f"Characters: {facts['characters']:,}")
    if facts["documents"] > 1:
        say(f"Documents: {facts['documents']:,}")
        copies, of = split.duplicates()
        if copies:
            warn(
                f"{copies:,} of {counted(of, 'document')} for validation {'is' if copies == 1 else 'are'} "
                "also in the training split, letter by letter: the validation loss will be too good "
                "(--split documents keeps copies together)"
            )
    different = "different characters" if isinstance(tokenizer, CharTokenizer) else "tokens"
    say(f"Vocabulary: {tokenizer.vocab_size:,} {different}")
    total = sum(facts["tokens"].values())
    for name, size in facts["tokens"].items():
        files = f"-*.pt ({counted(facts['shards'][name], 'file')})" if "shards" in facts else ".pt"
        say(f"{folder / name}{files}: {counted(size, 'token')} ({size / total:.0%})")
