"""What the dtype of Muon's Newton-Schulz iteration costs on this machine, and which one is chosen.

Run:    python bench/arithmetic.py
        ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
            python bench/arithmetic.py
        (as a laptop sees it that has AVX2 alone)
Updates of `--preset cpu`, in the dtypes that "auto" chooses and in others, in turn, medians; the last column
is the time of an update with AdamW in float32, pair by pair. Writes bench/arithmetic.json.
"""

import argparse
from dataclasses import replace
from statistics import median

import common
import torch
from rich.console import Console
from rich.table import Table

from nanogpt import presets
from nanogpt.config import TrainConfig, model_config
from nanogpt.machine.device import name_of
from nanogpt.machine.precision import matmul_rates, pick_dtype, pick_muon_dtype

BASE = "AdamW in float32"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    config = presets.get(options.preset)
    shape = model_config(config, vocab_size=65)
    for dtype, rate in matmul_rates(common.CPU).items():
        print(f"Products in {name_of(dtype)}: {rate / 1e9:,.1f} GFLOP/s in one thread")
    chosen, muon = (
        pick_dtype("auto", common.CPU, config.n_embd),
        pick_muon_dtype("auto", common.CPU),
    )
    print(f"Chosen: {name_of(chosen.dtype)} ({chosen.reason}); Muon: {name_of(muon.dtype)} ({muon.reason})")
    adamw = replace(config, optimizer="adamw")
    cases: dict[str, tuple[TrainConfig, torch.dtype, torch.dtype]] = {
        BASE: (adamw, torch.float32, torch.float32),
        f"as chosen: {name_of(chosen.dtype)}, Muon in {name_of(muon.dtype)}": (
            config,
            chosen.dtype,
            muon.dtype,
        ),
        "float32, Muon in float32": (config, torch.float32, torch.float32),
        "float32, Muon in bfloat16": (config, torch.float32, torch.bfloat16),
    }
    steps = {
        name: common.our_step(shape, dtype, settings=settings, muon_dtype=muon_dtype)
        for name, (settings, dtype, muon_dtype) in cases.items()
    }
    x, y = torch.randint(65, (2, config.batch_size, config.block_size))
    actions = {name: lambda step=step: step(x, y) for name, step in steps.items()}
    for action in actions.values():
        action()
    times = common.in_turn(actions, options.rounds)
    table = Table("update", "ms", f"of {BASE}")
    results: dict[str, dict[str, float]] = {}
    for name, column in times.items():
        ratio = median(b / a for a, b in zip(times[BASE], column, strict=True))
        results[name] = {"ms": 1000 * median(column), "ratio": ratio}
        table.add_row(name, f"{results[name]['ms']:,.1f}", f"{ratio:.2f} x")
    Console().print(table)
    common.write_json("arithmetic", {"preset": options.preset, "updates": results})


if __name__ == "__main__":
    main()
