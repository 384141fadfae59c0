"""Presets: a name for a complete configuration.

Use:    python train.py --preset cpu --max_iters 500      (flags change what the preset says)
Order:  defaults < preset < flags. To add one, write a function and put it in the table below.
"""

from collections.abc import Callable

from nanogpt.config import TrainConfig, UserError


def cpu() -> TrainConfig:
    """A small model for a laptop: about a minute and a half on two cores to a loss below 1.88."""
    return TrainConfig(
        preset="cpu",
        block_size=64,
        n_layer=4,
        n_head=4,
        n_embd=128,
        dropout=0.0,
        batch_size=24,
        max_iters=1200,
        learning_rate=2e-3,
        min_lr=0.05,
        eval_interval=200,
    )


def shakespeare() -> TrainConfig:
    """The default 10.8 M parameter model on Tiny Shakespeare: minutes on a GPU."""
    return TrainConfig(preset="shakespeare")


PRESETS: dict[str, Callable[[], TrainConfig]] = {"cpu": cpu, "shakespeare": shakespeare}


def get(name: str) -> TrainConfig:
    """The configuration called `name`. Errors: UserError if there is none."""
    if name not in PRESETS:
        raise UserError(f"--preset {name} does not exist: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()
