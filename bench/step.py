"""A training step of ours against the plain loop around transformers' GPT-2.

Run:    python bench/step.py                                            the default model, batch 64 x 256
        python bench/step.py --n_layer 4 --n_head 4 --n_embd 128 --block_size 64 --batch_size 12
Ours: bfloat16 on a CPU, our attention, dropout and fused optimizer. Theirs: float32, AdamW, gradient
clipping, dropout on the same probability (as nanoGPT's loop has it). The two in turn, medians.
MFU is against a matrix product of bfloat16 measured in the same run.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the commands do

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.device import autocast
from nanogpt.model import GPT, flops_per_token
from nanogpt.optim import build

CPU = torch.device("cpu")


def our_step(config: GPTConfig, batch_size: int) -> Callable[[Tensor, Tensor], None]:
    """One update of ours as a function of a batch."""
    model = GPT(config)
    optimizers = build(model, TrainConfig(batch_size=batch_size))

    def step(x: Tensor, y: Tensor) -> None:
        with autocast(CPU, torch.bfloat16):
            _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

    return step


def their_step(config: GPTConfig) -> Callable[[Tensor, Tensor], None]:
    """The same with transformers' model and a plain loop."""
    p = config.dropout
    shape = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        resid_pdrop=p,
        embd_pdrop=p,
        attn_pdrop=p,
    )
    model = GPT2LMHeadModel(shape).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def step(x: Tensor, y: Tensor) -> None:
        logits = model(x).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def ceiling() -> float:
    """Floating-point operations a second of a large bfloat16 matrix product, median of 5."""
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    return 2 * 2048**3 / statistics.median(seconds(lambda: a @ b) for _ in range(5))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    default = GPTConfig()
    for name in ("n_layer", "n_head", "n_embd", "block_size"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    parser.add_argument("--dropout", type=float, default=default.dropout)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = vars(parser.parse_args())
    batch_size, rounds = options.pop("batch_size"), options.pop("rounds")
    config = GPTConfig(**options)
    x, y = torch.randint(config.vocab_size, (2, batch_size, config.block_size))
    ours, theirs = our_step(config, batch_size), their_step(config)
    ours(x, y)
    theirs(x, y)
    pairs = [(seconds(lambda: ours(x, y)), seconds(lambda: theirs(x, y))) for _ in range(rounds)]
    peak = ceiling()
    flops = flops_per_token(config, GPT(config).num_parameters()) * x.numel()
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    table = Table("step", "ms", "tokens/s", "of the bf16 ceiling", title=f"{options}, batch {batch_size}")
    for name, column in zip(("ours", "transformers, float32"), zip(*pairs, strict=True), strict=True):
        median = statistics.median(column)
        share = f"{flops / median / peak:.0%}"
        table.add_row(name, f"{1000 * median:,.0f}", f"{x.numel() / median:,.0f}", share)
    Console().print(table)
    print(f"ratio {ratio:.2f}; ceiling {peak / 1e9:.0f} GFLOP/s; torch {torch.__version__}")


if __name__ == "__main__":
    main()
