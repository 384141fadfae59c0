"""How the cost of an update grows: with layers, width, context and batch.

Run:    python bench/cost.py
From one shape, each of them is doubled and doubled again. Time: a whole update with AdamW, one of each shape
in turn. Operations: by the formula of model.flops_per_token. Memory: as counted by nanogpt plan.
"""

import argparse
import statistics
from dataclasses import replace

import common
import torch
from rich.console import Console
from rich.table import Table

from nanogpt.config import TrainConfig, model_config
from nanogpt.machine import device
from nanogpt.model.size import flops_per_token, meta_model
from nanogpt.training import memory_estimate
from nanogpt.units import MIB

BASE = TrainConfig(n_layer=4, n_head=4, n_embd=256, block_size=128, batch_size=8, dropout=0.0)

VOCABULARY = 65


def shapes() -> dict[str, TrainConfig]:
    """The base, and each of its sizes twice and four times as large."""
    found = {"base": BASE}
    for name in ("n_layer", "n_embd", "block_size", "batch_size"):
        for factor in (2, 4):
            larger = replace(BASE, **{name: factor * getattr(BASE, name)})
            if name == "n_embd":  # heads of the same width
                larger = replace(larger, n_head=factor * BASE.n_head)
            found[f"{name} x {factor}"] = larger
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    options = parser.parse_args()
    place, dtype = device.pick_device("auto"), getattr(torch, options.dtype)
    steps, costs = {}, {}
    for name, config in shapes().items():
        model = model_config(config, VOCABULARY)
        step = common.our_step(model, dtype, place, settings=config)
        x, y = torch.randint(VOCABULARY, (2, config.batch_size, config.block_size), device=place)
        steps[name] = lambda step=step, x=x, y=y: step(x, y)
        network = meta_model(model)
        plan = memory_estimate.predict(model, config, place, dtype, config.batch_size)
        costs[name] = {
            "parameters": network.num_parameters(),
            "gflop": flops_per_token(network) * x.numel() / 1e9,
            "held_mib": plan.held / MIB,
            "activations_mib": plan.activations / MIB,
        }
    times = common.in_turn(steps, options.rounds, place)
    table = Table("shape", "parameters", "GFLOP", "ms", "GFLOP/s", "held, MiB", "activations, MiB")
    base = costs["base"] | {"ms": 1000 * statistics.median(times["base"][1:])}
    for name, row in costs.items():
        row["ms"] = 1000 * statistics.median(times[name][1:])
        cells = [
            f"{row[key]:,.{digits}f} ({row[key] / base[key]:.1f})"
            for key, digits in (("parameters", 0), ("gflop", 1), ("ms", 0))
        ]
        cells.append(f"{row['gflop'] / row['ms'] * 1000:,.0f}")
        cells += [f"{row[key]:,.0f} ({row[key] / base[key]:.1f})" for key in ("held_mib", "activations_mib")]
        table.add_row(name, *cells)
    Console(width=110).print(table)
    size = f"{BASE.n_layer} layers of {BASE.n_embd}, {BASE.batch_size} x {BASE.block_size}"
    print(f"base: {size}, {options.dtype}; in brackets: of the base")
    common.write_json("cost", {"dtype": options.dtype, "rows": costs})


if __name__ == "__main__":
    main()
