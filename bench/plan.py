"""The memory that `nanogpt plan` predicts for an update, against the memory that a real one takes.

Run:    python bench/plan.py
For each shape and way of activation checkpointing, two updates of two micro-batches run in a process of their
own; one shape also runs in two processes, of which the larger peak counts. On a GPU the measurement is the
allocator's peak. On a CPU it is the resident memory above that of the imports; the C library is told to
return freed memory at once, since otherwise it keeps up to half as much again.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import common
import torch
from rich.console import Console
from rich.table import Table

from nanogpt.cli.plan import CHECKPOINT_MODES
from nanogpt.config import TrainConfig, model_config
from nanogpt.distributed import parallelize
from nanogpt.distributed.world import distributed_world, local_device
from nanogpt.machine.device import autocast, pick_device
from nanogpt.model.gpt import GPT
from nanogpt.training import memory_estimate
from nanogpt.training.optimizer import build_optimizers
from nanogpt.units import MIB

SHAPES = {
    "6 layers of 384, 16 x 256": (65, TrainConfig(batch_size=16)),
    "12 layers of 256, 8 x 512, qwen3": (
        4096,
        TrainConfig(
            n_layer=12, n_embd=256, n_head=4, n_kv_head=2, batch_size=8, block_size=512,
            positions="rope", norm="rmsnorm", mlp="swiglu", qk_norm=True, bias=False, optimizer="muon",
            dropout=0.0,
        ),
    ),
    "6 layers of 768, 2 x 1024, GPT-2's vocabulary": (
        50_257,
        TrainConfig(n_layer=6, n_embd=768, n_head=12, batch_size=2, block_size=1024, dropout=0.0),
    ),
    "8 layers of 768, 2 x 256": (
        65, TrainConfig(n_layer=8, n_embd=768, n_head=12, batch_size=2, dropout=0.0)
    ),
}  # fmt: skip

TWO_PROCESS_SHAPE = "8 layers of 768, 2 x 256"
"""The shape that is measured in two processes too."""


def measure(vocab_size: int, config: TrainConfig, dtype: torch.dtype) -> float:
    """Run two updates in this process. Returns their peak memory in MiB."""
    device = pick_device("auto")
    warm_up(device, dtype)
    with distributed_world() as world:
        device = pick_device(local_device("auto", world))
        before = common.peak_memory(device)
        torch.manual_seed(1)
        sharded = config.parallel == "fsdp"
        with torch.device("meta" if sharded else device):
            model = GPT(model_config(config, vocab_size))
        parallelize.checkpoint_activations(model, config.grad_checkpoint)
        if sharded:
            parallelize.shard(model, device, dtype)
            parallelize.initialize_shards(model, 1)
        loss_of = parallelize.distributed_loss(model, world, device)
        optimizers = build_optimizers(model, config, torch.bfloat16, world.rank, world.size)
        x, y = torch.randint(vocab_size, (2, config.batch_size, config.block_size), device=device)
        for _ in range(2):
            for last in (False, True):
                with parallelize.sync_gradients(loss_of, when=last):
                    with autocast(device, dtype):
                        loss = loss_of(x, y)
                    loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            parallelize.zero_grad(model, loss_of)
        return max(world.all_gather([common.peak_memory(device) - before]))


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Run a small update, so that the libraries allocate what they keep."""
    layer = torch.nn.Linear(64, 64).to(device)
    with autocast(device, dtype):
        loss = layer(torch.ones(64, 64, device=device)).sum()
    loss.backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()


def measure_in_subprocess(*words: str, processes: int) -> float:
    """Run `measure` in a process of its own, or in several. Returns MiB."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [
        sys.executable,
        *(launcher if processes > 1 else []),
        str(Path(__file__).resolve()),
        "--child",
        *words,
    ]
    answer = subprocess.run(
        command, env=os.environ | common.EXACT_MALLOC, check=True, capture_output=True, text=True
    )
    return float(json.loads(answer.stdout.splitlines()[0]))


def main() -> None:
    """Predict, measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--child", nargs=4, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        shape, mode, kind, dtype = options.child
        vocab_size, config = SHAPES[shape]
        config = replace(config, grad_checkpoint=mode, parallel=kind)
        most = measure(vocab_size, config, getattr(torch, dtype))
        if os.environ.get("RANK", "0") == "0":
            print(most)
        return
    device, dtype = pick_device("auto"), getattr(torch, options.dtype)
    table = Table("shape", "mode", "predicted, MiB", "measured, MiB", "ratio", title=options.dtype)
    rows: list[dict[str, object]] = []
    cases = [(shape, mode, "ddp", 1) for shape in SHAPES for mode in CHECKPOINT_MODES]
    cases += [(TWO_PROCESS_SHAPE, mode, kind, 2) for kind in ("ddp", "fsdp") for mode in CHECKPOINT_MODES]
    for shape, mode, kind, processes in cases:
        vocab_size, config = SHAPES[shape]
        config = replace(config, grad_checkpoint=mode, parallel=kind)
        model = model_config(config, vocab_size)
        memory = memory_estimate.predict(model, config, device, dtype, config.batch_size, processes)
        predicted = memory.total / MIB
        measured = measure_in_subprocess(shape, mode, kind, options.dtype, processes=processes)
        name = f"{shape}, {kind} on 2" if processes > 1 else shape
        table.add_row(name, mode, f"{predicted:,.0f}", f"{measured:,.0f}", f"{predicted / measured:.3f}")
        rows.append({"shape": name, "mode": mode, "predicted": predicted, "measured": measured})
    Console(width=110).print(table)
    common.write_json("plan", {"dtype": options.dtype, "rows": rows})


if __name__ == "__main__":
    main()
