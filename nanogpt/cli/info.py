"""What a model costs, before it is trained: parameters by part, memory, arithmetic.

Run:    python model.py --n_layer 12 --n_embd 768
"""

from dataclasses import fields

import torch
from rich.table import Table

from nanogpt.config import GPTConfig, SummaryConfig
from nanogpt.console import say, terminal
from nanogpt.model.gpt import GPT, flops_per_token

FLOAT_BYTES = 4
"""Weights, gradients and AdamW's two moments are float32."""

PARTS = {
    "token embedding": ("wte.",),
    "position embedding": ("wpe.",),
    "tables of pairs and triples": ("ngrams.",),
    "attention": (".attn.",),
    "MLP": (".mlp.",),
    "norms": (".ln_1.", ".ln_2.", "ln_f."),
    "output layer": ("head.",),
}
"""Part of the model -> what the names of its parameters contain."""


def main(config: SummaryConfig) -> int:
    """Print the summary of a configuration. Returns the exit code."""
    shape = GPTConfig(**{field.name: getattr(config, field.name) for field in fields(GPTConfig)})
    counts = count_parameters(shape)
    total = sum(counts.values())
    say(
        f"GPT: {shape.n_layer} layers, {shape.n_head} heads, width {shape.n_embd}, "
        f"context {shape.block_size}, vocabulary {shape.vocab_size}"
    )
    table = Table("part", "parameters", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for part, count in counts.items():
        if not count:
            continue
        table.add_row(part, f"{count:,}", f"{count / total:.1%}")
    table.add_section()
    table.add_row("total", f"{total:,}", "")
    terminal().print(table)
    weights = total * FLOAT_BYTES
    say(f"Memory: weights {mib(weights)}, gradients {mib(weights)}, AdamW {mib(2 * weights)}, in float32")
    flops = flops_per_token(shape, total)
    say(f"Training: {flops / 1e6:,.1f} MFLOP a token, {flops * shape.block_size / 1e9:,.2f} GFLOP a sequence")
    return 0


def count_parameters(config: GPTConfig) -> dict[str, int]:
    """Number of parameters of each part, largest structures in the order data flows."""
    with torch.device("meta"):  # shapes alone: no memory, however large the model
        model = GPT(config)
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        part = next(part for part, marks in PARTS.items() if any(mark in name for mark in marks))
        counts[part] += parameter.numel()
    return counts


def mib(size: int) -> str:
    """A number of bytes in MiB."""
    return f"{size / 2**20:,.1f} MiB"
