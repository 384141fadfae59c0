"""The `eval` command: the loss of a checkpoint on any text, and its difference to that of another one.

Run:    nanogpt eval --checkpoint out/ckpt.pt --input_file novel.txt --stride 64
        nanogpt eval --checkpoint small/ckpt.pt --against large/ckpt.pt --input_file novel.txt --json
        nanogpt eval --split val                        the loss that training printed
The result goes to standard output, everything else to standard error. scoring.py computes it.
"""

import io
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from nanogpt.checkpoint.format import build_model, load_checkpoint
from nanogpt.cli.config import EvaluateConfig
from nanogpt.cli.sample import find_checkpoint
from nanogpt.data.config import first_few
from nanogpt.data.dataset import Dataset, load_dataset
from nanogpt.errors import UserError, require
from nanogpt.machine.device import explain_out_of_memory, pick_device
from nanogpt.machine.precision import pick_sampling_dtype
from nanogpt.model.gpt import GPT
from nanogpt.model.quantize import quantize
from nanogpt.scoring import (
    MIN_SEGMENTS,
    Difference,
    EncodedText,
    Score,
    compare,
    decode_documents,
    encode_documents,
    interval_of,
    leave_out_unknown,
    score,
    token_lengths,
    token_sizes,
    window_sizes,
)
from nanogpt.storage.files import atomic_write
from nanogpt.terminal.console import late_progress_bar, new_figure, say, warn
from nanogpt.text.archives import read_file
from nanogpt.text.corpus import find_corpus
from nanogpt.text.documents import Chunk, SkipReport, first_of_each_kind
from nanogpt.text.records import Source
from nanogpt.text.speakers import require_known
from nanogpt.tokenizer.base import Tokenizer, describe_character
from nanogpt.units import plural

MAX_SHOWN = 5
"""Notes, broken records and unknown characters that are shown."""

LABELS = ("A", "B")
"""Names of --checkpoint and --against in the lines of a comparison."""

COLORS = (("#9ecae1", "#d94801"), ("#c7e9c0", "#238b45"))
"""Colors of A and of B: the loss at each position, and its mean over an octave."""


@dataclass(frozen=True)
class Subject:
    """A loaded checkpoint. dtype: of the matrix products. context, stride: its windows."""

    path: Path
    model: GPT
    tokenizer: Tokenizer
    dtype: torch.dtype
    context: int
    stride: int


def main(config: EvaluateConfig) -> int:
    """Evaluate one checkpoint or two, and print the result. Returns the exit code."""
    picture = None if config.picture is None else Path(config.picture)
    require(picture is None or not picture.exists(), f"--picture {picture} exists already: give another name")
    with explain_out_of_memory():
        subjects = [load_subject(config, "--checkpoint", config.checkpoint)]
        if config.against is not None:
            subjects.append(load_subject(config, "--against", config.against))
        texts, unknown = encode_text(config, [subject.tokenizer for subject in subjects])
        scores = score_all(subjects, texts, shows_bar=not config.json)
    difference = compare(scores[0], scores[1]) if len(scores) > 1 else None
    if config.json:
        print(json.dumps(result(subjects, scores, unknown, difference), allow_nan=False))
    else:
        for line in report(subjects, scores, difference):
            say(line)
    if picture is not None:
        draw(scores, picture)
        (warn if config.json else say)(f"Picture: {picture}")
    return 0


def load_subject(config: EvaluateConfig, flag: str, name: str) -> Subject:
    """Load a checkpoint. Raises: UserError if it is missing or damaged, or the windows do not fit."""
    path = find_checkpoint(Path(name), flag, "Evaluating")
    device, saved = pick_device(config.device), load_checkpoint(path)
    model, tokenizer = build_model(saved, device)
    dtype = pick_sampling_dtype(config.dtype, device, str(saved.precision["dtype"]))
    if config.quantize != "none" and flag == "--checkpoint":
        quantize(model, config.quantize)
    return Subject(path, model, tokenizer, dtype, *window_sizes(model, config.context, config.stride))


def score_all(subjects: list[Subject], texts: list[EncodedText], *, shows_bar: bool) -> list[Score]:
    """Score the text with each model."""
    scores: list[Score] = []
    total = sum(len(text.ids) - 1 for text in texts)
    with late_progress_bar("Evaluating", total, enabled=shows_bar) as advance:
        for one, text in zip(subjects, texts, strict=True):
            sizes = one.context, one.stride
            losses = score(one.model, text.ids, *sizes, dtype=one.dtype, advance=advance)
            scores.append(Score.of(text, losses, *sizes))
    return scores


# --- text ---


def encode_text(
    config: EvaluateConfig, tokenizers: list[Tokenizer]
) -> tuple[list[EncodedText], Counter[str]]:
    """Encode the text with each tokenizer, and count the characters that were left out of it for all.

    Raises: UserError if there is no text, too little of it, or an unknown character that is not skipped.
    """
    prepared: dict[int, EncodedText] = {}
    chunks: list[Chunk] = []
    if config.input_file:
        name = f"--input_file {first_few(config.input_file)}"
        chunks = read_documents(config, name)
    else:
        split = config.split or "val"
        name = f"the {split} split of {config.data_dir}"
        dataset = load_dataset(Path(config.data_dir))
        text, of = open_split(dataset, split), dataset.tokenizer.to_dict()
        prepared = {i: text for i, tokenizer in enumerate(tokenizers) if tokenizer.to_dict() == of}
        if len(prepared) < len(tokenizers):
            advice = "which may change the text: give the text itself, by --input_file"
            require(
                dataset.tokenizer.keeps_text,
                f"--data_dir {config.data_dir} has tokens of a tokenizer.json, {advice}",
            )
            chunks = decode_documents(dataset.tokenizer, text)
    chunks, unknown = leave_out_unknown(chunks, tokenizers)
    if unknown:
        prepared = {}
        says = f"{plural(unknown.total(), 'character')} that the model has never seen: {names(unknown)}"
        require(config.unknown == "skip", f"{name} has {says}: give --unknown skip to leave them out")
        warn(f"Left out of {name}: {says}")
    texts = [prepared.get(i) or encode_documents(tokenizer, chunks) for i, tokenizer in enumerate(tokenizers)]
    for text in texts:
        count = plural(len(text.ids), "token")
        require(text.sizes[1:].sum() > 0, f"{name} is too short ({count}): there is nothing to predict")
    return texts, unknown


def read_documents(config: EvaluateConfig, name: str) -> list[Chunk]:
    """Read all documents, those of standard input last. Raises: UserError if there is no text."""
    report = SkipReport()
    chunks: list[Chunk] = []
    files = [file for file in config.input_file if file != "-"]
    if files:
        chunks += find_corpus(files, config).chunks(report)
    if len(files) < len(config.input_file):
        chunks += read_standard_input(config, report)
    require_known(config.speakers, report.used_rules, report.speakers)
    for note in first_of_each_kind(report.all_notes(config.text_field))[:MAX_SHOWN]:
        warn(note)
    for line in first_of_each_kind(report.broken)[:MAX_SHOWN]:
        warn(f"left out: {line}")
    if report.broken_count > 1:
        warn(f"Broken records or files left out: {report.broken_count:,}")
    require(bool(chunks), f"{name} is empty: give a file with text in it")
    return chunks


def read_standard_input(config: EvaluateConfig, report: SkipReport) -> Iterator[Chunk]:
    """The documents in standard input. Raises: UserError if it cannot be read."""
    if sys.stdin.isatty():
        warn("Type the text, then press Ctrl-D on a new line")
    try:
        raw = io.BytesIO(sys.stdin.buffer.read())
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(f"--input_file - cannot be read: {reason}") from error
    file = cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, raw)))
    return read_file(Source(file, "-", "-", report, config))


def open_split(dataset: Dataset, split: str) -> EncodedText:
    """The tokens of a prepared split; of pairs, with what counts of them."""
    ids = {"train": dataset.train, "val": dataset.val}[split][:]
    mask = {"train": dataset.train_mask, "val": dataset.val_mask}[split]
    lengths, total = token_lengths(dataset.tokenizer), dataset.val_bytes
    if mask is not None and dataset.counted_bytes is not None:
        counted, sizes = mask[:].astype(np.bool_), np.zeros(len(ids), np.int64)
        sizes[counted] = token_sizes(lengths, ids[counted], dataset.counted_bytes[split])
        return EncodedText(ids, sizes, counted)
    if split == "train" and dataset.bytes is not None and total is not None:
        total = dataset.bytes - total
    return EncodedText(ids, token_sizes(lengths, ids, total), np.ones(len(ids), np.bool_))


def names(characters: Counter[str]) -> str:
    """The most frequent of these characters, each with its count."""
    shown = [f"{count:,} x {describe_character(char)}" for char, count in characters.most_common(MAX_SHOWN)]
    return ", ".join([*shown, *(["..."] if len(characters) > MAX_SHOWN else [])])


# --- results ---


def report(subjects: list[Subject], scores: list[Score], difference: Difference | None) -> Iterator[str]:
    """The lines of the result."""
    for label, one, of in zip(LABELS, subjects, scores, strict=False):
        if difference is not None:
            yield f"{label}: {one.path}"
        which = "" if of.count == len(of.losses) else " of completions"
        yield (
            f"Text: {of.count:,} tokens{which}, {of.bytes:,} bytes, "
            f"in windows of {of.context:,} tokens that move by {of.stride:,}"
        )
        yield (
            f"Loss: {of.loss:.4f} nats a token, perplexity {of.perplexity:.5g}, "
            f"{of.bits_per_byte:.4f} bits a byte"
        )
        octaves = of.loss_by_octave().items()
        yield "Loss by tokens of context: " + ", ".join(
            f"{first}-{last}: {loss:.3f}" if first < last else f"{first}: {loss:.3f}"
            for (first, last), loss in octaves
        )
    if difference is not None:
        yield verdict(difference)
    else:
        low, high, segments = interval_of(scores[0])
        if math.isfinite(high - low):
            yield f"Between {low:.4f} and {high:.4f} bits a byte (95 %, {segments} segments of such a text)"


def verdict(difference: Difference) -> str:
    """Which of two checkpoints is better, and by how much; or that this cannot be told."""
    mean, half = difference.mean, (difference.high - difference.low) / 2
    segments = plural(difference.segments, "segment")
    if difference.segments < MIN_SEGMENTS:
        return f"No difference can be told: the text has {segments} to compare, too few for an interval"
    if not difference.is_told:
        return f"No difference can be told: {mean:+.4f} +- {half:.4f} bits a byte ({segments})"
    better = LABELS[1] if mean > 0 else LABELS[0]
    return f"{better} is better by {abs(mean):.4f} +- {half:.4f} bits a byte (95 %, {segments})"


def result(
    subjects: list[Subject], scores: list[Score], unknown: Counter[str], difference: Difference | None
) -> dict[str, Any]:
    """The result as JSON has it."""
    first, *others = [summary(one, of) for one, of in zip(subjects, scores, strict=True)]
    first["left_out"] = dict(unknown.most_common())
    if difference is None:
        low, high, segments = interval_of(scores[0])
        first["interval"] = {"low": finite(low), "high": finite(high), "segments": segments}
    else:
        first["against"] = others[0]
        first["difference"] = {
            "bits_per_byte": finite(difference.mean),
            "low": finite(difference.low),
            "high": finite(difference.high),
            "segments": difference.segments,
            "better": ("against" if difference.mean > 0 else "checkpoint") if difference.is_told else None,
        }
    return first


def summary(one: Subject, of: Score) -> dict[str, Any]:
    """The numbers of one checkpoint."""
    return {
        "checkpoint": str(one.path),
        "loss": finite(of.loss),
        "perplexity": finite(of.perplexity),
        "bits_per_byte": finite(of.bits_per_byte),
        "tokens": of.count,
        "bytes": of.bytes,
        "context": of.context,
        "stride": of.stride,
        "loss_by_position": [finite(loss) for loss in of.loss_by_position().tolist()],
    }


def finite(number: float) -> float | None:
    """A number, or None, as JSON has neither infinity nor NaN."""
    return number if math.isfinite(number) else None


def draw(scores: list[Score], path: Path) -> None:
    """Draw the loss by position in the context. Raises: UserError if the picture cannot be written."""
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    for label, of, (pale, strong) in zip(LABELS, scores, COLORS, strict=False):
        octaves = of.loss_by_octave()
        centers = [math.sqrt(first * last) for first, last in octaves]
        axes.plot(np.arange(1, of.context + 1), of.loss_by_position(), color=pale, linewidth=1)
        axes.plot(centers, list(octaves.values()), color=strong, marker="o", markersize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    if len(scores) > 1:
        axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
