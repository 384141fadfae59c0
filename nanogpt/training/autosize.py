"""Autosize: choose the model and its training for the time there is (--minutes).

Example: config = choose_settings(TrainConfig(minutes=5), Text.of(dataset), device)
The rule is fitted to trainings of seconds to minutes (bench/minutes.py, bench/RESULTS.md): `wanted_tokens`
is the number of training tokens for which a training of so many operations is best; what is left of the
operations goes into a larger model (as Chinchilla has it, Hoffmann et al., 2022, for much longer ones).
Shapes are measured on this device, larger and larger ones, until one is too slow to see so many tokens. The
other numbers follow from the tokens: context, batch, rates, evaluations; and from how often they repeat the
text: dropout, weight decay, EMA.
A setting that differs from its default, or is named in config.fixed, stays as it is.
"""

import functools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from nanogpt.config import GPTConfig, TrainConfig, model_config
from nanogpt.console import plural, say
from nanogpt.data.dataset import Dataset
from nanogpt.device import autocast, kind_of, seconds_of
from nanogpt.errors import UserError
from nanogpt.graphs import Graphs
from nanogpt.model.gpt import GPT
from nanogpt.model.size import flops_per_token, meta_model
from nanogpt.precision import pick_dtype, pick_muon_dtype
from nanogpt.presets import with_modern_blocks
from nanogpt.training import memory_estimate
from nanogpt.training.cuda_graph import MAX_GRAPH_FLOPS, WARM_UP_UPDATES
from nanogpt.training.optimizer import build_optimizers
from nanogpt.training.sparse import clip_grad_norm, use_sparse_gradients

Config = TypeVar("Config", bound=TrainConfig)

SHAPES = (
    (1, 64), (1, 96), (1, 128), (1, 192), (1, 256), (2, 256), (3, 256), (3, 320), (4, 320), (4, 384),
    (5, 448), (6, 512), (8, 640), (10, 768), (12, 768), (16, 1024), (24, 1024), (24, 1536), (32, 2048),
)  # fmt: skip
"""Layers and widths, smallest first."""

TOKENS, FLOPS, GROWTH_BELOW, GROWTH_ABOVE = 2.3e6, 2.1e13, 0.3, 0.4
"""A training of so many operations is best with so many characters; how they grow below and above it."""

REPEATS = 2
"""From a text that is seen more often than that in a training of TOKENS, fewer tokens are wanted."""

USUAL_WIDTH = 256
"""The width for which the dtype is picked that shapes are measured in."""

FEW_KINDS = 256
"""Vocabulary of bytes. A token of a larger one says more, by its logarithm: fewer are wanted."""

MAX_REPEATS, TABLE_REPEATS, BATCH_REPEATS = 16, 8, 4
"""From so many repetitions on, a text teaches nothing more; from the second on, not even n-gram tables; from
the third on, large batches learn it by heart."""

FLOPS_PER_CHARACTER = 35
"""Operations for each token, over the characters of the text, above which a model learns it by heart."""

OVERHEAD_SECONDS, OVERHEAD_SHARE = 3.0, 0.06
"""Time that is not training: start, measuring, evaluations, the end."""

MEASURING_SHARE, MEASURED_UPDATES = 0.04, 3
"""Share of the time in which shapes are measured at most, and updates measured of each, after a first."""

CONTEXTS, MAX_CONTEXT = ((3e5, 64), (5e6, 128), (3e7, 256), (3e8, 512)), 1024
"""Context for trainings of fewer than so many tokens, and of more."""

BATCH, MIN_BATCH, MAX_BATCH, SPARE_BATCH = 8192, 2048, 2**19, 4096
"""Tokens of a batch in a training of TOKENS (it grows with the square root of the tokens), and its limits.

Small batches learn more from a text and take longer: with time to spare, they become as small as the last."""

ENDING = frozenset(("max_iters", "schedule", "decays"))
"""Settings of the end, which --minutes decides."""

MEMORY_SHARE, BYTES_PER_PARAMETER = 0.5, 16
"""Share of the free memory that weights, gradients and optimizer state may take, in float32."""


@dataclass(frozen=True)
class Text:
    """What the rule asks about a data set."""

    train_tokens: int
    val_tokens: int
    vocab_size: int

    @property
    def information(self) -> float:
        """How much more a token says than a byte."""
        return math.log(max(self.vocab_size, FEW_KINDS)) / math.log(FEW_KINDS)

    @property
    def useful_tokens(self) -> int:
        """The number of training tokens after which more do not help."""
        return MAX_REPEATS * self.train_tokens

    @classmethod
    def of(cls, dataset: Dataset) -> "Text":
        """The sizes of a prepared data set."""
        return cls(len(dataset.train), len(dataset.val), dataset.tokenizer.vocab_size)


@dataclass(frozen=True)
class Choice:
    """Settings, and what they were chosen by."""

    config: TrainConfig
    seconds_per_token: float
    """Measured: an update over the tokens of its batch."""
    tokens: float
    """Tokens that the time allows."""
    text: Text

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return size_of(model_config(self.config, self.text.vocab_size))[0]

    @property
    def flops_per_token(self) -> int:
        """Operations of an update for each token."""
        return size_of(model_config(self.config, self.text.vocab_size))[1]

    @property
    def is_affordable(self) -> bool:
        """Whether it sees as many tokens as the rule asks for its operations, and the text is long enough."""
        most = FLOPS_PER_CHARACTER * self.text.train_tokens * self.text.information
        wanted = wanted_tokens(self.tokens * self.flops_per_token, self.text)
        return self.tokens >= wanted and self.flops_per_token <= most


@functools.cache
def size_of(model: GPTConfig) -> tuple[int, int]:
    """Parameters of a model, and operations of an update for each token. Making it takes milliseconds."""
    network = meta_model(model)
    return network.num_parameters(), flops_per_token(network)


def wanted_tokens(flops: float, text: Text) -> float:
    """The number of training tokens for which a training of so many operations is best."""
    scarce = min(1.0, REPEATS * text.train_tokens / TOKENS) ** 0.5
    characters = scarce * TOKENS * (flops / FLOPS) ** (GROWTH_BELOW if flops < FLOPS else GROWTH_ABOVE)
    return characters / text.information


def choose_settings(config: Config, text: Text, device: torch.device, processes: int = 1) -> Config:
    """Choose what config.minutes leaves open, and say why in three lines.

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
    """Measure shapes, larger and larger ones, until one is too slow to see enough tokens."""
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
        """Measure a shape, with the batch of a training of so many tokens."""
        candidate = with_settings(config, *shapes[number], tokens, text)
        cost = seconds_per_token(candidate, text.vocab_size, device, dtype, alone=processes == 1) / devices
        return Choice(candidate, cost, training_s / cost, text)

    def next_number(number: int, choice: Choice) -> int | None:
        """The largest shape that is affordable at the FLOPs a second of `choice`, or else the one after it.

        Larger products run faster: that one may be affordable even if it does not look so. None: none fits.
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
    began = time.perf_counter()  # not before: the first shape pays for what a training pays anyway
    if len(shapes) == 1:  # now with the batch of so many tokens
        return try_shape(0, choice.tokens)
    while time.perf_counter() - began < MEASURING_SHARE * seconds:
        number = next_number(number, choice)
        if number is None or not (tried := try_shape(number, choice.tokens)).is_affordable:
            break
        choice = tried
    return choice


def training_seconds(minutes: float) -> float:
    """Seconds of updates in a training of so many minutes."""
    return max(20 * minutes, 60 * minutes * (1 - OVERHEAD_SHARE) - OVERHEAD_SECONDS)


def fixed_settings(config: TrainConfig) -> frozenset[str]:
    """Names of the settings that are not chosen: those in config.fixed, and what differs from its default.

    When the training ends, and how its rate gets there, is always chosen.
    """
    return (changed_settings(config) | frozenset(config.fixed)) - ENDING


def changed_settings(config: TrainConfig) -> frozenset[str]:
    """Names of the settings that differ from their default."""
    usual = TrainConfig()
    return frozenset(
        item.name for item in fields(usual) if getattr(config, item.name) != getattr(usual, item.name)
    )


def with_settings(config: Config, layers: int, width: int, tokens: float, text: Text) -> Config:
    """The configuration of a training with a model of this shape. tokens: that the time allows."""
    fixed = fixed_settings(config)
    modern = with_modern_blocks(TrainConfig())
    spare, tokens = max(1.0, tokens / text.useful_tokens), min(tokens, text.useful_tokens)
    repeats = tokens / text.train_tokens
    context = next((length for most, length in CONTEXTS if tokens < most), MAX_CONTEXT)
    context = min(context, max(2, text.train_tokens // 2 - 1), max(2, text.val_tokens - 1))
    context = config.block_size if "block_size" in fixed else context
    different = min(tokens, REPEATS * text.train_tokens)  # what a larger batch averages over
    wanted_batch = BATCH * math.sqrt(max(different, 1.0) / TOKENS)
    batch_tokens = 2 ** round(math.log2(min(max(wanted_batch, MIN_BATCH), MAX_BATCH)))
    batch_tokens = max(batch_tokens // 2 ** int(math.log2(spare)), min(batch_tokens, SPARE_BATCH))
    batch_tokens = min(batch_tokens, SPARE_BATCH) if repeats > BATCH_REPEATS else batch_tokens
    updates = max(1.0, tokens / batch_tokens)
    early = min(1.0, max(0.0, math.log(300 / updates) / math.log(5)))  # 1 up to 60 updates, 0 from 300 on
    chosen = {name: getattr(modern, name) for name in changed_settings(modern)} | {
        "n_layer": layers,
        **heads_and_width(config, width, fixed),
        "mlp_width": 2 * width if layers == 1 else None,
        "block_size": context,
        "batch_size": max(1, batch_tokens // context),
        "max_iters": max(1, int(updates)),
        "ngram_vocab": 0 if repeats > TABLE_REPEATS else 32_768 if tokens < 5e6 else 65_536,
        "dropout": 0.0 if repeats < 2 else 0.1 if repeats < 5 else 0.2,
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


def heads_and_width(config: TrainConfig, width: int, fixed: frozenset[str]) -> dict[str, int]:
    """Heads that divide the width; or a width for the user's heads."""
    if "n_head" in fixed:
        return {"n_embd": max(2, 2 * round(width / config.n_head / 2)) * config.n_head}
    heads = next(
        heads for heads in range(max(4, width // 64), 0, -1) if width % (2 * heads) == 0 or heads == 1
    )
    return {"n_embd": width, "n_head": heads}


def with_evaluations(config: Config, choice: Choice, text: Text) -> Config:
    """Add how often to evaluate, and on how much: 1 to 8 times, each in a fiftieth of the time at most."""
    assert config.minutes is not None
    minutes = config.minutes
    evaluations = 0.5 if minutes < 0.5 else 4 if minutes < 5 else 8  # a half: at the end alone
    affordable = 60 * minutes / 50 / (choice.seconds_per_token / 3)  # tokens: a forward pass is a third
    chosen: dict[str, Any] = {"eval_interval": max(1, int(config.max_iters / evaluations))}
    if affordable < text.val_tokens:
        chosen["eval_iters"] = max(1, int(affordable / (config.batch_size * config.block_size)))
    fixed = fixed_settings(config)
    return replace(config, **{name: value for name, value in chosen.items() if name not in fixed})


def seconds_per_token(
    config: TrainConfig, vocab_size: int, device: torch.device, dtype: torch.dtype, *, alone: bool
) -> float:
    """Measure updates of a training: their shortest time, over the tokens of a batch.

    alone: in one process, whose updates may be captured.
    """
    kind = kind_of(device)
    kind.set_up(device, dtype)
    model = GPT(model_config(config, vocab_size)).to(device)
    if kind.sparse_gradients:
        use_sparse_gradients(model)
    optimizers = build_optimizers(model, config, pick_muon_dtype(config.dtype, device).dtype)
    x, y = torch.randint(vocab_size, (2, config.batch_size, config.block_size), device=device)

    def update() -> Tensor:
        """Make one update."""
        with autocast(device, dtype):
            loss = model.loss(x, y)
        loss.backward()
        clip_grad_norm(model, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        return loss.detach()

    action: Callable[[], object] = update
    small = flops_per_token(model) * x.numel() < MAX_GRAPH_FLOPS
    if kind.graphs is not None and alone and small and config.cuda_graph != "off":
        action = captured(update, optimizers, kind.graphs)
    times = [seconds_of(action, device) for _ in range(1 + MEASURED_UPDATES)]
    return min(times[1:]) / x.numel()  # the first one is a warm-up


def captured(
    update: Callable[[], Tensor], optimizers: Iterable[torch.optim.Optimizer], graphs: Graphs
) -> Callable[[], object]:
    """The update as a CUDA graph, as cuda_graph.py will capture it; as it is, if it cannot be captured."""
    for _ in range(WARM_UP_UPDATES):
        graphs.warm_up(update)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if "capturable" in group:
            group["capturable"] = True
    try:
        return graphs.capture(update)[0]
    except RuntimeError:
        return update


def explain(config: TrainConfig, choice: Choice, text: Text) -> None:
    """Say in three lines what was chosen, and why."""
    batch = config.batch_size * config.block_size
    tokens, is_short = config.max_iters * batch, choice.tokens > text.useful_tokens
    repeats = tokens / text.train_tokens
    seen = f"{repeats:.1f} times the text" if repeats >= 1 else f"{repeats:.0%} of the text"
    say(
        f"For {config.minutes:g} min: {plural(config.n_layer, 'layer')} of {config.n_embd}, "
        f"context {config.block_size}, about {config.max_iters:,} updates of {batch:,} tokens"
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
