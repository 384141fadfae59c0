"""What checkpointing activations saves, and what it costs.

Run:    python bench/memory.py --n_layer 6 --n_embd 384 --batch_size 16
Each mode in a process of its own, in turn. kept: what autograd holds between forward and backward pass. peak:
the most memory of a training step above that of weights and gradients, with what is only needed for a moment
(on a CPU resident memory, on a GPU the allocator's). A step is forward and backward: what the optimizer
keeps does not depend on the mode.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import common
import torch
from rich.console import Console
from rich.table import Table

from nanogpt import device, parallel
from nanogpt.model import GPT, GPTConfig

MODES = ("off", "selective", "blocks")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """MiB of activations, kept and at the peak, and milliseconds of a step, in this process."""
    place = device.pick_device("auto")
    model = GPT(
        GPTConfig(
            vocab_size=65,
            block_size=options.block_size,
            n_layer=options.n_layer,
            n_head=options.n_embd // 64,
            n_embd=options.n_embd,
            dropout=0.2,
        )
    ).to(place)
    parallel.checkpoint_activations(model, options.mode)
    dtype = device.pick_dtype(options.dtype, place, options.n_embd)
    x, y = torch.randint(65, (2, options.batch_size, options.block_size), device=place)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before, times = memory(place), []
    for _ in range(options.rounds):
        start = time.perf_counter()
        with device.autocast(place, dtype):
            loss = model.loss(x, y)
        loss.backward()
        device.synchronize(place)
        times.append(time.perf_counter() - start)
    most = peak(place) - before
    return {"kept": kept(model, x, y), "peak": most, "ms": 1000 * statistics.median(times[1:])}


def kept(model: GPT, x: torch.Tensor, y: torch.Tensor) -> float:
    """MiB of tensors that the forward pass keeps for the backward pass, the parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # else an address may be used again

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.loss(x, y)
    return sum(sizes.values()) / 2**20


def memory(place: torch.device) -> float:
    """MiB in use now."""
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
        return torch.cuda.memory_allocated(place) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak(place: torch.device) -> float:
    """The most MiB that were in use."""
    if place.type == "cuda":
        return torch.cuda.max_memory_allocated(place) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure the modes in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in {
        "n_layer": 6,
        "n_embd": 384,
        "block_size": 256,
        "batch_size": 16,
        "rounds": 7,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--mode", default="")
    options = parser.parse_args()
    if options.mode:
        print(json.dumps(measure(options)))
        return
    found: dict[str, dict[str, float]] = {}
    for mode in MODES:
        words = [sys.executable, __file__, *sys.argv[1:], "--mode", mode]
        found[mode] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    shape = f"{options.n_layer} layers of {options.n_embd}, {options.batch_size} x {options.block_size}"
    table = Table("mode", "kept, MiB", "of off", "peak, MiB", "of off", "ms a step", "of off", title=shape)
    for mode, row in found.items():
        cells = [
            (f"{row[key]:,.0f}", f"{row[key] / found['off'][key]:.2f}") for key in ("kept", "peak", "ms")
        ]
        if mode == "selective":
            cells[0] = ("?", "?")  # it keeps products where autograd does not see them
        table.add_row(mode, *(cell for pair in cells for cell in pair))
    Console().print(table)
    common.write_json("memory", {"shape": shape, "modes": found})


if __name__ == "__main__":
    main()
