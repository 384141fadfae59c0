"""The `data` command: turn a corpus into token files.

Run:    python data.py                                          Tiny Shakespeare into data/
        python data.py --input_file books/ dump.jsonl.gz --tokenizer bpe --data_dir my_data
Writes: train.pt, val.pt (1-D token tensors of the narrowest type) and vocab.pt (the tokenizer, counts,
        a fingerprint of the text, and the SHA-256 of each token file). For pairs (--prompt_field), also
        train_mask.pt and val_mask.pt: which tokens count for the loss. An earlier set is replaced when
        the new one is complete (data/swap.py).
The first pass over the corpus scans it (data/scan.py), the second encodes it. Each holds only a few chunks of
text in memory, and shares the work among threads. The second resumes after a kill.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanogpt.data.config import PrepareConfig
from nanogpt.data.dataset import load_dataset, prepare_arguments
from nanogpt.data.saved_tokenizer import given_tokenizer, with_characters_of
from nanogpt.data.scan import (
    CorpusText,
    Split,
    all_chunks,
    fingerprint_of,
    group_into_batches,
    map_in_order,
    scan,
)
from nanogpt.data.swap import FILE_NAME, VOCAB_FILE, WORK, finish_swap, make_new_folder, replace_dataset
from nanogpt.data.token_writer import EncodingJob, write_tokens
from nanogpt.data.vocab_file import FORMAT_VERSION, MASKED_VERSION, SPLITS, shard_names
from nanogpt.errors import UserError, require
from nanogpt.storage.files import atomic_write
from nanogpt.storage.locking import lock
from nanogpt.storage.seals import Checksum, save_with_checksum
from nanogpt.terminal.console import progress_bar, say, warn
from nanogpt.text.corpus import Corpus, find_corpus
from nanogpt.text.documents import Chunk, PairFields, SkipReport, first_of_each_kind
from nanogpt.text.tiny_shakespeare import TINY_SHAKESPEARE, tiny_shakespeare
from nanogpt.tokenizer.base import Ids, Tokenizer
from nanogpt.tokenizer.registry import TOKENIZERS
from nanogpt.units import ceil_div, plural

SAVE_SECONDS = 5.0
"""Seconds between saves of the encoding's state, and so the most that a kill can lose."""

MAX_FILES = 10_000
"""Maximum number of files in a data set: a process can map some 65,000, and each file is synced twice."""

OUT_OF_MEMORY_WORDS = (
    "can't start new thread",
    "not enough memory",
    "annot allocate memory",
    "failed to map segment",
    "bad_alloc",
)

STDIN_FILE = "stdin.txt"

DOWNLOADS = "downloads"
"""Folder of downloaded texts within the data folder."""

MAX_SHOWN = 10
"""Kinds of notes, and of broken records, that are printed; broken.txt lists all records."""


def main(config: PrepareConfig) -> int:
    """Prepare a data folder and print a summary. Returns the exit code."""
    folder = Path(config.data_dir)
    try:
        with lock(folder, f"another program is writing to {folder}: use another --data_dir"):
            try:
                prepare(config)
            finally:
                if "-" in config.input_file + config.val_file:
                    (folder / STDIN_FILE).unlink(missing_ok=True)
    except FileExistsError as error:
        raise UserError(f"--data_dir {folder} is a file: give a folder") from error
    except OSError as error:
        if error.filename is None or not is_above_or_below(Path(error.filename), folder):
            raise
        raise UserError(f"--data_dir {folder} cannot be written ({error.strerror}): give another") from error
    except (MemoryError, RuntimeError, ImportError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "not enough memory to prepare the data: end other programs, or give a smaller --vocab_size"
        ) from error
    return 0


def is_above_or_below(path: Path, folder: Path) -> bool:
    """Whether a path is a folder, is in it, or leads to it."""
    return path.is_relative_to(folder) or folder.is_relative_to(path)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out: threads, tensors and libraries say so in words."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY_WORDS)


def prepare(config: PrepareConfig) -> None:
    """Write the data set into config.data_dir, and print a summary.

    Raises: UserError if the text cannot be read or is too short for the split, if the folder holds
    another data set and overwrite is off, or if it cannot be written.
    """
    folder = Path(config.data_dir)
    finish_swap(folder)  # if a swap was interrupted
    corpora = open_corpora(config, folder)
    work = EncodingJob(folder / WORK, config, [path for corpus in corpora.values() for path in corpus.files])
    # Before the long pass, so that a missing tokenizer is reported at once.
    given = None if work.scanned else given_tokenizer(config.tokenizer)
    scanned = work.scanned or scan(corpora, config)
    fingerprint = fingerprint_of(scanned, config)
    if is_prepared(folder, fingerprint, config.overwrite):
        if work.scanned is None:
            print_skip_report(scanned.report, folder)
        say(f"{folder} is already prepared from this text")
        work.remove()
        return
    split = Split(scanned, config)
    if work.scanned is None:
        print_skip_report(scanned.report, folder)
        text = CorpusText(corpora, split, scanned)
        if given:
            tokenizer = with_characters_of(given, text)
        else:
            tokenizer = TOKENIZERS[config.tokenizer].from_text(text, config.vocab_size)
        work.start(scanned, tokenizer)
    else:
        say(f"Going on with the preparation that was cut short, after {plural(sum(work.tokens), 'token')}")
    encode_corpora(corpora, split, work, config.shard_tokens)
    facts = write_dataset(config, folder, work, fingerprint)
    work.remove()
    print_summary(folder, facts, work.tokenizer, split)
    if config.pair is not None:
        print_pairs(facts, config.pair)


def write_dataset(config: PrepareConfig, folder: Path, work: EncodingJob, fingerprint: str) -> dict[str, Any]:
    """Write the files of the new set, and replace the old one. Returns the content of vocab.pt.

    Raises: UserError if the disk is full; then the old set is still there.
    """
    assert work.scanned is not None
    tokens, sizes = (dict(zip(SPLITS, values, strict=True)) for values in (work.tokens, work.bytes))
    facts: dict[str, Any] = {
        "format": FORMAT_VERSION if config.pair is None else MASKED_VERSION,
        "tokenizer": work.tokenizer.to_dict(),
        "fingerprint": fingerprint,
        "arguments": prepare_arguments(config),
        "characters": work.scanned.total_characters,
        "documents": len(work.scanned.characters),
        "tokens": tokens,
        "bytes": sizes,
    }
    shard_size = config.shard_tokens or max(tokens.values())
    counts = {name: ceil_div(count, shard_size) for name, count in tokens.items()}
    if config.shard_tokens is not None:
        facts["shards"] = counts
    if config.pair is not None:
        for key, values in (("counted", work.counted), ("counted_bytes", work.counted_bytes)):
            facts[key] = dict(zip(SPLITS, values, strict=True))
    new, seals = make_new_folder(folder), dict[str, Checksum]()
    for array, split in zip(work.names, SPLITS * 2, strict=False):
        count = tokens[split]
        names = [f"{array}.pt"] if config.shard_tokens is None else shard_names(array, counts[split])
        for name, first in zip(names, range(0, count, shard_size), strict=True):
            size = min(shard_size, count - first)
            seals[name] = write_tokens(work.token_path(array), new / name, work.dtype(array), first, size)
    facts["sha256"] = {name: seal.sha256 for name, seal in seals.items()}
    facts["blocks"] = {name: seal.blocks for name, seal in seals.items() if seal.blocks is not None}
    save_with_checksum(new / VOCAB_FILE, facts)
    names = {*seals, VOCAB_FILE}
    present = {path.name for path in folder.iterdir() if FILE_NAME.fullmatch(path.name)}
    replace_dataset(folder, names, stale=present - names)
    return facts


def open_corpora(config: PrepareConfig, folder: Path) -> dict[str, Corpus]:
    """Open the corpus to split ("train") and, with --val_file, the one only for validation ("val")."""
    given: dict[str, tuple[str, ...]] = {"train": config.input_file}
    if not config.input_file:
        path, note = tiny_shakespeare(folder)
        say(f"{TINY_SHAKESPEARE}: {note}")
        given["train"] = (str(path),)
    if config.val_file:
        given["val"] = config.val_file
    corpora: dict[str, Corpus] = {}
    for side, names in given.items():
        files = [str(save_standard_input(folder)) if name == "-" else name for name in names]
        corpora[side] = find_corpus(files, config, folder / DOWNLOADS)
    return corpora


def save_standard_input(folder: Path) -> Path:
    """Save standard input to a temporary file, since it is read more than once.

    Raises: UserError if it is closed, cannot be read, or does not fit on the disk.
    """
    require(sys.stdin is not None, "--input_file - is standard input, which is closed: pipe a text into it")
    path = folder / STDIN_FILE
    with atomic_write(path) as file:
        while True:
            try:
                block = sys.stdin.buffer.read(1 << 20)
            except (OSError, ValueError) as error:
                why = (isinstance(error, OSError) and error.strerror) or str(error)
                raise UserError(f"--input_file - cannot be read: {why}") from error
            if not block:
                return path
            file.write(block)


def is_prepared(folder: Path, fingerprint: str, overwrite: bool) -> bool:
    """Whether `folder` holds the complete data set with this fingerprint.

    Raises: UserError if it holds something else and `overwrite` is off.
    """
    if not (folder / VOCAB_FILE).exists():  # empty, or a preparation was interrupted
        return False
    try:
        if load_dataset(folder, verify_bytes=None).fingerprint == fingerprint:
            return True
        found = "another data set"
    except UserError:
        found = "a damaged data set"
    require(overwrite, f"{folder} holds {found}: give --overwrite to replace it, or another --data_dir")
    return False


def print_skip_report(report: SkipReport, folder: Path) -> None:
    """Print how the corpus was read and which records were skipped; broken.txt lists all of those."""
    print_first(first_of_each_kind(report.notes), say)
    if report.repaired:
        say(f"Records with what is no character, which became U+FFFD: {report.repaired:,}")
    (folder / "broken.txt").unlink(missing_ok=True)
    if report.broken_count:
        print_first([f"left out: {line}" for line in first_of_each_kind(report.broken)], warn)
        with atomic_write(folder / "broken.txt") as file:
            file.write(("\n".join(report.broken) + "\n").encode("utf-8", "replace"))
        warn(f"Broken records or files left out: {report.broken_count:,}, listed in {folder / 'broken.txt'}")


def print_first(lines: Sequence[str], show: Callable[[str], None]) -> None:
    """Print the first lines, and how many there are more."""
    for line in lines[:MAX_SHOWN]:
        show(line)
    if len(lines) > MAX_SHOWN:
        show(f"... and {plural(len(lines) - MAX_SHOWN, 'more line')}")


class EncodedBatch(NamedTuple):
    """The tokens of a batch for one split. bytes: of text in them.

    mask: (N,), which ids count for the loss; None: all, without pairs. counted_bytes: of text in those.
    """

    ids: Ids
    bytes: int
    mask: NDArray[np.bool_] | None
    counted_bytes: int


def reject_many_files(tokens: Sequence[int], shard_tokens: int | None) -> None:
    """Raise UserError if the tokens so far fill more than MAX_FILES files."""
    files = sum(ceil_div(count, shard_tokens) for count in tokens) if shard_tokens else 0
    require(
        files <= MAX_FILES,
        f"--shard_tokens {shard_tokens} makes more than {MAX_FILES:,} files: "
        "give a larger one, a million or more",
    )


def encode_corpora(
    corpora: Mapping[str, Corpus], split: Split, work: EncodingJob, shard_tokens: int | None = None
) -> None:
    """Encode every document from where `work` left off, and append its tokens to the file of its split.

    Raises: UserError if the disk is full, or if shards of `shard_tokens` tokens would be too many.
    """
    with progress_bar("Encoding", size_in_bytes=True) as bar:
        task = bar.add_task("", total=sum(corpus.size for corpus in corpora.values()), detail="")
        chunks = split(all_chunks(corpora, partial(bar.advance, task)))
        left = islice(group_into_batches(chunks, lambda chunk: len(chunk[0].raw)), work.batches, None)
        began = saved = time.monotonic()
        with work.open_token_files() as files:
            encode = partial(encode_batch, work.tokenizer, work.masked)
            for sides in map_in_order(encode, left):
                for side, part in enumerate(sides):
                    work.append(files, side, part.ids, part.bytes)
                    if part.mask is not None:
                        work.append_mask(files, side, part.mask, part.counted_bytes)
                work.batches += 1
                reject_many_files(work.tokens, shard_tokens)
                if time.monotonic() - saved > SAVE_SECONDS:
                    work.save_state(files)
                    saved = time.monotonic()
            if saved > began:  # save a long encoding, in case the next step is killed
                work.save_state(files)


def encode_batch(tokenizer: Tokenizer, masked: bool, batch: list[tuple[Chunk, int]]) -> list[EncodedBatch]:
    """Encode a batch into the tokens of each split, with an end-of-text token after each document.

    masked: also compute which of them count for the loss.
    """
    encoded: list[EncodedBatch] = []
    for side in range(len(SPLITS)):
        chunks = [chunk for chunk, chunk_side in batch if chunk_side == side]
        ids, lengths = tokenizer.encode_batch([chunk.raw for chunk in chunks])
        counts = np.array([chunk.counts for chunk in chunks], np.bool_)
        mask = np.repeat(counts, lengths) if masked else None
        if tokenizer.end_of_text is not None:
            ends = np.array([chunk.ends for chunk in chunks], np.bool_)
            places = np.cumsum(lengths)[ends]
            ids = np.insert(ids, places, tokenizer.end_of_text)
            mask = None if mask is None else np.insert(mask, places, counts[ends])
        counted_bytes = sum(len(chunk.raw) for chunk in chunks if chunk.counts)
        encoded.append(EncodedBatch(ids, sum(len(chunk.raw) for chunk in chunks), mask, counted_bytes))
    return encoded


def print_summary(folder: Path, facts: Mapping[str, Any], tokenizer: Tokenizer, split: Split) -> None:
    """Print a summary of the data set."""
    say(f"Characters: {facts['characters']:,}")
    if facts["documents"] > 1:
        say(f"Documents: {facts['documents']:,}")
        copies, of = split.duplicates()
        if copies:
            warn(
                f"{copies:,} of {plural(of, 'document')} for validation {'is' if copies == 1 else 'are'} "
                "also in the training split, letter by letter: the validation loss will be too good "
                "(--split documents keeps copies together)"
            )
    say(f"Vocabulary: {tokenizer.vocab_size:,} {tokenizer.unit}")
    total = sum(facts["tokens"].values())
    for name, size in facts["tokens"].items():
        files = f"-*.pt ({plural(facts['shards'][name], 'file')})" if "shards" in facts else ".pt"
        say(f"{folder / name}{files}: {plural(size, 'token')} ({size / total:.0%})")


def print_pairs(facts: Mapping[str, Any], pair: PairFields) -> None:
    """Print what counts for the loss, and how a prompt to sample from ends."""
    share = sum(facts["counted"].values()) / sum(facts["tokens"].values())
    say(f"Loss: on the tokens of {pair.completion!r} alone, {share:.0%} of all")
    if pair.separator:
        say(
            f'To sample, end the prompt in the separator, as here: --prompt "...{repr(pair.separator)[1:-1]}"'
        )
