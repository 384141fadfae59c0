"""Presets: a name for a complete configuration, and what it has been seen to do.

Run:    nanogpt presets                                    lists them
        python train.py --preset cpu --max_iters 500       flags change what the preset says
Order:  defaults < preset < flags. To add one, write a function and put it in PRESETS, below.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from nanogpt.config import TrainConfig
from nanogpt.errors import UserError


def quick(config: TrainConfig) -> TrainConfig:
    """Muon, a rate that starts high and ends at nothing, and no defence against overfitting."""
    return replace(
        config,
        dropout=0.0,
        optimizer="muon",
        muon_lr=0.03,
        schedule="trapezoid",
        warmup_iters=0,
        min_lr=0.0,
        weight_decay=0.0,
    )


def modern(config: TrainConfig) -> TrainConfig:
    """The block and the optimizer that learn fastest on little data, in bfloat16 or float32."""
    return replace(
        quick(config),
        norm="rmsnorm",
        positions="rope",
        mlp="relu2",
        bias=False,
        qk_norm=True,
        tied=False,
        zero_init=True,
        logit_cap=15.0,
        ngram_vocab=16384,
    )


def speedrun() -> TrainConfig:
    """One layer, 45 updates."""
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


def classic() -> TrainConfig:
    """GPT-2's blocks in the size of nanoGPT's recipe for a laptop, with Muon for AdamW."""
    return quick(
        TrainConfig(
            preset="classic",
            block_size=64,
            n_layer=4,
            n_head=4,
            n_embd=128,
            batch_size=24,
            max_iters=290,
            learning_rate=3e-2,
            cooldown=0.7,
            beta1=0.8,
            beta2=0.95,
            eval_interval=145,
        )
    )


def cpu() -> TrainConfig:
    """A modern model for a laptop."""
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


def qwen3() -> TrainConfig:
    """The blocks of Qwen3 (with a RoPE base of 10,000), which other programs can run; layers as in `cpu`."""
    return replace(
        cpu(),
        preset="qwen3",
        n_kv_head=2,
        mlp="swiglu",
        logit_cap=0.0,
        ngram_vocab=0,
        learning_rate=1e-2,
        beta1=0.8,
    )


def shakespeare() -> TrainConfig:
    """The default model, unchanged, with Muon, a schedule that ends at nothing, and averaged weights."""
    return TrainConfig(
        preset="shakespeare",
        max_iters=1000,
        optimizer="muon",
        learning_rate=3e-3,
        muon_lr=0.02,
        schedule="trapezoid",
        cooldown=0.7,
        warmup_iters=20,
        min_lr=0.0,
        beta2=0.95,
        ema_decay=0.98,
        eval_interval=100,
    )


def best() -> TrainConfig:
    """The lowest loss on Tiny Shakespeare from at most 11 million parameters.

    Seven epochs, against which dropout, weight decay and averaged weights help.
    """
    return replace(
        cpu(),
        preset="best",
        block_size=256,
        n_layer=5,
        n_embd=256,
        ngram_vocab=13_000,
        dropout=0.2,
        weight_decay=0.1,
        ema_decay=0.99,
        max_iters=1715,
        eval_interval=245,
    )


def bpe() -> TrainConfig:
    """A modern model for pieces of words: a vocabulary of some thousands, ten megabytes of text or more."""
    return replace(
        cpu(),
        preset="bpe",
        block_size=256,
        n_embd=256,
        max_iters=600,
    )


def gpt2() -> TrainConfig:
    """GPT-2 124 M to the letter, for 10 billion tokens; made for a vocabulary of 50,257 and a large GPU."""
    return TrainConfig(
        preset="gpt2",
        block_size=1024,
        n_layer=12,
        n_head=12,
        n_embd=768,
        dropout=0.0,
        mlp="gelu_tanh",
        batch_size=480,
        gradient_accumulation_steps=15,
        max_iters=20_000,
        learning_rate=6e-4,
        warmup_iters=700,
        min_lr=0.1,
        beta2=0.95,
        eval_interval=500,
        eval_iters=20,
    )


@dataclass(frozen=True)
class Preset:
    """A recipe and what is known of it."""

    make: Callable[[], TrainConfig]
    purpose: str
    loss: str = ""
    """Validation loss on Tiny Shakespeare, nats a character over the whole split; empty: not measured."""
    time: str = ""
    """Training time to that loss on MACHINE."""
    vocab_size: int = 65
    """The vocabulary it is meant for."""


MACHINE = "2 CPU cores (AVX-512)"

PRESETS = {
    "speedrun": Preset(speedrun, "seconds to nanoGPT's laptop loss", "1.85", "2 s"),
    "classic": Preset(classic, "nanoGPT's laptop model, GPT-2's blocks", "1.86", "19 s"),
    "cpu": Preset(cpu, "a coffee's worth of training on a laptop", "1.54", "95 s"),
    "qwen3": Preset(qwen3, "blocks that other programs can run", "1.59", "86 s"),
    "best": Preset(best, "the lowest loss from at most 11 million parameters", "1.46", "33 min"),
    "bpe": Preset(bpe, "a text of megabytes, --tokenizer bpe", vocab_size=4096),
    "shakespeare": Preset(shakespeare, "the default model, made for a GPU"),
    "gpt2": Preset(gpt2, "GPT-2 124 M, made for a large GPU and a text of gigabytes", vocab_size=50_257),
}


def get(name: str) -> TrainConfig:
    """The configuration called `name`. Errors: UserError if there is none."""
    if name not in PRESETS:
        raise UserError(f"--preset {name} does not exist: choose one of {', '.join(PRESETS)}")
    return PRESETS[name].make()
