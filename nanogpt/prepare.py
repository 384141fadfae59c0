"""The `data` command: a corpus to token files.

Run:    python data.py                                          Tiny Shakespeare into data/
        python data.py --input_file books/ dump.jsonl.gz --tokenizer bpe --data_dir my_data
Writes: train.pt, val.pt (1-D token tensors of the narrowest type) and vocab.pt (the tokenizer, counts,
        and a fingerprint of the text).
One pass over the corpus counts (survey.py), one encodes; each holds a few pieces of text and no more,
whatever the size, and shares the work among threads. Killed, the second goes on where it was.
"""

import hashlib
import re
import shutil
import sys
import time
from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanogpt.bpe import gpt2, train_bpe
from nanogpt.config import DataConfig, UserError, require
from nanogpt.console import progress_bar, say, warn
from nanogpt.corpus import Corpus, find
from nanogpt.data import FORMAT, SPLITS, load, save_plain, shard_path
from nanogpt.documents import Piece, Report, counted
from nanogpt.files import replacing
from nanogpt.locking import lock
from nanogpt.shakespeare import TINY_SHAKESPEARE, download, tiny_shakespeare
from nanogpt.survey import Split, Survey, all_pieces, batches, fingerprint_of, in_order, take_survey
from nanogpt.token_files import Work, write_tokens
from nanogpt.tokenizer import ByteTokenizer, CharTokenizer, Ids, Tokenizer, characters
from nanogpt.vocabulary import from_file

SAMPLE_BYTES = 1 << 26
"""How much of the training split a BPE is learned from, spread evenly over it."""

SAVE_SECONDS = 5.0
"""Seconds of encoding that a kill may cost."""

STDIN = "stdin.txt"

SHOWN = 5
"""Broken records that are shown; the rest are in broken.txt."""

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


def main(config: DataConfig) -> int:
    """Prepare a data folder and say what was made. Returns the exit code."""
    folder = Path(config.data_dir)
    try:
        with lock(folder, f"another program is writing to {folder}: use another --data_dir"):
            prepare(config)
    except FileExistsError as error:
        raise UserError(f"--data_dir {folder} is a file: give a folder") from error
    finally:
        if "-" in config.input_file + config.val_file:
            (folder / STDIN).unlink(missing_ok=True)
    return 0


def prepare(config: DataConfig) -> None:
    """Write train.pt, val.pt and vocab.pt into config.data_dir, and say what they hold.

    Errors: UserError if the text cannot be read or is too short for the split, if the folder holds
    another data set and overwrite is off, or if it cannot be written.
    """
    folder = Path(config.data_dir)
    corpora = open_corpora(config, folder)
    work = Work(folder / "preparing", config, [path for corpus in corpora.values() for path in corpus.files])
    given = None if work.survey else given_tokenizer(config)  # before a long pass: it may not be there
    survey = work.survey or take_survey(corpora, config)
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
        say(f"Going on with the preparation that was cut short, after {sum(work.tokens):,} tokens")
    encode(corpora, split, work)
    tokens, sizes = (dict(zip(SPLITS, values, strict=True)) for values in (work.tokens, work.bytes))
    facts: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer": work.tokenizer.to_dict(),
        "fingerprint": fingerprint,
        "arguments": arguments(config),
        "characters": survey.total,
        "documents": len(survey.characters),
        "tokens": tokens,
        "bytes": sizes,
    }
    (folder / "vocab.pt").unlink(missing_ok=True)  # written last: without it the folder is incomplete
    remove_tokens(folder)
    for name, count in tokens.items():
        raw, dtype = work.tokens_file(name), work.tokenizer.dtype
        if config.shard_tokens is None:
            write_tokens(raw, folder / f"{name}.pt", dtype, 0, count)
        else:
            firsts = range(0, count, config.shard_tokens)
            facts.setdefault("shards", {})[name] = len(firsts)
            for number, first in enumerate(firsts):
                size = min(config.shard_tokens, count - first)
                write_tokens(raw, shard_path(folder, name, number), dtype, first, size)
    save_plain(folder / "vocab.pt", facts)
    work.remove()
    describe(folder, facts, work.tokenizer, split)


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
    """Standard input as a file for as long as the preparation takes, since it is read more than once."""
    path = folder / STDIN
    with replacing(path) as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    return path


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


def report_broken(report: Report, folder: Path) -> None:
    """Say how the corpus was read and which records were left out; all of those are listed in broken.txt."""
    for note in report.notes[:SHOWN]:
        say(note)
    if len(report.notes) > SHOWN:
        say(f"... and {len(report.notes) - SHOWN:,} more notes of that kind")
    if report.repaired:
        say(f"Records with what is no character, which became U+FFFD: {report.repaired:,}")
    (folder / "broken.txt").unlink(missing_ok=True)
    if report.broken_count:
        for line in report.broken[:SHOWN]:
            warn(f"left out: {line}")
        with replacing(folder / "broken.txt") as file:
            file.write(("\n".join(report.broken) + "\n").encode("utf-8", "replace"))
        warn(f"Broken records or files left out: {report.broken_count:,}, listed in {folder / 'broken.txt'}")


def given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer that --tokenizer names, None if it is learned. Errors: UserError if it cannot be had."""
    match config.tokenizer:
        case "char" | "bpe":
            return None
        case "byte":
            return ByteTokenizer()
        case "gpt2":
            return gpt2(published_merges())
        case path:
            return from_file(Path(path))


def learned_tokenizer(
    config: DataConfig, corpora: Mapping[str, Corpus], split: Split, survey: Survey
) -> Tokenizer:
    """Every character of the text, or a BPE learned from its training split.

    Errors: UserError if it is too small for --vocab_size.
    """
    if config.tokenizer == "char":
        return CharTokenizer(characters(survey.seen), end_of_text=len(survey.characters) > 1)
    sample = training_sample(corpora, split, survey.total)
    say(f"Learning a vocabulary of {config.vocab_size:,} from {len(sample) / 1e6:,.1f} MB of text")
    return train_bpe(sample, config.vocab_size)


def training_sample(corpora: Mapping[str, Corpus], split: Split, total: int) -> bytes:
    """Pieces of the training split in UTF-8, about SAMPLE_BYTES of it, evenly spread.

    The byte 0xFF stands between them: what follows a piece in the sample does not follow it in the text.
    total: size of the whole corpus, in characters (a little less than in bytes: the sample is the larger).
    """
    sample: list[bytes] = []
    taken = passed = 0
    with progress_bar("Sampling", size_in_bytes=True) as bar:
        task = bar.add_task("", total=sum(corpus.size for corpus in corpora.values()), detail="")
        for piece, side in split(all_pieces(corpora, partial(bar.advance, task))):
            if side == 0 and taken * total <= passed * SAMPLE_BYTES:
                sample.append(piece.raw)
                taken += len(piece.raw)
            passed += len(piece.raw)
    return b"\xff".join(sample)


def published_merges() -> str:
    """GPT-2's file of merges, from where it was published. Errors: UserError if it cannot be fetched."""
    try:
        raw = download(GPT2_URL)
    except OSError as error:
        raise UserError(
            "--tokenizer gpt2 cannot be fetched: connect to the internet, or give --tokenizer the path "
            f"of GPT-2's tokenizer.json ({type(error).__name__})"
        ) from error
    require(hashlib.sha256(raw).hexdigest() == GPT2_SHA256, "--tokenizer gpt2 arrived damaged: try again")
    return raw.decode("utf-8")


class Encoded(NamedTuple):
    """The tokens of a batch that go to one side, and the bytes of text they stand for."""

    ids: Ids
    bytes: int


def encode(corpora: Mapping[str, Corpus], split: Split, work: Work) -> None:
    """Append the tokens of every document to its side's file, from where `work` stands."""
    with progress_bar("Encoding", size_in_bytes=True) as bar:
        task = bar.add_task("", total=sum(corpus.size for corpus in corpora.values()), detail="")
        pieces = split(all_pieces(corpora, partial(bar.advance, task)))
        left = islice(batches(pieces, lambda piece: len(piece[0].raw)), work.batches, None)
        began = saved = time.monotonic()
        with work.writing() as files:
            for sides in in_order(partial(encode_batch, work.tokenizer), left):
                for side, part in enumerate(sides):
                    part.ids.tofile(files[side])
                    work.tokens[side] += len(part.ids)
                    work.bytes[side] += part.bytes
                work.batches += 1
                if time.monotonic() - saved > SAVE_SECONDS:
                    work.save(files)
                    saved = time.monotonic()
            if saved > began:  # a long one: nor shall it be done again if the next step is killed
                work.save(files)


def encode_batch(tokenizer: Tokenizer, batch: list[tuple[Piece, int]]) -> list[Encoded]:
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


def remove_tokens(folder: Path) -> None:
    """Delete the token files of an older data set."""
    for name in SPLITS:
        for path in folder.glob(f"{name}*.pt"):
            if re.fullmatch(rf"{name}(-\d{{5,}})?\.pt", path.name):
                path.unlink()


def describe(folder: Path, facts: Mapping[str, Any], tokenizer: Tokenizer, split: Split) -> None:
    """Say what was made."""
    say(f"Characters: {facts['characters']:,}")
    if facts["documents"] > 1:
        say(f"Documents: {facts['documents']:,}")
        copies, of = split.duplicates()
        if copies:
            warn(
                f"{copies:,} of {counted(of, 'document')} for validation are also in the training split, "
                "letter by letter: the validation loss will be too good (--split documents keeps copies "
                "together)"
            )
    different = "different characters" if isinstance(tokenizer, CharTokenizer) else "tokens"
    say(f"Vocabulary: {tokenizer.vocab_size:,} {different}")
    total = sum(facts["tokens"].values())
    for name, size in facts["tokens"].items():
        files = f"-*.pt ({facts['shards'][name]} files)" if "shards" in facts else ".pt"
        say(f"{folder / name}{files}: {size:,} tokens ({size / total:.0%})")
