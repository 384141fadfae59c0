"""Fingerprints of eight small trainings: whether a change of the code changed any number.

Run:    python bench/freeze.py --output before.json          (about a minute)
        python bench/freeze.py --compare before.json         exit code 1 and the differences, if any
Each run is a process of its own, on one thread of the CPU in float32: the figures hold for one machine and
one version of PyTorch. Fingerprints are SHA-256 of the final weights (and their average), of metrics.jsonl
without its times, and of a sample. It knows the commands alone, and what a checkpoint calls its weights.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent

TEXT = "".join(
    f"{number}. The {('owl', 'fox', 'hen', 'cat')[number * number % 7 % 4]} saw {number % 13} {thing}s"
    f"{'!?.,'[number % 11 % 4]}\n\n"
    for number in range(400)
    for thing in (("moon", "pond", "barn")[number % 5 % 3],)
)

COMMON = (
    "--block_size 32 --batch_size 8 --max_iters 20 --warmup_iters 4 --eval_interval 10 --log_interval 1 "
    "--eval_iters 4 --n_layer 2 --n_head 2 --n_embd 32 --learning_rate 0.01 --device cpu --dtype float32 "
    "--seed 7"
)

RUNS = {
    "gpt2 blocks, AdamW, dropout": "--dropout 0.1",
    "qwen3 blocks, Muon": (
        "--norm rmsnorm --positions rope --mlp swiglu --n_kv_head 1 --qk_norm --no-bias --no-tied "
        "--optimizer muon --learning_rate 0.003"
    ),
    "cpu blocks, Muon, trapezoid": (
        "--preset cpu --ngram_vocab 512 --optimizer muon --schedule trapezoid --block_size 32 --batch_size 8"
    ),
    "moving average": "--ema_decay 0.9 --weight_decay 0.2",
    "checkpointing, accumulation": "--grad_checkpoint blocks --gradient_accumulation_steps 4 --dropout 0.2",
    "byte-pair tokens": "--data_dir bpe --dropout 0.1",
    "two processes": "--gradient_accumulation_steps 2 --ema_decay 0.9",
    "two processes, FSDP": "--parallel fsdp --optimizer muon",
}
"""Flags of each run; those of two processes say so in their names."""


def main() -> int:
    """Print, write or compare the fingerprints. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, help="write them here")
    parser.add_argument("--compare", type=Path, help="compare with those in this file")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        found = fingerprints(Path(folder))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    if not args.compare:
        print(json.dumps(found, indent=1))
        return 0
    before = json.loads(args.compare.read_text())
    different = [
        f"{name}: {part}"
        for name in before
        for part in before[name]
        if before[name][part] != found[name][part]
    ]
    print("\n".join(different) or f"all {len(before)} runs as before: weights, metrics and samples")
    return int(bool(different))


def fingerprints(folder: Path) -> dict[str, dict[str, str]]:
    """Train and sample all of RUNS."""
    (folder / "text.txt").write_text(TEXT)
    command(folder, "data.py --input_file text.txt --data_dir data")
    command(folder, "data.py --input_file text.txt --data_dir bpe --tokenizer bpe --vocab_size 300")
    return {name: fingerprint(folder, name) for name in RUNS}


def fingerprint(folder: Path, name: str) -> dict[str, str]:
    """Of the weights, the numbers and a sample of one run."""
    out = f"out-{len(list(folder.iterdir()))}"
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2 " * name.startswith("two processes")
    command(folder, f"{launcher}{ROOT}/train.py {COMMON} --out_dir {out} {RUNS[name]}")
    text = command(folder, f"sample.py --checkpoint {out}/ckpt.pt --num_tokens 60 --seed 1 --device cpu")
    best = torch.load(folder / out / "ckpt.pt", weights_only=True)
    return {
        "weights": digest_of_tensors(best),
        "metrics": hashlib.sha256(numbers(folder / out / "metrics.jsonl").encode()).hexdigest(),
        "sample": hashlib.sha256(text.encode()).hexdigest(),
    }


def digest_of_tensors(checkpoint: dict[str, Any]) -> str:
    """SHA-256 over all weights and averages by name."""
    digest = hashlib.sha256()
    for part in ("model", "average"):
        for name, tensor in sorted(checkpoint[part].items()):
            digest.update(f"{part} {name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def numbers(path: Path) -> str:
    """The lines of metrics.jsonl without what the clock says."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    clocks = {"tokens_per_s", "elapsed_s", "wall_s"}
    return "\n".join(json.dumps({key: row[key] for key in sorted(row.keys() - clocks)}) for row in rows)


def command(folder: Path, line: str) -> str:
    """What a command of ours prints on standard output; it ends all if the command fails."""
    words = line.split()
    if not words[0].startswith("-"):
        words[0] = str(ROOT / words[0])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{line}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
