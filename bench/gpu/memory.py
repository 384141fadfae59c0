"""What checkpointing activations saves on a GPU, and what it costs: GPT-2 124 M and 350 M.

Run:    python bench/gpu/memory.py
        python bench/gpu/memory.py --small --device cpu   tries the script
Synthetic tokens, bfloat16, AdamW; each way of checkpointing, first uncompiled, then compiled. Peak: the
most that PyTorch's allocator held during an update, weights, gradients and moments included.
Writes gpu-memory.jsonl row by row; a row that does not fit says so. Needs torch, numpy and psutil.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import common
import torch
from rows import Results, attempt, fresh, parser_of, place_of, reset_peak

from nanogpt import presets
from nanogpt.config import GPTConfig, GradCheckpoint, TrainConfig, model_config

GPT2 = model_config(presets.get("gpt2"), vocab_size=50_304)

MODELS = {"GPT-2 124 M": GPT2, "GPT-2 350 M": replace(GPT2, n_layer=24, n_head=16, n_embd=1024)}

TINY = {"tiny": GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16)}

MODES: tuple[GradCheckpoint, ...] = ("off", "selective", "blocks")


def measure(
    config: GPTConfig, mode: GradCheckpoint, compiled: str, place: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """Pace, speed and memory of an update. The clock waits for the device once in options.updates."""
    fresh(place)
    step = common.our_step(config, torch.bfloat16, place, compiled, TrainConfig(grad_checkpoint=mode))
    x, y = torch.randint(config.vocab_size, (2, options.batch, config.block_size), device=place)

    def many() -> None:
        for _ in range(options.updates):
            step(x, y)

    many()  # compiles
    reset_peak(place)
    pace = median(common.seconds(many, place) for _ in range(options.rounds)) / options.updates
    return {
        "ms": 1000 * pace,
        "tokens_per_s": x.numel() / pace,
        "peak_gib": common.peak_memory(place) / 1024,
    }


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=5, help="in one timing")
    parser.add_argument("--small", action="store_true", help="a tiny model")
    options = parser.parse_args()
    place = place_of(options)
    torch.set_float32_matmul_precision("high")
    with Results("gpu-memory", options) as results:
        for compiled in ("",) if options.small else ("", "default"):
            for name, config in (TINY if options.small else MODELS).items():
                for mode in MODES:
                    row = {
                        "model": name,
                        "batch": f"{options.batch} x {config.block_size}",
                        "compiled": compiled or "no",
                        "checkpoint": mode,
                    }
                    results.add(row | attempt(partial(measure, config, mode, compiled, place, options)))


if __name__ == "__main__":
    main()
