"""Presets: a name for a complete configuration.

Use:    python train.py --preset cpu --max_iters 500      (flags change what the preset says)
Order:  defaults < preset < flags. To add one, write a function and put it in the table below.
"""

from collections.abc import Callable
from dataclasses import replace

from nanogpt.config import TrainConfig, UserError


def modern(config: TrainConfig) -> TrainConfig:
    """The block and the optimizer that learn fastest on little data, in bfloat16 or float32."""
    return replace(
        config,
        norm="rmsnorm",
        positions="rope",
        mlp="relu2",
        bias=False,
        qk_norm=True,
        tied=False,
        zero_init=True,
        logit_cap=15.0,
        ngram_vocab=16384,
        dropout=0.0,
        optimizer="muon",
        muon_lr=0.03,
        schedule="trapezoid",
        warmup_iters=0,
        min_lr=0.0,
        weight_decay=0.0,
    )


def cpu() -> TrainConfig:
    """A modern model for a laptop: a minute and a half on two cores to a loss of about 1.55."""
    return modern(
        TrainConfig(
            preset="cpu",
            block_size=128,
            n_layer=4,
            n_head=4,
            n_embd=192,
            batch_size=16,
            max_iters=500,
            learning_rate=3e-2,
            cooldown=0.7,
            beta1=0.6,
            beta2=0.95,
            eval_interval=100,
        )
    )


def speedrun() -> TrainConfig:
    """One layer, 45 updates: below a loss of 1.88 in about two seconds on two cores."""
    return modern(
        TrainConfig(
            preset="speedrun",
            block_size=64,
            n_layer=1,
            n_head=4,
            n_embd=128,
            mlp_width=256,
            batch_size=40,
            max_iters=45,
            learning_rate=5e-2,
            cooldown=0.9,
            beta1=0.5,
            beta2=0.9,
            eval_interval=45,
        )
    )


def shakespeare() -> TrainConfig:
    """The default 10.8 M parameter model on Tiny Shakespeare: minutes on a GPU."""
    return TrainConfig(preset="shakespeare")


PRESETS: dict[str, Callable[[], TrainConfig]] = {"cpu": cpu, "shakespeare": shakespeare, "speedrun": speedrun}


def get(name: str) -> TrainConfig:
    """The configuration called `name`. Errors: UserError if there is none."""
    if name not in PRESETS:
        raise UserError(f"--preset {name} does not exist: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()
