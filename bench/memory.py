"""What checkpointing activations saves, and what it costs.

Run:    python bench/memory.py --n_layer 6 --n_embd 384 --batch_size 16
Each mode in a process of its own, a step of each in turn. A step is forward and backward: what the optimizer
keeps does not depend on the mode.
kept: what autograd holds between the passes. peak: the most memory of a step, above that of weights and
gradients (on a GPU the allocator's; on a CPU resident memory when the C library gives back at once what is
freed, in a second pass that is not timed). resident: the same as the C library really does it, which keeps
freed memory for the next step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

import common
import torch
from rich.console import Console
from rich.table import Table

from nanogpt.config import GPTConfig
from nanogpt.distributed import parallelize
from nanogpt.machine import device
from nanogpt.model.gpt import GPT

MODES = ("off", "selective", "blocks")


def measure(options: argparse.Namespace) -> None:
    """Print the milliseconds of a step for each line on standard input; at the end, the memory they took."""
    place = device.pick_device("auto")
    torch.manual_seed(1)
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
    parallelize.checkpoint_activations(model, options.mode)
    dtype = getattr(torch, options.dtype)
    x, y = torch.randint(65, (2, options.batch_size, options.block_size), device=place)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = memory(place)

    def step() -> None:
        with device.autocast(place, dtype):
            loss = model.loss(x, y)
        loss.backward()

    for _ in sys.stdin:
        print(1000 * common.seconds(step, place), flush=True)
    most = common.peak_memory(place) - before
    with device.autocast(place, dtype):
        print(json.dumps({"peak": most, "kept": kept(model, x, y)}))


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
    return common.peak_memory(place)


def start(mode: str, exact: bool) -> "subprocess.Popen[str]":
    """A process that measures a mode. exact: on a CPU, with freed memory given back at once."""
    words = [sys.executable, __file__, *sys.argv[1:], "--mode", mode]
    environment = os.environ | (common.EXACT_MALLOC if exact else {})
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environment)


def take_step(process: "subprocess.Popen[str]") -> float:
    """Milliseconds of the next step."""
    assert process.stdin is not None
    assert process.stdout is not None
    print("go", file=process.stdin, flush=True)
    return float(process.stdout.readline())


def compare(rounds: int, *, exact: bool) -> dict[str, dict[str, float]]:
    """Measure the modes: one step of each in turn, so that a busy moment slows all."""
    processes = {mode: start(mode, exact) for mode in MODES}
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        for mode, process in processes.items():
            times[mode].append(take_step(process))
    found: dict[str, dict[str, float]] = {}
    for mode, process in processes.items():
        found[mode] = json.loads(process.communicate()[0])
        pairs = zip(times[mode][1:], times["off"][1:], strict=True)  # the first one of each warms up
        found[mode]["ms"] = statistics.median(times[mode][1:])
        found[mode]["slower"] = statistics.median(ours / theirs for ours, theirs in pairs)
    return found


def main() -> None:
    """Measure the modes and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    sizes = {"n_layer": 6, "n_embd": 384, "block_size": 256, "batch_size": 16, "rounds": 11}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--mode", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode:
        measure(options)
        return
    found = compare(options.rounds, exact=False)
    for mode, row in compare(2, exact=True).items():
        found[mode]["resident"] = found[mode]["peak"]
        found[mode]["peak"] = row["peak"]
    shape = f"{options.n_layer} layers of {options.n_embd}, {options.batch_size} x {options.block_size}"
    title = f"{shape}, {options.dtype}: MiB, and in brackets of off"
    table = Table("mode", "kept", "peak", "resident", "ms a step", "slower", title=title)
    for mode, row in found.items():
        parts = {key: row[key] / found["off"][key] for key in ("kept", "peak", "resident")}
        cells = [f"{row[key]:,.0f} ({part:.2f})" for key, part in parts.items()]
        if mode == "selective":
            cells[0] = "?"  # it keeps products where autograd does not see them
        table.add_row(mode, *cells, f"{row['ms']:,.0f}", f"{row['slower']:.2f}")
    Console().print(table)
    common.write_json("memory", {"shape": shape, "dtype": options.dtype, "modes": found})


if __name__ == "__main__":
    main()
