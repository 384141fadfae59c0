"""Inspect a prepared data folder: counts, frequent tokens, document lengths, an excerpt, a picture.

Run:    nanogpt data info my_data
Writes: info.png in the folder, if it can be written. Compares the token files with their checksums, and reads
        them part by part, through memory maps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from nanogpt.data.config import InspectConfig
from nanogpt.data.dataset import Dataset, load_dataset
from nanogpt.data.vocab_file import SPLITS
from nanogpt.errors import UserError
from nanogpt.storage.files import atomic_write
from nanogpt.terminal.console import new_figure, progress_bar, say, terminal, warn
from nanogpt.units import plural

TOKENS_PER_READ = 1 << 24
"""Tokens to read at a time."""

FREQUENT, EXCERPT = 20, 400
"""Number of frequent tokens in the list, and of tokens in the excerpt."""

BINS = 40

PERCENTILES = {"shortest": 0, "lower quarter": 25, "median": 50, "upper quarter": 75, "longest": 100}


@dataclass(frozen=True)
class TokenCounts:
    """Counts of tokens. frequencies: of each id, (V,). lengths: of each document, without its end token."""

    frequencies: NDArray[np.int64]
    lengths: NDArray[np.int64]


def main(config: InspectConfig) -> int:
    """Print the description of a data folder and draw its picture. Returns the exit code."""
    folder = Path(config.data_dir)
    dataset = open_verified(folder)
    counts = count_tokens(dataset)
    for line in summary(dataset):
        say(line)
    show_documents(counts)
    show_frequent(dataset, counts)
    say()
    say("The validation split begins:")
    excerpt = dataset.tokenizer.decode(dataset.val[:EXCERPT].tolist())
    say("    " + excerpt.strip("\n").replace("\n", "\n    "), style="dim")
    path = folder / "info.png"
    try:
        draw_histograms(counts, path)
    except UserError as error:  # the folder may be read-only
        warn(f"No picture: {error}")
    else:
        say(f"Picture: {path}")
    return 0


def open_verified(folder: Path) -> Dataset:
    """Open the data set, and compare every byte with the checksums."""
    size = sum(path.stat().st_size for path in folder.glob("*.pt") if path.is_file())
    with progress_bar("Verifying", size_in_bytes=True) as bar:
        task = bar.add_task("", total=size, detail="")
        return load_dataset(folder, verify_bytes=None, advance=partial(bar.advance, task))


def summary(dataset: Dataset) -> Iterator[str]:
    """The lines of the description."""
    tokenizer, tokens = dataset.tokenizer, len(dataset.train) + len(dataset.val)
    yield f"Tokenizer: {tokenizer.kind}, vocabulary of {tokenizer.vocab_size:,}"
    yield f"Tokens: {len(dataset.train):,} to train on, {len(dataset.val):,} to validate, {dataset.val.dtype}"
    if dataset.characters is not None and dataset.bytes is not None:
        yield (
            f"Text: {dataset.characters:,} characters, {dataset.bytes:,} bytes of UTF-8; a token is "
            f"{dataset.characters / tokens:.2f} characters, {dataset.bytes / tokens:.2f} bytes"
        )
    if dataset.counted is not None:
        counted = sum(dataset.counted.values())
        yield f"Loss: on completions alone, {counted:,} of the tokens ({counted / tokens:.0%})"
    yield f"Fingerprint: {dataset.fingerprint}"
    if not dataset.sealed:
        yield "Checksums: none, it was prepared by an earlier version (data.py --overwrite adds them)"


def count_tokens(dataset: Dataset) -> TokenCounts:
    """Count the tokens of both splits."""
    V, end = dataset.tokenizer.vocab_size, dataset.tokenizer.end_of_text
    frequencies = np.zeros(V, np.int64)
    lengths: list[NDArray[np.int64]] = []
    with progress_bar("Counting") as bar:
        task = bar.add_task("", total=len(dataset.train) + len(dataset.val), detail="")
        for split in (dataset.train, dataset.val):
            ends = [np.array([-1])]
            for first in range(0, len(split), TOKENS_PER_READ):
                part = split[first : first + TOKENS_PER_READ]
                frequencies += np.bincount(part, minlength=V)
                if end is not None:
                    ends.append(first + np.flatnonzero(part == end))
                bar.advance(task, len(part))
            if int(split[-1]) != end:  # the last document is cut by the split, or is the only one
                ends.append(np.array([len(split)]))
            lengths.append(np.diff(np.concatenate(ends)) - 1)
    return TokenCounts(frequencies, np.concatenate(lengths))


def show_documents(counts: TokenCounts) -> None:
    """Print percentiles of the document lengths."""
    if len(counts.lengths) > len(SPLITS):
        values = np.percentile(counts.lengths, list(PERCENTILES.values()))
        parts = (f"{name} {value:,.0f}" for name, value in zip(PERCENTILES, values, strict=True))
        say(f"Documents: {len(counts.lengths):,}; in tokens: {', '.join(parts)}")


def show_frequent(dataset: Dataset, counts: TokenCounts) -> None:
    """Print a table of the most frequent tokens, and how many tokens never occur."""
    total = counts.frequencies.sum()
    table = Table("token", "id", "times", "share", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for i in map(int, np.argsort(-counts.frequencies, kind="stable")[:FREQUENT]):
        times = int(counts.frequencies[i])
        if times:
            shown = repr(dataset.tokenizer.tokens[i].decode("utf-8", "backslashreplace"))
            table.add_row(shown, str(i), f"{times:,}", f"{times / total:.2%}")
    say()
    terminal().print(table, markup=False)
    unused = int((counts.frequencies == 0).sum())
    if unused:
        say(f"Never used: {unused:,} of {len(counts.frequencies):,} tokens")


def draw_histograms(counts: TokenCounts, path: Path) -> None:
    """Draw a histogram of document lengths, and the frequencies of the tokens by rank."""
    figure = new_figure(10, 4)
    documents, tokens = figure.subplots(1, 2)
    lengths = np.maximum(counts.lengths, 1)
    low, high = float(np.log10(lengths.min())), float(np.log10(lengths.max() + 1))
    edges = [10 ** (low + (high - low) * i / BINS) for i in range(BINS + 1)]
    documents.hist(lengths, bins=edges, color="tab:blue")
    documents.set(xscale="log", xlabel="tokens in a document", ylabel="documents")
    documents.set_title(f"{len(lengths):,} documents" if len(lengths) > len(SPLITS) else "One document")
    sorted_down = np.sort(counts.frequencies)[::-1]
    used: NDArray[Any] = sorted_down[sorted_down > 0]
    tokens.plot(np.arange(1, len(used) + 1), used, color="tab:orange")
    tokens.set(xscale="log", yscale="log", xlabel="rank of the token", ylabel="times it occurs")
    tokens.set_title(plural(len(used), "different token"))
    for axes in (documents, tokens):
        axes.grid(alpha=0.3)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
