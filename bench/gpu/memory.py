"""What checkpointing activations saves on a GPU, and what it costs: GPT-2 124 M and 350 M.

Run:    python bench/gpu/memory.py
Synthetic tokens, bfloat16, AdamW; each way of checkpointing compiled and not. Peak: the most that PyTorch's
allocator held during an update, weights, gradients and moments included.
Prints a table, writes bench/gpu-memory.json. Needs a CUDA GPU.
"""

import argparse
import gc
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import torch
from rich.console import Console
from rich.table import Table

from nanogpt import presets
from nanogpt.config import GPTConfig, GradCheckpoint, TrainConfig, model_config

SMALL = model_config(presets.get("gpt2"), vocab_size=50_304)

MODELS = {"GPT-2 124 M": SMALL, "GPT-2 350 M": replace(SMALL, n_layer=24, n_head=16, n_embd=1024)}

MODES: tuple[GradCheckpoint, ...] = ("off", "selective", "blocks")

PLACE = torch.device("cuda")

UPDATES = 5
"""Updates in one timing: the clock waits for the device once."""


def measure(
    config: GPTConfig, batch_size: int, mode: GradCheckpoint, compiled: str, rounds: int
) -> dict[str, float]:
    """Milliseconds and tokens per second of an update, and its peak in GiB; empty if it does not fit."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()
    try:
        step = common.our_step(config, torch.bfloat16, PLACE, compiled, TrainConfig(grad_checkpoint=mode))
        x, y = torch.randint(config.vocab_size, (2, batch_size, config.block_size), device=PLACE)

        def many() -> None:
            for _ in range(UPDATES):
                step(x, y)

        many()  # compiles
        pace = median(common.seconds(many, PLACE) for _ in range(rounds)) / UPDATES
    except torch.OutOfMemoryError:
        return {}
    return {
        "ms": 1000 * pace,
        "tokens_per_s": x.numel() / pace,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu needs a CUDA GPU")
    torch.set_float32_matmul_precision("high")
    table = Table("model", "compiled", "checkpoint", "ms a step", "tokens/s", "peak GiB")
    results: list[dict[str, object]] = []
    for name, config in MODELS.items():
        for compiled in ("", "default"):
            for mode in MODES:
                row = measure(config, options.batch, mode, compiled, options.rounds)
                results.append({"model": name, "compiled": compiled or "no", "checkpoint": mode} | row)
                cells = (
                    (f"{row['ms']:,.1f}", f"{row['tokens_per_s']:,.0f}", f"{row['peak_gib']:.2f}")
                    if row
                    else ("out of memory", "", "")
                )
                table.add_row(name, compiled or "no", mode, *cells)
    Console().print(table)
    print(f"{options.batch} x 1,024 tokens on {torch.cuda.get_device_name()}")
    common.write_json("gpu-memory", {"batch": options.batch, "steps": results})


if __name__ == "__main__":
    main()
