"""The grid of a sweep: every combination of the values of --vary, as one training each.

Example: trials(TrainConfig(out_dir="sweep"), {"learning_rate": {"1e-3": 1e-3, "3e-3": 3e-3}})
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from nanogpt.config import TrainConfig
from nanogpt.errors import require

NOT_VARIED = ("data_dir", "out_dir", "resume", "overwrite", "preset", "fixed")
"""Settings that are one for all runs of a sweep, or that the sweep itself sets."""


@dataclass(frozen=True)
class Trial:
    """One training of a sweep. Its name is that of its folder: learning_rate=1e-3,seed=1."""

    name: str
    config: TrainConfig


def parse_vary(text: str) -> tuple[str, list[str]]:
    """Split `name=value,value` into its name and values. Raises: UserError."""
    name, _, values = text.partition("=")
    name, found = name.strip().lstrip("-").replace("-", "_"), [value.strip() for value in values.split(",")]
    known = {field.name for field in fields(TrainConfig)} - {*NOT_VARIED}
    require(all(found), f"--vary {text} has an empty value: write it as learning_rate=1e-3,3e-3")
    require(
        name in known, f"--vary {name}: there is no such setting to vary; nanogpt train --help lists them"
    )
    require(len(set(found)) == len(found), f"--vary {text} has a value twice: leave one out")
    return name, found


def trials(base: TrainConfig, varied: Mapping[str, Mapping[str, Any]]) -> list[Trial]:
    """One training for each combination of values, in a folder of its own within base.out_dir.

    varied: setting -> its values, each under the text that stands for it in the name of the folder.
    Raises: UserError if a combination cannot work.
    """
    made: list[Trial] = []
    fixed = (*base.fixed, *varied) if base.minutes else ()  # or --minutes would choose what is varied
    for texts in product(*varied.values()):
        chosen = dict(zip(varied, texts, strict=True))
        name = re.sub(r"[^\w.+=,-]", "_", ",".join(f"{key}={text}" for key, text in chosen.items()))
        settings = {key: varied[key][text] for key, text in chosen.items()}
        out_dir = str(Path(base.out_dir) / name)
        made.append(Trial(name, replace(base, **settings, preset=None, fixed=fixed, out_dir=out_dir)))
    require(len({trial.name for trial in made}) == len(made), "two values of --vary give folders of one name")
    return made
