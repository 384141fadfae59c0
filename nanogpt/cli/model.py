"""The `model` command: print the parameters, memory and floating-point operations of a model.

Run:    python model.py --n_layer 12 --n_embd 768
Memory and operations are computed as for `nanogpt plan`, which also counts activations.
"""

import torch
from rich.table import Table

from nanogpt import presets
from nanogpt.cli.config import ModelSummaryConfig
from nanogpt.config import TrainConfig, model_config
from nanogpt.model.gpt import GPT
from nanogpt.model.size import flops_per_token, meta_model
from nanogpt.terminal.console import say, terminal
from nanogpt.training.memory_estimate import count_update
from nanogpt.units import MIB

COMPONENTS = {
    "token embedding": ("token_embedding.",),
    "position embedding": ("position_embedding.",),
    "n-gram embedding": ("ngram_embedding.",),
    "attention": (".attn.",),
    "MLP": (".mlp.",),
    "norms": (".norm_1.", ".norm_2.", "final_norm."),
    "output layer": ("head.",),
}
"""Component of the model -> substrings that the names of its parameters contain."""


def main(config: ModelSummaryConfig) -> int:
    """Print the summary of a configuration. Returns the exit code."""
    shape = model_config(config, config.vocab_size)
    training = presets.get(config.preset) if config.preset else TrainConfig()
    model = meta_model(shape)
    say(
        f"GPT: {shape.n_layer} layers, {shape.n_head} heads, width {shape.n_embd}, "
        f"context {shape.block_size}, vocabulary {shape.vocab_size}"
    )
    print_parameters(count_parameters(model))
    weights, gradients, state, _ = count_update(shape, training, torch.device("cpu"), torch.float32)
    ema = " and their EMA" if training.ema_decay else ""
    say(
        f"Memory: weights{ema} {weights / MIB:,.1f} MiB, gradients {gradients / MIB:,.1f} MiB, "
        f"optimizer ({training.optimizer}) {state / MIB:,.1f} MiB, in float32"
    )
    flops = flops_per_token(model)
    say(f"Training: {flops / 1e6:,.1f} MFLOP a token, {flops * shape.block_size / 1e9:,.2f} GFLOP a sequence")
    return 0


def print_parameters(counts: dict[str, int]) -> None:
    """Print the number of parameters of each component as a table."""
    total = sum(counts.values())
    table = Table("component", "parameters", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for component, count in counts.items():
        if count:
            table.add_row(component, f"{count:,}", f"{count / total:.1%}")
    table.add_section()
    table.add_row("total", f"{total:,}", "")
    terminal().print(table)


def count_parameters(model: GPT) -> dict[str, int]:
    """Count the parameters of each component of a model, in the order of the forward pass."""
    counts = dict.fromkeys(COMPONENTS, 0)
    for name, parameter in model.named_parameters():
        component = next(key for key, marks in COMPONENTS.items() if any(mark in name for mark in marks))
        counts[component] += parameter.numel()
    return counts
