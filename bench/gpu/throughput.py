"""Training steps a second on a GPU: the default model and GPT-2 124 M, compiled in several ways.

Run:    python bench/gpu/throughput.py
Synthetic tokens, bfloat16, an update without the guard against numbers that are not finite (AdamW, or Muon).
MFU is against a large matrix product of bfloat16 measured in the same run. Prints a table, writes
bench/gpu-throughput.json. Needs a CUDA GPU with about 40 GiB for GPT-2 at batch 32 x 1024
(give --gpt2_batch 8 to a smaller one).
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
from nanogpt.config import GPTConfig, TrainConfig, model_config
from nanogpt.model import flops_per_token
from nanogpt.summary import count_parameters

DEFAULT = GPTConfig()
GPT2 = model_config(presets.get("gpt2"), vocab_size=50_304)

MODES = ("", "default", "reduce-overhead", "max-autotune-no-cudagraphs")
"""Ways to compile; the first is not at all."""

PLACE = torch.device("cuda")

UPDATES = 20
"""Updates in one timing: the clock waits for the device once."""


def measure(config: GPTConfig, batch_size: int, optimizer: str, mode: str, rounds: int) -> dict[str, float]:
    """Pace, speed and memory of one model, optimizer and way to compile."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()
    step = common.our_step(config, torch.bfloat16, PLACE, mode, TrainConfig(optimizer=optimizer))
    x, y = torch.randint(config.vocab_size, (2, batch_size, config.block_size), device=PLACE)

    def many() -> None:
        for _ in range(UPDATES):
            step(x, y)

    many()  # compiles
    pace = median(common.seconds(many, PLACE) for _ in range(rounds)) / UPDATES
    return {
        "ms": 1000 * pace,
        "tokens_per_s": x.numel() / pace,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpt2_batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--modes", nargs="+", default=MODES)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu needs a CUDA GPU")
    torch.set_float32_matmul_precision("high")
    peak = common.ceiling(torch.bfloat16, PLACE)
    table = Table("model", "optimizer", "compiled", "ms a step", "tokens/s", "MFU", "peak GiB")
    results = []
    cases = [
        ("default, 64 x 256", DEFAULT, 64, "adamw"),
        ("default, 64 x 256", DEFAULT, 64, "muon"),
        ("default without dropout", replace(DEFAULT, dropout=0.0), 64, "muon"),
        (f"GPT-2 124 M, {options.gpt2_batch} x 1024", GPT2, options.gpt2_batch, "adamw"),
    ]
    for name, config, batch_size, optimizer in cases:
        for mode in options.modes:
            row = {"model": name, "optimizer": optimizer, "compiled": mode or "no"}
            row |= measure(config, batch_size, optimizer, mode, options.rounds)
            row["mfu"] = (
                row["tokens_per_s"] * flops_per_token(config, sum(count_parameters(config).values())) / peak
            )
            results.append(row)
            table.add_row(
                name,
                optimizer,
                row["compiled"],
                f"{row['ms']:,.2f}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['mfu']:.0%}",
                f"{row['peak_gib']:.1f}",
            )
    Console().print(table)
    print(f"Matrix products in bf16: {peak / 1e12:.0f} TFLOP/s on {torch.cuda.get_device_name()}")
    common.write_json("gpu-throughput", {"ceiling": peak, "steps": results})


if __name__ == "__main__":
    main()
