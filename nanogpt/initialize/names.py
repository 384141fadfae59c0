"""From the names that other programs have for the weights of a GPT to ours.

Example: weights = to_our_names(GPT2, config, tensors, "gpt2")      # model/foreign_names.py has the tables
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nanogpt.config import GPTConfig
from nanogpt.initialize.source import refuse, to_float32
from nanogpt.model.foreign_names import Names, foreign_names
from nanogpt.model.size import meta_model


def to_our_names(
    names: Names, config: GPTConfig, tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """All weights of a model by our names, in float32, without a head that is tied.

    tensors: by the names in the table, each in the layout of nn.Linear, (out, in).
    Raises: UserError that lists every tensor that is missing, unknown, or of another shape.
    """
    left, found, problems = dict(tensors), dict[str, Tensor](), list[str]()
    for name, expected in meta_model(config).state_dict().items():
        parts = {theirs: left.pop(theirs, None) for theirs in foreign_names(names, name)}
        if config.tied and name == "head.weight":  # the embedding again, if it is there at all
            continue
        problems += [f"{theirs} is missing" for theirs, part in parts.items() if part is None]
        there = [part for part in parts.values() if part is not None]
        if len(there) < len(parts):
            continue
        if sum(len(part) for part in there) != len(expected) or there[0].shape[1:] != expected.shape[1:]:
            shapes = " and ".join(str(tuple(part.shape)) for part in there)
            problems.append(f"{' and '.join(parts)} is of shape {shapes}, not {tuple(expected.shape)}")
            continue
        found[name] = there[0] if len(there) == 1 else torch.cat(there)
    refuse(source, [*problems, *(f"{theirs} is unknown" for theirs in left)])
    return to_float32(found)
