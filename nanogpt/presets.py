"""Presets: complete training configurations by name, with their measured loss and training time.

Run:    nanogpt presets                                    lists them
        python train.py --preset cpu --max_iters 500       flags override the preset
Order:  defaults < preset < flags. To add a preset, write a function and add a row to PRESETS, below.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from nanogpt.config import TrainConfig
from nanogpt.errors import UserError


def with_muon(config: TrainConfig) -> TrainConfig:
    """Add the settings of short runs: Muon, no warm-up, a learning rate that ends at 0, no regularization."""
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


def with_modern_blocks(config: TrainConfig) -> TrainConfig:
    """Add the blocks that learn fastest on little data, and Muon."""
    return replace(
        with_muon(config),
        norm="rmsnorm",
        positions="rope",
        mlp="relu2",
        bias=False,
        qk_norm=True,
        tied=False,
        zero_init=True,
        logit_cap=15.0,
        ngram_vocab=32768,
    )


def speedrun() -> TrainConfig:
    """A model of one layer, trained for 45 updates."""
    return with_modern_blocks(
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
    """GPT-2's blocks in the size of nanoGPT's laptop model, trained with Muon instead of AdamW."""
    return with_muon(
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
    return with_modern_blocks(
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
    """A model as large as `cpu` with Qwen3's blocks (RoPE base 10,000), which other programs can run."""
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
    """The default model, trained with Muon, a learning rate that ends at 0, and an EMA of the weights."""
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

    Dropout, weight decay and an EMA of the weights limit overfitting over its seven epochs.
    """
    return replace(
        cpu(),
        preset="best",
        block_size=256,
        n_layer=5,
        n_embd=256,
        ngram_vocab=22_000,
        dropout=0.2,
        weight_decay=0.1,
        ema_decay=0.99,
        max_iters=1715,
        eval_interval=245,
    )


def bpe() -> TrainConfig:
    """A modern model for a BPE vocabulary of a few thousand tokens and at least ten megabytes of text."""
    return replace(
        cpu(),
        preset="bpe",
        block_size=256,
        n_embd=256,
        max_iters=600,
    )


def gpt2() -> TrainConfig:
    """GPT-2 124 M exactly, trained on 10 billion tokens, for a vocabulary of 50,257 and a large GPU."""
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
class Measurement:
    """Measured loss and time of a preset on Tiny Shakespeare. date: its section of bench/RESULTS.md."""

    date: str
    losses: tuple[float, ...]
    """Final validation loss of each seed, in nats per character over the full split."""
    seconds: float
    """Training time on MEASURED_ON without evaluation and saving, the median over the seeds."""

    @property
    def loss(self) -> str:
        """The mean loss, as tables show it."""
        return f"{sum(self.losses) / len(self.losses):.2f}"

    @property
    def time(self) -> str:
        """The time, as tables show it."""
        return f"{self.seconds:.0f} s" if self.seconds < 120 else f"{self.seconds / 60:.0f} min"


@dataclass(frozen=True)
class Preset:
    """A configuration, its purpose, and its measurement if there is one."""

    make: Callable[[], TrainConfig]
    purpose: str
    measured: Measurement | None = None
    vocab_size: int = 65
    """Size of the vocabulary that it is meant for."""


MEASURED_ON = "2 CPU cores (AVX-512)"

PRESETS = {
    "speedrun": Preset(
        speedrun,
        "nanoGPT's laptop loss in seconds",
        Measurement("2026-11-26", (1.8549, 1.8493, 1.8554), 0.79),
    ),
    "classic": Preset(
        classic,
        "nanoGPT's laptop model, with GPT-2's blocks",
        Measurement("2026-11-26", (1.8566, 1.8651, 1.8553), 8.8),
    ),
    "cpu": Preset(
        cpu,
        "a good model in a minute or two on a laptop",
        Measurement("2026-11-26", (1.5614, 1.5531, 1.5583), 43),
    ),
    "qwen3": Preset(
        qwen3,
        "Qwen3's blocks, which other programs can run",
        Measurement("2026-11-23, second part", (1.5946, 1.5900, 1.5889), 86),
    ),
    "best": Preset(
        best,
        "the lowest loss from at most 11 million parameters",
        Measurement("2026-11-26", (1.4494, 1.4415, 1.4412), 10 * 60),
    ),
    "bpe": Preset(bpe, "megabytes of text, prepared with --tokenizer bpe", vocab_size=4096),
    "shakespeare": Preset(shakespeare, "the default model, made for a GPU"),
    "gpt2": Preset(gpt2, "GPT-2 124 M, made for a large GPU and gigabytes of text", vocab_size=50_257),
}
"""Registry of presets: name -> Preset. README.md repeats the measurements, and a test compares them."""


def get(name: str) -> TrainConfig:
    """The configuration of a preset. Raises: UserError if `name` is unknown."""
    if name not in PRESETS:
        raise UserError(f"--preset {name} does not exist: choose one of {', '.join(PRESETS)}")
    return PRESETS[name].make()
