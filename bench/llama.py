"""Sampling against llama.cpp, one text, on the CPU: tokens a second with the same weights.

Run:    python bench/llama.py                       the default model after one update; needs data/
        python bench/llama.py --checkpoint out/ckpt.pt
Exports the checkpoint to GGUF in f32, bf16 and q8_0, and samples greedily with as many threads here and there
(llama.cpp through xllamacpp, with its usual flash attention), in turn; medians. llama.cpp tells its own pace,
without what its server adds to it; ours is that of the whole loop. Writes bench/llama.json. Needs the dev
extra.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
from rich.console import Console
from rich.table import Table

from nanogpt.checkpoint.format import load_model
from nanogpt.inference.generate import generate
from nanogpt.machine.device import autocast, eager_mode
from nanogpt.model.quantize import prepare_for_sampling
from nanogpt.native.step import native_problem

ROOT = common.FOLDER.parent
KINDS = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}
"""Our weights, and llama.cpp's nearest."""

PROMPT = 8
"""Tokens of the prompt."""


def serve(path: str) -> None:
    """Serve a model of llama.cpp until standard input ends, in this process; prints its address."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library prints on standard output, too
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 256, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    print(server.listening_address, file=answers, flush=True)
    sys.stdin.read()
    os._exit(0)  # the destructor of the library aborts


def theirs(address: str, ids: list[int], count: int) -> float:
    """Tokens a second of llama.cpp."""
    body = {"prompt": ids, "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    request = urllib.request.Request(
        f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        timings = json.load(response)["timings"]
    assert timings["predicted_n"] == count, timings
    return timings["predicted_per_second"]


def ours(path: Path, kind: str) -> Any:
    """A function that samples so many tokens with our weights of a kind."""
    model, _ = load_model(path, "cpu")
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    quantization = kind if kind == "int8" else "none"
    prepare_for_sampling(model, dtype, quantization, by_columns=bool(native_problem()))

    def run(ids: list[int], count: int) -> None:
        with eager_mode(), autocast(common.CPU, dtype):
            for _ in generate(model, torch.tensor([ids]), num_tokens=count, temperature=0):
                pass

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", help="used by the script itself")
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = options.checkpoint or Path(folder) / "out" / "last.pt"
        if options.checkpoint is None:
            call("train.py", "--out_dir", f"{folder}/out", "--max_iters", "1", "--eval_iters", "1")
        results = [compare(path, Path(folder), kind, options.rounds) for kind in KINDS]
    table = Table("weights", "ours, tokens/s", "llama.cpp's", "llama.cpp, tokens/s", "ours / theirs")
    for row in results:
        table.add_row(*(f"{cell:,.2f}" if isinstance(cell, float) else cell for cell in row.values()))
    Console().print(table)
    common.write_json("llama", results)


def compare(path: Path, folder: Path, kind: str, rounds: int) -> dict[str, str | float]:
    """Our pace and theirs, in turn."""
    exported = folder / f"{KINDS[kind]}.gguf"
    export = (
        "--checkpoint",
        str(path),
        "--format",
        "gguf",
        "--dtype",
        KINDS[kind],
        "--output",
        str(exported),
    )
    call("-m", "nanogpt", "export", *export)
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(exported)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert server.stdin
    assert server.stdout
    address, sample, count = server.stdout.readline().strip(), ours(path, kind), 256 - 2 * PROMPT
    ids, paces = list(range(1, PROMPT + 1)), list[tuple[float, float]]()
    for _ in range(rounds + 1):
        seconds = common.seconds(lambda: sample(ids, count))
        paces.append((count / seconds, theirs(address, ids, count)))
    server.stdin.close()
    server.wait(30)
    own, other = zip(*paces[1:], strict=True)
    ratio = median(a / b for a, b in paces[1:])
    names = ("weights", "ours", "theirs", "llama.cpp", "ratio")
    return dict(zip(names, (kind, median(own), KINDS[kind], median(other), ratio), strict=True))


def call(*words: str) -> None:
    """Run a command of ours."""
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)


if __name__ == "__main__":
    main()
