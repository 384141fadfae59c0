"""Whether `nanogpt plan` foretells the memory of a training.

Run:    python bench/plan.py
For each shape and way of checkpointing: what plan.py predicts, and what two real updates take, each in a
process of its own. On a GPU that is the peak of the allocator. On a CPU it is resident memory above that
of the imports, with the C library told to give back at once what is freed (else it keeps up to half as much
again for later).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import common
import torch
from rich.console import Console
from rich.table import Table

from nanogpt import device, optim, parallel, plan
from nanogpt.config import PlanConfig
from nanogpt.model import GPT
from nanogpt.run import model_config

SHAPES = {
    "6 layers of 384, 16 x 256": PlanConfig(batch_size=16, vocab_size=65),
    "12 layers of 256, 8 x 512, qwen3": PlanConfig(
        n_layer=12, n_embd=256, n_head=4, n_kv_head=2, batch_size=8, block_size=512, vocab_size=4096,
        positions="rope", norm="rmsnorm", mlp="swiglu", qk_norm=True, bias=False, optimizer="muon",
        dropout=0.0,
    ),
    "6 layers of 768, 2 x 1024, GPT-2's vocabulary": PlanConfig(
        n_layer=6, n_embd=768, n_head=12, batch_size=2, block_size=1024, vocab_size=50_257, dropout=0.0
    ),
}  # fmt: skip

EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Settings of glibc."""


def measure(config: PlanConfig) -> float:
    """Bytes that two updates take at their peak, in this process."""
    place = device.pick_device("auto")
    warm_up(place)
    before = used(place)
    torch.manual_seed(1)
    model = GPT(model_config(config, config.vocab_size or 0)).to(place)
    parallel.checkpoint_activations(model, config.grad_checkpoint)
    optimizers = optim.build(model, config)
    x, y = torch.randint(config.vocab_size or 0, (2, config.batch_size, config.block_size), device=place)
    for _ in range(2):
        for _ in range(2):
            model.loss(x, y).backward()
        for optimizer in optimizers:
            optimizer.step()
    return used(place) - before


def warm_up(place: torch.device) -> None:
    """Let the libraries allocate what they keep."""
    layer = torch.nn.Linear(64, 64).to(place)
    layer(torch.ones(64, 64, device=place)).sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()


def used(place: torch.device) -> float:
    """The most bytes that were in use so far."""
    if place.type == "cuda":
        return torch.cuda.max_memory_allocated(place)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Measure, predict and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--child", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        shape, mode = options.child
        print(measure(replace(SHAPES[shape], grad_checkpoint=mode)))
        return
    place = device.pick_device("auto")
    machine = plan.Machine(place, torch.float32, float("inf"))
    table = Table("shape", "mode", "predicted, MiB", "measured, MiB", "ratio")
    rows: list[dict[str, object]] = []
    for shape, config in SHAPES.items():
        for mode in plan.MODES:
            predicted = plan.predict(config, machine, mode, config.batch_size).total / 2**20
            words = [sys.executable, str(Path(__file__).resolve()), "--child", shape, mode]
            answer = subprocess.run(words, env=os.environ | EXACT, check=True, capture_output=True, text=True)
            measured = float(json.loads(answer.stdout)) / 2**20
            table.add_row(shape, mode, f"{predicted:,.0f}", f"{measured:,.0f}", f"{predicted / measured:.3f}")
            rows.append({"shape": shape, "mode": mode, "predicted": predicted, "measured": measured})
    Console().print(table)
    common.write_json("plan", {"rows": rows})


if __name__ == "__main__":
    main()
