"""What differs between two descriptions: settings, tokenizer, data, and the weights one by one.

Example: found = compare(describe(Path("a/ckpt.pt")), describe(Path("b/ckpt.pt"))); found.weights
Weights are read one at a time, and compared a piece at a time, in float32. Those of other programs are first
converted to ours, all of them in memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nanogpt.checkpoint.run_dir import PER_COMMAND_SETTINGS
from nanogpt.config import to_dict
from nanogpt.export.source import UNNAMED
from nanogpt.info.description import Description, TokenizerFacts, Weights, finite

PIECE = 1 << 22
"""Numbers of a weight that are compared at a time."""

SECONDS = ("elapsed_s", "used_s")
"""What of the progress is not compared: no two trainings take the same time."""

LABELS = ("A", "B")
"""Names of the two in messages."""

Status = Literal["equal", "different", "other shape", "only in A", "only in B"]


class WeightDifference(NamedTuple):
    """What differs in one weight."""

    name: str
    status: Status
    largest: float = 0.0
    """Largest difference of two numbers; NaN if one of the two is not a number."""
    relative: float = 0.0
    """Norm of the difference, as a fraction of A's norm."""
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Both shapes, if they differ."""


@dataclass(frozen=True)
class Difference:
    """What differs between A and B."""

    settings: Mapping[str, Mapping[str, tuple[Any, Any]]]
    """Section -> name -> the values of A and of B, where they differ."""
    missing: Mapping[str, str]
    """Section that cannot be compared -> why."""
    weights: list[WeightDifference]

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return {
            "settings": {
                section: {name: {"a": finite(a), "b": finite(b)} for name, (a, b) in values.items()}
                for section, values in self.settings.items()
            },
            "not_compared": dict(self.missing),
            "weights": [
                one._asdict() | {"largest": finite(one.largest), "relative": finite(one.relative)}
                for one in self.weights
            ],
        }


def compare(a: Description, b: Description, advance: Callable[[int], object] = int) -> Difference:
    """Compare two descriptions, and their weights.

    advance: called with the number of weights compared since the last call.
    Raises: UserError if weights cannot be read, or are damaged.
    """
    settings: dict[str, dict[str, tuple[Any, Any]]] = {}
    missing: dict[str, str] = {}
    of_a, of_b = sections(a), sections(b)
    for section, values in of_a.items():
        others = of_b[section]
        if not values and not others:
            continue
        if not values.keys() & others.keys():
            here = LABELS[0] if not others else LABELS[1]
            missing[section] = "in other words" if values and others else f"only {here} has it"
            continue
        is_whole = section == "architecture"  # of the others, an export keeps a part
        names = [*values, *(name for name in others if name not in values)] if is_whole else [*values]
        pairs = {name: (values.get(name), others.get(name)) for name in names if is_whole or name in others}
        settings[section] = {name: (one, two) for name, (one, two) in pairs.items() if one != two}
    weights: list[WeightDifference] = []
    lacking = [label for label, one in zip(LABELS, (a, b), strict=True) if one.weights is None]
    if a.weights and b.weights:
        weights = compare_weights(a.weights(), b.weights(), advance)
    elif len(lacking) == 1:
        missing["weights"] = f"{lacking[0]} has none that can be compared"
    return Difference(settings, missing, weights)


def sections(one: Description) -> dict[str, dict[str, Any]]:
    """The settings of a description by section. A setting of the architecture is none of the training.

    A name that an export leaves out is not compared.
    """
    training = to_dict(one.training) if one.training else {}
    return {
        "architecture": dict(one.config),
        "tokenizer": tokenizer_settings(one.tokenizer) if one.tokenizer else {},
        "data": {name: one.data.get(name) for name in ("fingerprint",) if name in one.data},
        "training": {
            name: value
            for name, value in training.items()
            if name not in one.config and name not in PER_COMMAND_SETTINGS and value != UNNAMED
        },
        "progress": {name: value for name, value in one.progress.items() if name not in SECONDS},
    }


def tokenizer_settings(tokenizer: TokenizerFacts) -> dict[str, Any]:
    """What there is to compare of a tokenizer."""
    found = {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
    }
    return {**found, "sha256": tokenizer.sha256} if tokenizer.sha256 else found


def only_in_first(a: TokenizerFacts | None, b: TokenizerFacts | None) -> list[bytes]:
    """The tokens of A that B does not have; none if the tokens of one are not known."""
    if a is None or b is None or a.tokens is None or b.tokens is None:
        return []
    others = set(b.tokens)
    return [token for token in a.tokens if token not in others]


# --- weights ---


def compare_weights(a: Weights, b: Weights, advance: Callable[[int], object]) -> list[WeightDifference]:
    """Compare weights by their names, A's order first. Raises: UserError if one cannot be read."""
    found: list[WeightDifference] = []
    in_a, in_b = set(a.names), set(b.names)
    for name in [*a.names, *(name for name in b.names if name not in in_a)]:
        if name not in in_a or name not in in_b:
            found.append(WeightDifference(name, "only in A" if name in in_a else "only in B"))
            continue
        weight = a.read(name)
        found.append(compare_tensors(name, weight, b.read(name)))
        advance(weight.numel())
    return found


def compare_tensors(name: str, a: Tensor, b: Tensor) -> WeightDifference:
    """Compare two weights number by number. A number that is NaN in both is equal."""
    if a.shape != b.shape:
        return WeightDifference(name, "other shape", shapes=(tuple(a.shape), tuple(b.shape)))
    largest = torch.zeros(())
    square, total = torch.zeros(2, dtype=torch.float64)
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for first in range(0, a.numel(), PIECE):
        x, y = (flat[first : first + PIECE].float() for flat in (flat_a, flat_b))
        same = (x == y) | (x.isnan() & y.isnan())
        difference = torch.where(same, 0.0, (x - y).abs())
        largest = torch.maximum(largest, difference.max())
        square += difference.double().square().sum()
        total += x.double().square().sum()
    if largest == 0:
        return WeightDifference(name, "equal")
    relative = (square / total).sqrt().item() if total > 0 else float("inf")
    return WeightDifference(name, "different", largest.item(), relative)
