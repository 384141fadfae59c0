"""The speed of sampling in float32 and in bfloat16, in tokens a second.

Run:    python bench/sampling.py            default, cpu and gpt2 shapes; about a minute
The weights are random and the context is full, so that every token costs the same. The dtypes take turns; the
table shows medians.
"""

import argparse
import time
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from nanogpt import presets
from nanogpt.config import TrainConfig, model_config
from nanogpt.inference.generate import generate
from nanogpt.machine.device import autocast, eager_mode, pick_device
from nanogpt.model.gpt import GPT

SHAPES = {
    "default": (TrainConfig(), 65),
    "cpu": (presets.get("cpu"), 65),
    "gpt2": (presets.get("gpt2"), 50_257),
}
DTYPES = (torch.float32, torch.bfloat16)


def tokens_per_second(model: GPT, dtype: torch.dtype, tokens: int) -> float:
    """Measure the sampling of so many tokens."""
    device = next(model.parameters()).device
    prompt = torch.zeros(1, model.config.block_size, dtype=torch.int64, device=device)
    with eager_mode(), autocast(device, dtype):
        start = time.perf_counter()
        for _ in generate(model, prompt, num_tokens=tokens):
            pass
    return tokens / (time.perf_counter() - start)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    table = Table("shape", "float32, tokens/s", "bfloat16, tokens/s", "ratio")
    for name, (config, vocabulary) in SHAPES.items():
        model = GPT(model_config(config, vocabulary)).to(device).eval()
        tokens = 3 if name == "gpt2" else 30
        for dtype in DTYPES:
            tokens_per_second(model, dtype, 2)
        rows = [[tokens_per_second(model, dtype, tokens) for dtype in DTYPES] for _ in range(args.rounds)]
        float32, bfloat16 = (median(column) for column in zip(*rows, strict=True))
        ratio = median(second / first for first, second in rows)
        table.add_row(name, f"{float32:.1f}", f"{bfloat16:.1f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
