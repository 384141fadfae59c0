"""A training step of ours against the plain loop around transformers' GPT-2.

Run:    python bench/step.py                       the default model, batch 64 x 256, dropout 0.2
        python bench/step.py --small --compile     nanoGPT's laptop model, batch 12 x 64, no dropout
        python bench/step.py --presets speedrun classic cpu --against ../before
                                                   whole updates of presets, here and in another checkout
Ours: bfloat16 on a CPU, our attention, dropout and fused optimizer; with --compile, compiled too.
Theirs: float32, AdamW, gradient clipping, dropout on the same probability (as nanoGPT's loop has
it). All in turn, medians; peak memory of each in a process of its own. MFU is against a matrix
product of bfloat16 measured in the same run. Writes bench/step.json (step-small.json).
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import common
import torch
from common import Step
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from nanogpt.config import GPTConfig

try:
    from nanogpt.model.size import flops_per_token, meta_model
except ModuleNotFoundError:  # in an earlier checkout, with --against
    from nanogpt.model.gpt import flops_per_token, meta_model

ROOT = Path(__file__).resolve().parent.parent

DEFAULT = GPTConfig()
SMALL = replace(DEFAULT, n_layer=4, n_head=4, n_embd=128, block_size=64, dropout=0.0)


def their_model(config: GPTConfig) -> GPT2LMHeadModel:
    """The GPT-2 of transformers in our shape."""
    logging.set_verbosity_error()
    p = config.dropout
    shape = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        resid_pdrop=p,
        embd_pdrop=p,
        attn_pdrop=p,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(shape).train()


def their_update(model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """What a plain loop does with a batch."""
    logits = model(x).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def their_step(config: GPTConfig) -> Step:
    """One update of theirs as a function of a batch."""
    model = their_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    return lambda x, y: their_update(model, optimizer, x, y)


def update_times(preset: str, updates: int = 40) -> list[float]:
    """Milliseconds of updates of a preset on Tiny Shakespeare, as the training loop does them."""
    from nanogpt import presets
    from nanogpt.checkpoint.run_dir import RunFolder
    from nanogpt.training.setup import set_up
    from nanogpt.training.trainer import train_step

    with TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        config = replace(presets.get(preset), data_dir=str(ROOT / "data"), out_dir=folder)
        run = set_up(config, RunFolder(Path(folder)))
        times = [common.seconds(lambda: train_step(run), run.device) for _ in range(updates + 5)]
    return [1000 * seconds for seconds in times[5:]]


def compare_presets(names: Sequence[str], other: Path | None, rounds: int) -> None:
    """Print the updates of presets, of this checkout and another, processes of both in turn."""
    folders = {"here": ROOT} | ({"before": other.resolve()} if other else {})
    table = Table("preset", *(f"{name}, ms" for name in folders), "before / here")
    results = {}
    for preset in names:
        medians: dict[str, list[float]] = {name: [] for name in folders}
        for _ in range(rounds):
            for name, folder in folders.items():
                command = [sys.executable, __file__, "--update_of", preset]
                environment = os.environ | {"PYTHONPATH": str(folder)}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                medians[name].append(median(json.loads(done.stdout.splitlines()[-1])))
        ratio = median(
            b / a for a, b in zip(medians["here"], medians.get("before", medians["here"]), strict=True)
        )
        results[preset] = medians | {"ratio": ratio}
        table.add_row(preset, *(f"{median(column):,.1f}" for column in medians.values()), f"{ratio:.2f} x")
    Console().print(table)
    common.write_json("step-presets", results)


def main() -> None:
    """Measure what the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--compile", action="store_true", help="measure ours compiled, too")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--presets", nargs="+", help="measure whole updates of presets")
    parser.add_argument("--against", type=Path, help="another checkout of the project, for --presets")
    parser.add_argument("--update_of", help="print the milliseconds of 40 updates of a preset")
    parser.add_argument("--memory_of", help="run one of them twice and print its peak memory")
    options = parser.parse_args()
    if options.update_of:
        print(json.dumps(update_times(options.update_of)))
        return
    if options.presets:
        compare_presets(options.presets, options.against, options.rounds or 5)
        return
    compare_steps(options)


def compare_steps(options: argparse.Namespace) -> None:
    """Measure and print our step and that of transformers."""
    config, batch_size = (SMALL, 12) if options.small else (DEFAULT, 64)
    makers: dict[str, Callable[[], Step]] = {
        "ours": lambda: common.our_step(config, torch.bfloat16),
        "ours, compiled": lambda: common.our_step(config, torch.bfloat16, compiled="default"),
        "transformers, float32": lambda: their_step(config),
    }
    if not options.compile:
        del makers["ours, compiled"]
    x, y = torch.randint(config.vocab_size, (2, batch_size, config.block_size))
    if options.memory_of:
        step = makers[options.memory_of]()
        step(x, y)
        step(x, y)
        print(common.peak_memory())
        return

    memory = {name: memory_of(name) for name in makers}
    steps = {name: make() for name, make in makers.items()}
    for step in steps.values():
        for _ in range(2):  # compiles, allocates
            step(x, y)
    rounds = options.rounds or (40 if options.small else 3)
    actions = {name: lambda step=step: step(x, y) for name, step in steps.items()}
    times = common.in_turn(actions, rounds)
    peaks = {
        name: common.ceiling(dtype) for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
    flops = flops_per_token(meta_model(config)) * x.numel()

    shape = f"{config.n_layer} layers of {config.n_embd}, {batch_size} x {config.block_size}"
    table = Table("step", "ms", "tokens/s", "of bf16 ceiling", "peak MiB", "faster", title=shape)
    results = {}
    for name, column in times.items():
        ratio = median(b / a for a, b in zip(column, times["transformers, float32"], strict=True))
        results[name] = {
            "ms": 1000 * median(column),
            "tokens_per_s": x.numel() / median(column),
            "mfu": flops / median(column) / peaks["bf16"],
            "peak_mib": memory[name],
            "ratio": ratio,
        }
        row = results[name]
        table.add_row(
            name,
            f"{row['ms']:,.1f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['mfu']:.0%}",
            f"{memory[name]:,.0f}",
            f"{ratio:.2f} x",
        )
    Console().print(table)
    print(f"Matrix products: {peaks['bf16'] / 1e9:.0f} GFLOP/s in bf16, {peaks['fp32'] / 1e9:.0f} in fp32")
    common.write_json("step-small" if options.small else "step", {"ceilings": peaks, "steps": results})


def memory_of(name: str) -> float:
    """Peak memory of two steps in a process that does nothing else, in MiB."""
    command = [sys.executable, *sys.argv, "--memory_of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
