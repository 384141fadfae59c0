"""The loss of a large vocabulary: in chunks, and with all logits at once.

Run:    python bench/loss.py                            GPT-2's vocabulary and width, 4,096 positions
        python bench/loss.py --device cuda --positions 32768
Forward and backward in bfloat16, in turn, medians; peak memory of each on a CPU in a process of its own.
Writes bench/loss.json.
"""

import argparse
import subprocess
import sys
from statistics import median

import common
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.model.kernels import chunked_cross_entropy


def whole(x: Tensor, weight: nn.Parameter, targets: Tensor) -> Tensor:
    """All logits, then the loss."""
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def in_chunks(x: Tensor, weight: nn.Parameter, targets: Tensor) -> Tensor:
    """A few positions at a time."""
    head = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    head.weight = weight
    return chunked_cross_entropy(head, lambda logits: logits, x, targets, len(weight))


WAYS = {"all at once": whole, "in chunks": in_chunks}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--vocab_size", type=int, default=50_257)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory_of", help="run one of them once and print the peak memory")
    options = parser.parse_args()
    place = torch.device(options.device)
    x = torch.randn(options.positions, options.width, device=place, requires_grad=True)
    weight = nn.Parameter(torch.randn(options.vocab_size, options.width, device=place).mul_(0.02))
    targets = torch.randint(options.vocab_size, (options.positions,), device=place)

    def run(name: str) -> None:
        x.grad = weight.grad = None
        with torch.autocast(place.type, dtype=torch.bfloat16):
            loss = WAYS[name](x, weight, targets)
        loss.backward()

    def memory(name: str) -> float:
        if place.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run(name)
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        command = [sys.executable, *sys.argv, "--memory_of", name]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    if options.memory_of:
        before = common.peak_memory()
        run(options.memory_of)
        print(common.peak_memory() - before)
        return
    peaks = {name: memory(name) for name in WAYS}
    for name in WAYS:
        run(name)
    times = common.in_turn({name: lambda name=name: run(name) for name in WAYS}, options.rounds, place)
    title = f"{options.positions:,} positions, {options.vocab_size:,} tokens, width {options.width}"
    table = Table("loss", "ms", "MiB", title=title)
    results = {name: {"ms": 1000 * median(times[name]), "mib": peaks[name]} for name in WAYS}
    for name, row in results.items():
        table.add_row(name, f"{row['ms']:,.0f}", f"{row['mib']:,.0f}")
    Console().print(table)
    common.write_json("loss", results)


if __name__ == "__main__":
    main()
