"""Autosize: choose the model and its training for the available time (--minutes).

Example: config = choose_settings(TrainConfig(minutes=5), Text.of(dataset), device)
A budget of FLOPs is best split between the size of the model and the number of tokens that it sees. The rule
for that split (`wanted_tokens`) is fitted to trainings of seconds to minutes (bench/minutes.py,
bench/RESULTS.md), as Chinchilla's is to much longer ones (Hoffmann et al., 2022). Shapes are timed on this
device, larger and larger ones, until one is too slow to see the wanted tokens. The other settings follow from
the number of tokens (context, batch, rates, evaluations) and from how often they repeat the text (dropout,
weight decay, EMA).
A setting that differs from its default, or is named in config.fixed, stays as it is.
"""

import functools
import math
import time
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

from nanogpt.config import GPTConfig, TrainConfig, model_config
from nanogpt.data.dataset import Dataset
from nanogpt.errors import UserError
from nanogpt.machine.device import kind_of
from nanogpt.machine.precision import pick_dtype
from nanogpt.model.size import flops_per_token, meta_model
from nanogpt.presets import with_modern_blocks
from nanogpt.terminal.console import say
from nanogpt.training import memory_estimate
from nanogpt.training.measuring import seconds_per_token
from nanogpt.units import plural

Config = TypeVar("Config", bound=TrainConfig)

SHAPES = (
    (1, 64), (1, 96), (1, 128), (1, 192), (1, 256), (2, 256), (3, 256), (3, 320), (4, 320), (4, 384),
    (5, 448), (6, 512), (8, 640), (10, 768), (12, 768), (16, 1024), (24, 1024), (24, 1536), (32, 2048),
)  # fmt: skip
"""Layers and widths, smallest first."""

TOKENS, FLOPS, GROWTH_BELOW, GROWTH_ABOVE = 2.3e6, 2.1e13, 0.3, 0.55
"""A training of FLOPS is best with TOKENS characters; the exponents of their growth below and above it."""

REPEATS = 2
"""If TOKENS would repeat the text more often than this, fewer tokens are wanted."""

USUAL_WIDTH = 256
"""Shapes are measured in the dtype that is picked for this width."""

FEW_KINDS = 256
"""Size of a vocabulary of bytes. A token of a larger one carries more information, so fewer are wanted."""

TABLE_REPEATS, TABLE_GROWTH, MAX_REPEATS = 7, 0.35, 16
"""Repetitions of a text beyond which training does not help: with n-gram tables (of a million characters; the
exponent of their growth with the characters), and at most."""

BATCH_REPEATS = 4
"""Repetitions beyond which large batches learn a text by heart."""

DEEP, PLAIN_REPEATS = 3, 12
"""A model of so many layers, in a training that repeats the text so often, is better without tables."""

CHARACTERS_PER_ROW, MIN_ROWS = 30, 8192
"""Characters of the text for each row of the tables, at least; they have MIN_ROWS rows, even so."""

FLOPS_PER_CHARACTER = 35
"""FLOPs per token without attention, for each character of a text, above which a model learns it by heart."""

OVERHEAD_SECONDS, OVERHEAD_SHARE = 3.0, 0.06
"""Time that is not training (start, measuring, evaluations, the end): a constant, and a share of all."""

MEASURING_SHARE = 0.04
"""Largest share of the time for measuring shapes."""

CONTEXTS, MAX_CONTEXT = ((3e5, 64), (1e7, 128), (3e7, 256), (3e8, 512)), 1024
"""Pairs (tokens, context): the context of trainings of fewer tokens than that; MAX_CONTEXT: of all others."""

BATCH, MIN_BATCH, MAX_BATCH, SPARE_BATCH = 8192, 2048, 2**19, 4096
"""Tokens of a batch in a training of TOKENS (it grows with the square root of the tokens), and its limits.

Small batches learn more from a text but take longer: with time to spare, they shrink down to SPARE_BATCH."""

ENDING = frozenset(("max_iters", "schedule", "decays"))
"""Settings that say when the training ends, which --minutes decides."""

MEMORY_SHARE, BYTES_PER_PARAMETER = 0.5, 16
"""Share of the free memory for weights, gradients and optimizer state, and their bytes per parameter."""


@dataclass(frozen=True)
class Text:
    """The sizes of a data set."""

    train_tokens: int
    val_tokens: int
    vocab_size: int

    @property
    def information(self) -> float:
        """How much more information a token carries than a byte."""
        return math.log(max(self.vocab_size, FEW_KINDS)) / math.log(FEW_KINDS)

    @property
    def characters(self) -> float:
        """Characters with as much information as the training tokens."""
        return self.train_tokens * self.information

    def useful_tokens(self, *, tables: bool) -> int:
        """The number of training tokens beyond which more do not help, with or without n-gram tables."""
        with_tables = min(MAX_REPEATS, TABLE_REPEATS * (self.characters / 1e6) ** TABLE_GROWTH)
        return int((max(1.0, with_tables) if tables else MAX_REPEATS) * self.train_tokens)

    @classmethod
    def of(cls, dataset: Dataset) -> "Text":
        """The sizes of a prepared data set."""
        return cls(len(dataset.train), len(dataset.val), dataset.tokenizer.vocab_size)


@dataclass(frozen=True)
class Choice:
    """Candidate settings, and the measurement that they are judged by."""

    config: TrainConfig
    seconds_per_token: float
    """Measured time of an update, divided by the tokens of its batch."""
    tokens: float
    """Training tokens that the time allows."""
    text: Text

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return size_of(model_config(self.config, self.text.vocab_size))[0]

    @property
    def flops_per_token(self) -> int:
        """FLOPs of an update per token."""
        return size_of(model_config(self.config, self.text.vocab_size))[1]

    @property
    def is_affordable(self) -> bool:
        """Whether it sees the tokens that the rule wants for its FLOPs, and the text is long enough."""
        most = FLOPS_PER_CHARACTER * self.text.characters
        without_context = model_config(replace(self.config, block_size=1), self.text.vocab_size)
        wanted = wanted_tokens(self.tokens * self.flops_per_token, self.text)
        return self.tokens >= wanted and size_of(without_context)[1] <= most


@functools.cache
def size_of(model: GPTConfig) -> tuple[int, int]:
    """Parameters of a model, and FLOPs of an update per token. Cached: each takes milliseconds."""
    network = meta_model(model)
    return network.num_parameters(), flops_per_token(network)


def wanted_tokens(flops: float, text: Text) -> float:
    """The number of training tokens with which a training of this many FLOPs is best."""
    scarce = min(1.0, REPEATS * text.train_tokens / TOKENS) ** 0.5
    characters = scarce * TOKENS * (flops / FLOPS) ** (GROWTH_BELOW if flops < FLOPS else GROWTH_ABOVE)
    return characters / text.information


def choose_settings(config: Config, text: Text, device: torch.device, processes: int = 1) -> Config:
    """Choose the settings that are not fixed, and print the choice and the reasons in three lines.

    processes: number of devices that share a batch.
    """
    assert config.minutes is not None
    for name in sorted(ENDING & set(config.fixed)):
        raise UserError(
            f"--minutes decides when the training ends, and so does --{name}: leave one of them out"
        )
    choice = choose_shape(config, text, device, processes)
    config = with_settings(config, choice.config.n_layer, choice.config.n_embd, choice.tokens, text)
    config = with_evaluations(config, choice, text)
    explain(config, choice, text)
    return config


def choose_shape(config: TrainConfig, text: Text, device: torch.device, processes: int) -> Choice:
    """Measure larger and larger shapes, until one is too slow to see enough tokens."""
    assert config.minutes is not None
    seconds, training_s = 60 * config.minutes, training_seconds(config.minutes)
    devices = 1 if kind_of(device).shares_memory else processes
    room = MEMORY_SHARE * memory_estimate.free(device) / BYTES_PER_PARAMETER  # parameters
    dtype, fixed = pick_dtype(config.dtype, device, USUAL_WIDTH).dtype, fixed_settings(config)
    shapes = list(
        dict.fromkeys(
            (config.n_layer if "n_layer" in fixed else layers, config.n_embd if "n_embd" in fixed else width)
            for layers, width in SHAPES
        )
    )

    def try_shape(number: int, tokens: float) -> Choice:
        """Measure a shape, with the batch of a training of this many tokens."""
        candidate = with_settings(config, *shapes[number], tokens, text)
        cost = seconds_per_token(candidate, text.vocab_size, device, dtype, alone=processes == 1) / devices
        return Choice(candidate, cost, training_s / cost, text)

    def next_number(number: int, choice: Choice) -> int | None:
        """The largest shape that is affordable at the FLOP/s of `choice`, or else the one after `number`.

        Larger products run at more FLOP/s, so that one may be affordable after all. None: no larger one fits.
        """
        found: int | None = None
        for larger in range(number + 1, len(shapes)):
            there = replace(choice, config=with_settings(config, *shapes[larger], choice.tokens, text))
            there = replace(there, tokens=choice.tokens * choice.flops_per_token / there.flops_per_token)
            if there.parameters >= room or (found is not None and not there.is_affordable):
                break
            found = larger
        return found

    number, choice = 0, try_shape(0, 0.0)
    began = time.perf_counter()  # after the first shape, whose start-up costs any training has
    if len(shapes) == 1:  # now with a batch for the tokens that the time allows
        return try_shape(0, choice.tokens)
    while time.perf_counter() - began < MEASURING_SHARE * seconds:
        number = next_number(number, choice)
        if number is None or not (tried := try_shape(number, choice.tokens)).is_affordable:
            break
        choice = tried
    return choice


def training_seconds(minutes: float) -> float:
    """Seconds of updates in a training that takes `minutes` in all."""
    return max(20 * minutes, 60 * minutes * (1 - OVERHEAD_SHARE) - OVERHEAD_SECONDS)


def fixed_settings(config: TrainConfig) -> frozenset[str]:
    """Names of the settings that are not chosen: those in config.fixed or different from their default.

    The end of the training (ENDING) is always chosen.
    """
    return (changed_settings(config) | frozenset(config.fixed)) - ENDING


def changed_settings(config: TrainConfig) -> frozenset[str]:
    """Names of the settings that differ from their default."""
    usual = TrainConfig()
    return frozenset(
        item.name for item in fields(usual) if getattr(config, item.name) != getattr(usual, item.name)
    )


def with_settings(config: Config, layers: int, width: int, tokens: float, text: Text) -> Config:
    """The settings of a training with a model of this shape. tokens: training tokens that the time allows."""
    fixed = fixed_settings(config)
    modern = with_modern_blocks(TrainConfig())
    rows = config.ngram_vocab
    if "ngram_vocab" not in fixed:
        rows = (
            0 if layers >= DEEP and tokens > PLAIN_REPEATS * text.train_tokens else table_rows(tokens, text)
        )
    useful = text.useful_tokens(tables=rows > 0)
    spare, tokens = max(1.0, tokens / useful), min(tokens, useful)
    repeats = tokens / text.train_tokens
    context = config.block_size if "block_size" in fixed else context_length(tokens, spare, text)
    batch = max(1, tokens_per_batch(tokens, spare, text) // context)
    batch = config.batch_size if "batch_size" in fixed else batch
    updates = max(1.0, tokens / (batch * context))
    early = min(1.0, max(0.0, math.log(300 / updates) / math.log(5)))  # 1 up to 60 updates, 0 from 300 on
    chosen = {name: getattr(modern, name) for name in changed_settings(modern)} | {
        "n_layer": layers,
        **heads_and_width(config, width, fixed),
        "mlp_width": 2 * width if layers == 1 else None,
        "block_size": context,
        "batch_size": batch,
        "max_iters": max(1, int(updates)),
        "ngram_vocab": rows,
        "dropout": 0.0 if repeats < 2 else 0.1 if rows or repeats < 5 else 0.2,
        "weight_decay": 0.0 if repeats < 2 else 0.1,
        "ema_decay": 0.0 if updates < 1000 else 0.99,
        "schedule": "constant",
        "cooldown": 0.7 + 0.2 * early,
        "warmup_iters": int(updates / 100) if updates > 2000 else 0,
        "learning_rate": 0.03 * (5 / 3) ** early * min(1.0, math.sqrt(USUAL_WIDTH / width)),
        "beta1": 0.6 - 0.1 * early,
        "beta2": 0.95 - 0.05 * early,
    }
    return replace(config, **{name: value for name, value in chosen.items() if name not in fixed})


def table_rows(tokens: float, text: Text) -> int:
    """Rows of the n-gram tables, a power of 2. Large ones learn a short text by heart."""
    most = 32_768 if tokens < 5e6 else 65_536
    return min(most, max(MIN_ROWS, 2 ** round(math.log2(max(1.0, text.characters / CHARACTERS_PER_ROW)))))


def context_length(tokens: float, spare: float, text: Text) -> int:
    """The context of a training of this many tokens: it grows with them, and fits both splits.

    spare: the time, over what the useful tokens take. What is left goes into a context twice as long.
    """
    context = next((length for most, length in CONTEXTS if tokens < most), MAX_CONTEXT)
    context = min(MAX_CONTEXT, 2 * context) if spare > 1 else context
    return min(context, max(2, text.train_tokens // 2 - 1), max(2, text.val_tokens - 1))


def tokens_per_batch(tokens: float, spare: float, text: Text) -> int:
    """Tokens of a batch, a power of 2. spare: the time, over what the useful tokens take, at least 1."""
    different = min(tokens, REPEATS * text.train_tokens)  # what a batch averages over
    wanted = BATCH * math.sqrt(max(different, 1.0) / TOKENS)
    batch = 2 ** round(math.log2(min(max(wanted, MIN_BATCH), MAX_BATCH)))
    batch = max(batch // 2 ** int(math.log2(spare)), min(batch, SPARE_BATCH))
    return min(batch, SPARE_BATCH) if tokens / text.train_tokens > BATCH_REPEATS else batch


def heads_and_width(config: TrainConfig, width: int, fixed: frozenset[str]) -> dict[str, int]:
    """Heads that divide the width or, if the user gave the heads, the nearest width that they divide."""
    if "n_head" in fixed:
        return {"n_embd": max(2, 2 * round(width / config.n_head / 2)) * config.n_head}
    heads = next(
        heads for heads in range(max(4, width // 64), 0, -1) if width % (2 * heads) == 0 or heads == 1
    )
    return {"n_embd": width, "n_head": heads}


def with_evaluations(config: Config, choice: Choice, text: Text) -> Config:
    """Add how often to evaluate (1 to 8 times) and on how much (in at most a fiftieth of the time each)."""
    assert config.minutes is not None
    minutes = config.minutes
    evaluations = 0.5 if minutes < 0.5 else 4 if minutes < 5 else 8  # 0.5: only at the end
    affordable = 60 * minutes / 50 / (choice.seconds_per_token / 3)  # tokens: a forward pass is a third
    chosen: dict[str, Any] = {"eval_interval": max(1, int(config.max_iters / evaluations))}
    if affordable < text.val_tokens:
        chosen["eval_iters"] = max(1, int(affordable / (config.batch_size * config.block_size)))
    fixed = fixed_settings(config)
    return replace(config, **{name: value for name, value in chosen.items() if name not in fixed})


def explain(config: TrainConfig, choice: Choice, text: Text) -> None:
    """Print in three lines what was chosen, and why."""
    batch = config.batch_size * config.block_size
    useful = text.useful_tokens(tables=config.ngram_vocab > 0)
    tokens, is_short = config.max_iters * batch, choice.tokens > useful
    repeats = tokens / text.train_tokens
    seen = f"{repeats:.1f} times the text" if repeats >= 1 else f"{repeats:.0%} of the text"
    say(
        f"For {config.minutes:g} min: {plural(config.n_layer, 'layer')} of {config.n_embd}, "
        f"context {config.block_size}, about {plural(config.max_iters, 'update')} of {batch:,} tokens"
    )
    why = "a larger model would see too few, a smaller one would not need so many"
    if is_short:
        why = "the text is too short to use all of it, or a larger model: that would learn it by heart"
    say(
        f"Why: this device trains {1 / choice.seconds_per_token:,.0f} tokens/s of that shape, "
        f"{choice.tokens:,.0f} in the time; {why}"
    )
    tables = f"n-gram tables of {config.ngram_vocab:,} rows" if config.ngram_vocab else "no n-gram tables"
    average = "an average of the weights" if config.ema_decay else "no average of the weights"
    say(
        f"That is {seen}{', and it ends early' if is_short else ''}: dropout {config.dropout:g}, "
        f"weight decay {config.weight_decay:g}, {average}; {tables} for {text.vocab_size:,} different tokens"
    )
