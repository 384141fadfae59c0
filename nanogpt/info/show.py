"""Descriptions and differences as lines of at most 80 columns.

Example: for line in lines(describe(path)): say(line)
"""

import math
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.export.source import Evaluation
from nanogpt.info.curve import ASCII_BARS, BARS, sparkline
from nanogpt.info.description import Description, TokenizerFacts
from nanogpt.info.difference import LABELS, Difference, WeightDifference, only_in_first
from nanogpt.tokenizer.base import CharTokenizer
from nanogpt.units import duration, plural, size

WIDTH, LABEL = 80, 14
"""Columns of a line, and of the label that begins it."""

MAX_TOKENS, MAX_WEIGHTS, MAX_VALUE = 20, 15, 30
"""Tokens, weights, and characters of a value that are shown."""

BEFORE_UNIT, NO_BREAK = re.compile(r"(?<=\d) (?=(?:bytes?|[kMGT]B)\b)"), "\u00a0"
"""The space between a number and its unit, where no line ends; and what stands for it meanwhile."""


def labelled(label: str, text: str) -> Iterator[str]:
    """A text behind its label, on as many lines as it needs."""
    text = BEFORE_UNIT.sub(NO_BREAK, text)
    wrapped = textwrap.wrap(text, WIDTH - LABEL, break_on_hyphens=False, break_long_words=False) or [""]
    for number, line in enumerate(wrapped):
        yield f"{'' if number else label:{LABEL}}{line.replace(NO_BREAK, ' ')}"


def lines(one: Description, *, ascii_only: bool = False) -> Iterator[str]:
    """The lines of a description. ascii_only: for a terminal that shows nothing else."""
    version = f", {one.version}" if one.version else ""
    yield f"{one.path}: {one.kind}, {size(sum(one.sizes.values()))}{version}"
    yield from model_lines(one)
    if one.tokenizer:
        yield from tokenizer_lines(one.tokenizer)
    if one.data.get("fingerprint"):
        yield from data_lines(one.data)
    if one.progress:
        yield from progress_lines(one)
    if len(one.curve) > 1:
        yield from labelled("Curve", curve_text(one.curve, ASCII_BARS if ascii_only else BARS))
    if one.recipe:
        for number, line in enumerate(wrap_command(one.recipe, WIDTH - LABEL)):
            yield f"{'' if number else 'Recipe':{LABEL}}{line}"
    for label, text in one.notes.items():
        yield from labelled(label, text)
    if len(one.sizes) > 1:
        parts = (f"{name} {size(count)}" for name, count in one.sizes.items() if count)
        yield from labelled("Sizes", ", ".join(parts))


def model_lines(one: Description) -> Iterator[str]:
    """The architecture, and the types of the weights."""
    if one.model:
        count = f"{one.parameters:,} parameters: " if one.parameters is not None else ""
        yield from labelled("Model", count + one.model)
    if changed := changed_shape(one):
        yield from labelled("", changed)
    if one.dtypes:
        counts = ", ".join(f"{count:,} in {name}" for name, count in one.dtypes.items())
        yield from labelled("Weights", counts)


def changed_shape(one: Description) -> str:
    """What of an architecture of ours is not the default, as settings; nothing of another program's."""
    if not {field.name for field in fields(GPTConfig)} <= one.config.keys():
        return ""
    default = TrainConfig()
    counts = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")  # in the words before
    names = [name for name in one.config if hasattr(default, name) and name not in counts]
    changed = [name for name in names if one.config[name] != getattr(default, name)]
    return ", ".join(f"{name} {one.config[name]}" for name in changed)


def tokenizer_lines(tokenizer: TokenizerFacts) -> Iterator[str]:
    """A tokenizer, and the first of its characters, if these are its tokens."""
    yield from labelled("Tokenizer", f"{tokenizer.kind}, {tokenizer.vocab_size:,} {tokenizer.unit}")
    if tokenizer.kind == CharTokenizer.kind and tokenizer.tokens is not None:
        chars = [token for i, token in enumerate(tokenizer.tokens) if i != tokenizer.end_of_text]
        shown = repr(b"".join(chars).decode("utf-8", "replace"))
        is_long = len(shown) > WIDTH - LABEL
        yield " " * LABEL + (f"{shown[: WIDTH - LABEL - 3]}..." if is_long else shown)


def data_lines(data: Mapping[str, Any]) -> Iterator[str]:
    """The fingerprint of the data, and whether its folder still has them."""
    yield from labelled("Data", str(data["fingerprint"]))
    if "folder" in data:
        states = {True: "has them", False: "has other data now", None: "is not there, or has no data"}
        yield from labelled("", f"the folder {data['folder']} {states[data['folder_has_it']]}")


def progress_lines(one: Description) -> Iterator[str]:
    """How far a training is, and its losses."""
    progress, step = one.progress, one.progress.get("step")
    parts: list[str] = []
    if step is not None:
        planned = one.training.max_iters if one.training else step
        parts.append(f"step {step:,}" + (f" of {planned:,}" if step < planned else ""))
    if progress.get("elapsed_s"):
        parts.append(f"{duration(progress['elapsed_s'])} of training")
    if "device" in progress:
        parts.append(f"on {progress['device']} in {progress.get('dtype')}")
    if "threads" in progress and "torch" in progress:
        parts.append(f"{plural(progress['threads'], 'thread')}, PyTorch {progress['torch']}")
    if parts:
        yield from labelled("Training", ", ".join(parts))
    loss = progress.get("best_val_loss")
    if loss is not None and loss < float("inf"):
        bits = next((point.bits_per_byte for point in one.curve if point.loss == loss), None)
        more = f", {bits:.4f} bits a byte" if bits else ""
        yield from labelled("Loss", f"{loss:.4f} nats a token at best, over the validation split{more}")


def curve_text(curve: Sequence[Evaluation], bars: str) -> str:
    """The validation losses as a line of bars, between the first and the last."""
    losses = [point.loss for point in curve]
    first, last = f"{losses[0]:.2f} ", f" {losses[-1]:.2f}"
    return first + sparkline(losses, WIDTH - LABEL - len(first + last), bars) + last


def wrap_command(command: str, width: int) -> list[str]:
    """A command on lines that a shell joins again."""
    wrapped = [""]
    for word in map(shlex.quote, shlex.split(command)):
        if wrapped[-1] and len(wrapped[-1]) + len(word) + 3 > width:
            wrapped[-1] += " \\"
            wrapped.append(f"  {word}")
        else:
            wrapped[-1] += f" {word}" if wrapped[-1] else word
    return wrapped


# --- differences ---


def difference_lines(a: Description, b: Description, found: Difference) -> Iterator[str]:
    """The lines of a comparison."""
    for label, one in zip(LABELS, (a, b), strict=True):
        yield from labelled(label, f"{one.path}: {one.kind}, {size(sum(one.sizes.values()))}")
    for section, values in found.settings.items():
        if not values:
            yield from labelled(section.capitalize(), "equal")
        for number, (name, (one, two)) in enumerate(values.items()):
            label = "" if number else section.capitalize()
            yield from labelled(label, f"{name}: {show(one)} in A, {show(two)} in B")
    for section, why in found.missing.items():
        yield from labelled(section.capitalize(), f"not compared: {why}")
    for label, one, two in ((LABELS[0], a, b), (LABELS[1], b, a)):
        if tokens := only_in_first(one.tokenizer, two.tokenizer):
            shown = " ".join(repr(token.decode("utf-8", "replace")) for token in tokens[:MAX_TOKENS])
            more = f" and {len(tokens) - MAX_TOKENS:,} more" if len(tokens) > MAX_TOKENS else ""
            yield from labelled(f"Only in {label}", f"{plural(len(tokens), 'token')}: {shown}{more}")
    if found.weights:
        yield from weight_lines(found.weights)


def show(value: Any) -> str:
    """A value, shortened."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."


def weight_lines(weights: Sequence[WeightDifference]) -> Iterator[str]:
    """What differs in the weights: their number, and those that differ most."""
    differing = [one for one in weights if one.status != "equal"]
    count = plural(len(weights), "tensor")
    if not differing:
        yield from labelled("Weights", f"{count}, all equal")
        return
    yield from labelled("Weights", f"{count}, {len(differing):,} not equal; the largest difference first:")
    differing.sort(key=lambda one: (one.status == "different", one.largest >= 0, -one.largest))
    for one in differing[:MAX_WEIGHTS]:
        yield f"  {one.name:<36} {weight_text(one)}"
    if len(differing) > MAX_WEIGHTS:
        yield f"  and {len(differing) - MAX_WEIGHTS:,} more (--json has all)"


def weight_text(one: WeightDifference) -> str:
    """What differs in one weight, in words."""
    if one.shapes:
        return f"of shape {one.shapes[0]} and {one.shapes[1]}"
    if one.status != "different":
        return one.status
    share = f", {one.relative:.2%} of A's norm" if math.isfinite(one.relative) else ""
    return f"{one.largest:.3g} at most{share}"
