"""The first pass over a corpus: length and digest of every document, all characters, and the split.

Example: scanned = scan(corpora, config); split = Split(scanned, config)
         for chunk, side in split(all_chunks(corpora)): ...
Holds 16 bytes for each document and no text. Knows nothing of tokens.
"""

import hashlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from nanogpt.data.config import PrepareConfig
from nanogpt.data.saved_tokenizer import open_saved
from nanogpt.data.vocab_file import FORMAT_VERSION
from nanogpt.errors import require
from nanogpt.machine.cores import usable_cores
from nanogpt.terminal.console import progress_bar
from nanogpt.text.corpus import Corpus
from nanogpt.text.documents import Chunk, SkipReport
from nanogpt.text.speakers import require_known
from nanogpt.text.tiny_shakespeare import TINY_SHAKESPEARE
from nanogpt.tokenizer import base as tokenizers
from nanogpt.tokenizer.registry import SAVED_SUFFIXES, min_vocab_size
from nanogpt.units import plural

BATCH_BYTES, BATCH_DOCUMENTS = 1 << 18, 1 << 13
"""Size of a thread's batch: this many bytes of text, in at most this many documents."""

SAMPLE_BYTES = 1 << 26
"""Size of the sample of the training split from which a tokenizer is learned."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class ChunkStats(NamedTuple):
    """A chunk's length in characters, 8 bytes of its SHA-256, and whether it ends a document."""

    characters: int
    digest: bytes
    ends: bool


@dataclass
class ScanResult:
    """The result of the first pass.

    characters, digests: of each document. With --val_file, its documents come last, from first_val on.
    seen_characters: (CODE_POINTS,), whether each code point occurs.
    """

    characters: "array[int]" = field(default_factory=lambda: array("Q"))
    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    first_val: int | None = None
    seen_characters: NDArray[np.bool_] = field(
        default_factory=lambda: np.zeros(tokenizers.CODE_POINTS, np.bool_)
    )
    report: SkipReport = field(default_factory=SkipReport)
    open_document: list[ChunkStats] = field(default_factory=list[ChunkStats])
    """The chunks of the current document so far."""

    def add(self, chunk: ChunkStats) -> None:
        """Add the next chunk."""
        self.open_document.append(chunk)
        if chunk.ends:
            digests = b"".join(part.digest for part in self.open_document)
            digest = digests if len(self.open_document) == 1 else short_digest(digests)
            self.characters.append(sum(part.characters for part in self.open_document))
            self.digests.append(int.from_bytes(digest, "little"))
            self.open_document.clear()

    @property
    def total_characters(self) -> int:
        """Characters of all documents."""
        return sum(self.characters)


def scan(corpora: Mapping[str, Corpus], config: PrepareConfig) -> ScanResult:
    """Scan every document: its length, its digest, its characters.

    Raises: UserError if there is no text.
    """
    scanned = ScanResult(report=SkipReport(config.strict))
    measure = partial(measure_batch, scanned.seen_characters)
    with progress_bar("Reading", size_in_bytes=True) as bar:
        task = bar.add_task("", total=sum(corpus.size for corpus in corpora.values()), detail="")
        for name, corpus in corpora.items():
            if name == "val":
                scanned.first_val = len(scanned.characters)
            chunks = corpus.chunks(scanned.report, partial(bar.advance, task))
            for batch in map_in_order(measure, group_into_batches(chunks, lambda chunk: len(chunk.raw))):
                for chunk in batch:
                    scanned.add(chunk)
    scanned.report.notes = scanned.report.all_notes(config.text_field)
    require_known(config.speakers, scanned.report.used_rules, scanned.report.speakers)
    require_text(scanned, config)
    return scanned


def measure_batch(seen: NDArray[np.bool_], batch: list[Chunk]) -> list[ChunkStats]:
    """Measure each chunk, and mark its characters in `seen`, (CODE_POINTS,)."""
    measured: list[ChunkStats] = []
    for chunk in batch:
        tokenizers.mark_characters(seen, chunk.raw)
        measured.append(ChunkStats(chunk.characters, short_digest(chunk.raw), chunk.ends))
    return measured


def short_digest(raw: bytes) -> bytes:
    """The first 8 bytes of the SHA-256 of `raw`."""
    return hashlib.sha256(raw).digest()[:8]


def require_text(scanned: ScanResult, config: PrepareConfig) -> None:
    """Raise UserError if there is no text, or none in --val_file."""
    message = "is empty: give a file with text in it"
    if scanned.report.broken:
        count = plural(scanned.report.broken_count, "broken record")
        message = f"has no text that can be read: {count}, the first: {scanned.report.broken[0]}"
    require(scanned.first_val != len(scanned.characters), f"--val_file {config.val_source} {message}")
    require(bool(scanned.characters), f"--input_file {config.source or TINY_SHAKESPEARE} {message}")


def fingerprint_of(scanned: ScanResult, config: PrepareConfig) -> str:
    """The fingerprint of a data set: SHA-256 of its documents, in order, and of its settings."""
    shape = (
        *tokenizer_settings(config),
        config.shard_tokens,
        config.split,
        config.train_split,
        scanned.first_val,
        *([] if config.pair is None else ["pairs"]),
    )
    return hashlib.sha256(
        f"nanogpt data {FORMAT_VERSION} {shape}\n".encode() + scanned.digests.tobytes()
    ).hexdigest()


def tokenizer_settings(config: PrepareConfig) -> tuple[str, int]:
    """Identify a tokenizer: its name or a digest of its file, and --vocab_size if it matters (else 0)."""
    path, kind = Path(config.tokenizer), config.tokenizer
    if path.suffix == ".json" and path.is_file():
        kind = short_digest(path.read_bytes()).hex()
    elif path.suffix in SAVED_SUFFIXES:
        kind = short_digest(repr(open_saved(path).to_dict()).encode()).hex()
    return kind, config.vocab_size if min_vocab_size(config.tokenizer) is not None else 0


def all_chunks(corpora: Mapping[str, Corpus], advance: Callable[[int], object] = int) -> Iterator[Chunk]:
    """All chunks of all corpora, in a later pass: broken records were reported in the first one."""
    for corpus in corpora.values():
        yield from corpus.chunks(SkipReport(), advance)


def group_into_batches(chunks: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Group chunks into lists of BATCH_BYTES, by `size`, or of BATCH_DOCUMENTS."""
    batch: list[Item] = []
    total = 0
    for chunk in chunks:
        batch.append(chunk)
        total += size(chunk)
        if total >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Map a function over items, in order, with a thread for each core. Holds few items at a time."""
    workers = usable_cores(physical=False)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > workers + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Split:
    """The training and the validation split.

    --split tail: the last part of the characters is for validation; with pairs, those that end in it.
    --split documents: whole documents are, chosen by a hash of their text, so that a document stays in its
    split when the corpus grows. Raises: UserError if a split is too small.
    """

    def __init__(self, scanned: ScanResult, config: PrepareConfig) -> None:
        self.scanned = scanned
        digests = np.frombuffer(scanned.digests, np.uint64)
        self.by_document: NDArray[np.bool_] | None = None
        """Whether each document is for validation; None if the tail is."""
        self.boundary = int(scanned.total_characters * config.train_split)
        """Number of characters before the tail."""
        if scanned.first_val is not None:
            self.by_document = np.arange(len(digests)) >= scanned.first_val
        elif config.split == "documents":
            self.by_document = digests >= np.uint64(min(config.train_split, 1 - 2**-53) * 2.0**64)
        elif config.pair is not None:  # a prompt and its completion stay together
            self.by_document = np.cumsum(np.frombuffer(scanned.characters, np.uint64)) > self.boundary
        if self.by_document is None:
            sizes = self.boundary, scanned.total_characters - self.boundary
        else:
            characters = np.frombuffer(scanned.characters, np.uint64)
            sizes = (int(characters[~self.by_document].sum()), int(characters[self.by_document].sum()))
        require(
            min(sizes) >= 2,
            f"{config.source or TINY_SHAKESPEARE} has {plural(scanned.total_characters, 'character')} in "
            f"{plural(len(digests), 'document')}: too short for --train_split "
            f"{config.train_split}, both splits need at least 2",
        )

    def __call__(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, int]]:
        """Each chunk with its side: 0 training, 1 validation. The chunk where the tail begins is cut in two.

        Raises: UserError if these are not the scanned documents.
        """
        changed = "the text changed while it was being read: run the command again"
        document, position = 0, 0
        for chunk in chunks:
            require(document < len(self.scanned.characters), changed)
            if self.by_document is not None:
                yield chunk, int(self.by_document[document])
            else:
                left, size = self.boundary - position, chunk.characters
                if 0 < left < size:
                    tail = chunk.raw.decode()[left:].encode()
                    yield Chunk(chunk.raw[: -len(tail)], False), 0
                    yield Chunk(tail, chunk.ends), 1
                else:
                    yield chunk, int(left <= 0)
                position += size
            document += chunk.ends
        require(document == len(self.scanned.characters), changed)

    def duplicates(self) -> tuple[int, int]:
        """Number of validation documents that are also in the training split, and of all of them."""
        digests, validates = np.frombuffer(self.scanned.digests, np.uint64), self.by_document
        trains = None if validates is None else ~validates
        if validates is None:
            ends = np.cumsum(np.frombuffer(self.scanned.characters, np.uint64))
            trains = ends <= self.boundary
            validates = ends - np.frombuffer(self.scanned.characters, np.uint64) >= self.boundary
        return int(np.isin(digests[validates], digests[trains]).sum()), int(validates.sum())


@dataclass(frozen=True)
class CorpusText:
    """The text that a new tokenizer is made from: a TrainingText of tokenizer/base.py."""

    corpora: Mapping[str, Corpus]
    split: Split
    scanned: ScanResult

    @property
    def characters(self) -> str:
        """Every different character of the whole text, in order of code point."""
        return tokenizers.marked_characters(self.scanned.seen_characters)

    @property
    def documents(self) -> int:
        """Number of documents in the whole text."""
        return len(self.scanned.characters)

    def sample(self) -> bytes:
        """Evenly spread chunks of the training split in UTF-8, about SAMPLE_BYTES in all.

        They are separated by the byte 0xFF, since neighboring chunks of the sample are not so in the text.
        """
        total = self.scanned.total_characters  # fewer than bytes: the sample is a little larger
        sample: list[bytes] = []
        taken = passed = 0
        with progress_bar("Sampling", size_in_bytes=True) as bar:
            task = bar.add_task("", total=sum(corpus.size for corpus in self.corpora.values()), detail="")
            for chunk, side in self.split(all_chunks(self.corpora, partial(bar.advance, task))):
                if side == 0 and taken * total <= passed * SAMPLE_BYTES:
                    sample.append(chunk.raw)
                    taken += len(chunk.raw)
                passed += len(chunk.raw)
        return b"\xff".join(sample)
