"""Sampling in float32 against the dtype that a checkpoint was trained in.

Run:    python bench/sampling.py            default, cpu and gpt2 shapes; about a minute
Random weights; a full context, so that every token costs the same; in turn, medians of tokens a second.
"""

import argparse
import time
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from nanogpt import device, presets
from nanogpt.config import TrainConfig, model_config
from nanogpt.inference.generate import generate
from nanogpt.model.gpt import GPT

SHAPES = {
    "default": (TrainConfig(), 65),
    "cpu": (presets.get("cpu"), 65),
    "gpt2": (presets.get("gpt2"), 50_257),
}
DTYPES = (torch.float32, torch.bfloat16)


def rate(model: GPT, dtype: torch.dtype, tokens: int) -> float:
    """Tokens a second."""
    place = next(model.parameters()).device
    prompt = torch.zeros(1, model.config.block_size, dtype=torch.int64, device=place)
    with device.eager_mode(), device.autocast(place, dtype):
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
    place = device.pick_device(args.device)
    table = Table("shape", "float32, tokens/s", "bfloat16, tokens/s", "ratio")
    for name, (config, vocabulary) in SHAPES.items():
        model = GPT(model_config(config, vocabulary)).to(place).eval()
        tokens = 3 if name == "gpt2" else 30
        for dtype in DTYPES:
            rate(model, dtype, 2)
        rows = [[rate(model, dtype, tokens) for dtype in DTYPES] for _ in range(args.rounds)]
        one, other = (median(column) for column in zip(*rows, strict=True))
        ratio = median(b / a for a, b in rows)
        table.add_row(name, f"{one:.1f}", f"{other:.1f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
