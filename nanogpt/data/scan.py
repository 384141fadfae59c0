"""The first pass over a corpus: how long every document is, what is in it, and which side it goes to.

Use:    survey = take_survey(corpora, config); split = Split(survey, config)
        for piece, side in split(all_pieces(corpora)): ...
Knows nothing of tokens. Holds 16 bytes a document and no text.
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

from nanogpt.console import progress_bar
from nanogpt.cores import usable_cores
from nanogpt.data.config import PrepareConfig
from nanogpt.data.dataset import FORMAT_VERSION
from nanogpt.errors import require
from nanogpt.text.corpus import Corpus
from nanogpt.text.documents import Chunk, SkipReport, counted
from nanogpt.text.tiny_shakespeare import TINY_SHAKESPEARE
from nanogpt.tokenizer import base as tokenizers
from nanogpt.tokenizer.registry import min_vocab_size

BATCH_BYTES, BATCH_DOCUMENTS = 1 << 18, 1 << 13
"""What a thread works on at a time: this many bytes of text, of no more documents than that."""

SAMPLE_BYTES = 1 << 26
"""Size of the sample of the training split that a tokenizer learns from."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class ChunkStats(NamedTuple):
    """A piece of text: its length in characters, 8 bytes that identify it, whether it ends a document."""

    characters: int
    digest: bytes
    ends: bool


@dataclass
class ScanResult:
    """What the first pass learns.

    characters, digests: of each document, the documents for validation alone (from first_val on) last.
    """

    characters: "array[int]" = field(default_factory=lambda: array("Q"))
    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    first_val: int | None = None
    seen: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(tokenizers.CODE_POINTS, np.bool_))
    report: SkipReport = field(default_factory=SkipReport)
    waiting: list[ChunkStats] = field(default_factory=list[ChunkStats])
    """The pieces of a document that has not ended."""

    def add(self, piece: ChunkStats) -> None:
        """Take the next piece."""
        self.waiting.append(piece)
        if piece.ends:
            digests = b"".join(part.digest for part in self.waiting)
            digest = digests if len(self.waiting) == 1 else short_digest(digests)
            self.characters.append(sum(part.characters for part in self.waiting))
            self.digests.append(int.from_bytes(digest, "little"))
            self.waiting.clear()

    @property
    def total(self) -> int:
        """Characters in all."""
        return sum(self.characters)


def scan(corpora: Mapping[str, Corpus], config: PrepareConfig) -> ScanResult:
    """Pass over every document: its length, a digest, the characters in it.

    Errors: UserError if there is no text.
    """
    survey = ScanResult(report=SkipReport(config.strict))
    measure = partial(measure_batch, survey.seen)
    with progress_bar("Reading", size_in_bytes=True) as bar:
        task = bar.add_task("", total=sum(corpus.size for corpus in corpora.values()), detail="")
        for name, corpus in corpora.items():
            if name == "val":
                survey.first_val = len(survey.characters)
            pieces = corpus.chunks(survey.report, partial(bar.advance, task))
            for batch in map_in_order(measure, group_into_batches(pieces, lambda piece: len(piece.raw))):
                for piece in batch:
                    survey.add(piece)
    survey.report.notes[:0] = survey.report.unused_field_note(
        config.text_field
    )  # first: it is sure to be shown
    require_text(survey, config)
    return survey


def measure_batch(seen: NDArray[np.bool_], batch: list[Chunk]) -> list[ChunkStats]:
    """Measure each piece, and mark in `seen`, (UNICODE,), the characters that occur."""
    measured: list[ChunkStats] = []
    for piece in batch:
        tokenizers.mark_characters(seen, piece.raw)
        measured.append(ChunkStats(piece.characters, short_digest(piece.raw), piece.ends))
    return measured


def short_digest(raw: bytes) -> bytes:
    """8 bytes that identify `raw`: of its SHA-256."""
    return hashlib.sha256(raw).digest()[:8]


def require_text(survey: ScanResult, config: PrepareConfig) -> None:
    """Raise UserError if there is no text, or none of a corpus for validation alone."""
    broken = survey.report.broken
    why = (
        f" ({counted(survey.report.broken_count, 'broken record')}, the first: {broken[0]})" if broken else ""
    )
    message = "is empty: give a file with text in it"
    require(survey.first_val != len(survey.characters), f"--val_file {config.val_source} {message}{why}")
    require(bool(survey.characters), f"--input_file {config.source or TINY_SHAKESPEARE} {message}{why}")


def fingerprint_of(survey: ScanResult, config: PrepareConfig) -> str:
    """Identifies a data set: SHA-256 over its documents, in order, and the settings that shape the tokens."""
    shape = (
        *tokenizer_settings(config),
        config.shard_tokens,
        config.split,
        config.train_split,
        survey.first_val,
    )
    return hashlib.sha256(
        f"nanogpt data {FORMAT_VERSION} {shape}\n".encode() + survey.digests.tobytes()
    ).hexdigest()


def tokenizer_settings(config: PrepareConfig) -> tuple[str, int]:
    """What tells tokenizers apart: the kind, or what is in its file; and the size of a learned vocabulary."""
    path = Path(config.tokenizer)
    kind = (
        short_digest(path.read_bytes()).hex()
        if path.suffix == ".json" and path.is_file()
        else config.tokenizer
    )
    return kind, config.vocab_size if min_vocab_size(config.tokenizer) is not None else 0


def all_chunks(corpora: Mapping[str, Corpus], advance: Callable[[int], object] = int) -> Iterator[Chunk]:
    """All documents of all corpora, once more: what is broken has been reported."""
    for corpus in corpora.values():
        yield from corpus.chunks(SkipReport(), advance)


def group_into_batches(pieces: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Pieces in lists of BATCH_BYTES, by `size`, or of BATCH_DOCUMENTS."""
    batch: list[Item] = []
    total = 0
    for piece in pieces:
        batch.append(piece)
        total += size(piece)
        if total >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function(item) for each item, in order, by as many threads as there are cores; few items are held."""
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
    """Which text is for training and which for validation.

    tail: the last part of the characters validates. documents: whole documents do, drawn by a hash of
    their text, so that a document stays on its side when the corpus grows.
    Errors: UserError if a side is too small.
    """

    def __init__(self, survey: ScanResult, config: PrepareConfig) -> None:
        self.survey = survey
        digests = np.frombuffer(survey.digests, np.uint64)
        self.by_document: NDArray[np.bool_] | None = None
        """Whether each document validates, unless a boundary says it."""
        self.boundary = int(survey.total * config.train_split)
        """Characters before the tail."""
        if survey.first_val is not None:
            self.by_document = np.arange(len(digests)) >= survey.first_val
        elif config.split == "documents":
            self.by_document = digests >= np.uint64(min(config.train_split, 1 - 2**-53) * 2.0**64)
        if self.by_document is None:
            sizes = self.boundary, survey.total - self.boundary
        else:
            characters = np.frombuffer(survey.characters, np.uint64)
            sizes = (int(characters[~self.by_document].sum()), int(characters[self.by_document].sum()))
        require(
            min(sizes) >= 2,
            f"{config.source or TINY_SHAKESPEARE} has {counted(survey.total, 'character')} in "
            f"{counted(len(digests), 'document')}: too short for --train_split "
            f"{config.train_split}, both splits need at least 2",
        )

    def __call__(self, pieces: Iterable[Chunk]) -> Iterator[tuple[Chunk, int]]:
        """Each piece and its side: 0 training, 1 validation; cut where the tail begins.

        Errors: UserError if these are not the documents of the survey.
        """
        changed = "the text changed while it was being read: run the command again"
        document, position = 0, 0
        for piece in pieces:
            require(document < len(self.survey.characters), changed)
            if self.by_document is not None:
                yield piece, int(self.by_document[document])
            else:
                left, size = self.boundary - position, piece.characters
                if 0 < left < size:
                    tail = piece.raw.decode()[left:].encode()
                    yield Chunk(piece.raw[: -len(tail)], False), 0
                    yield Chunk(tail, piece.ends), 1
                else:
                    yield piece, int(left <= 0)
                position += size
            document += piece.ends
        require(document == len(self.survey.characters), changed)

    def duplicates(self) -> tuple[int, int]:
        """How many documents of the validation split are in the training split too, and of how many."""
        digests, validates = np.frombuffer(self.survey.digests, np.uint64), self.by_document
        trains = None if validates is None else ~validates
        if validates is None:
            ends = np.cumsum(np.frombuffer(self.survey.characters, np.uint64))
            trains = ends <= self.boundary
            validates = ends - np.frombuffer(self.survey.characters, np.uint64) >= self.boundary
        return int(np.isin(digests[validates], digests[trains]).sum()), int(validates.sum())


@dataclass(frozen=True)
class CorpusText:
    """The text that a new tokenizer is made from (tokenizer/base.py: TrainingText)."""

    corpora: Mapping[str, Corpus]
    split: Split
    survey: ScanResult

    @property
    def characters(self) -> str:
        """Every different character of the whole text, in order of code point."""
        return tokenizers.characters(self.survey.seen)

    @property
    def documents(self) -> int:
        """Number of documents in the whole text."""
        return len(self.survey.characters)

    def sample(self) -> bytes:
        """Chunks of the training split in UTF-8, about SAMPLE_BYTES of them, evenly spread.

        The byte 0xFF stands between them: chunks that are neighbors in the sample are none in the text.
        """
        total = self.survey.total  # in characters, a little less than bytes: the sample is the larger
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
