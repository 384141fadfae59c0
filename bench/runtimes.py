"""Sampling one text on the CPU, in tokens a second: an exported model in other programs, and here.

Run:    python bench/runtimes.py                         the default model after one update; needs data/
        python bench/runtimes.py --checkpoint out/ckpt.pt
        python bench/runtimes.py --tokens 4 --rounds 1   tries the script
The checkpoint is exported in f32 to each format; every program samples greedily with as many threads, in
turn; the page, in headless Chromium, has 8 bits alone. The table shows medians, and how many tokens are ours
up to the first that is not. transformers uses its cache, onnxruntime a loop in Python; llama.cpp and the page
tell their own pace. Writes bench/runtimes.json. Needs the dev extra and Chromium.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from statistics import median

import common
import llama
import numpy as np
import page
import torch
from rich.console import Console
from rich.table import Table

from nanogpt.checkpoint.format import load_checkpoint, load_model
from nanogpt.export.registry import FORMATS, export
from nanogpt.export.source import TrainedModel
from nanogpt.inference.generate import generate
from nanogpt.machine.device import eager_mode
from nanogpt.model.quantize import prepare_for_sampling
from nanogpt.native.step import native_problem
from nanogpt.tokenizer.registry import from_dict

Sample = Callable[[list[int], int], tuple[list[int], float]]
"""A prompt and a number of tokens -> these tokens, and the seconds that they took."""


def exported(checkpoint: Path, name: str, output: Path) -> Path:
    """Export a checkpoint. Returns the path of the export."""
    saved, dtype = load_checkpoint(checkpoint), "f32" if "f32" in FORMATS[name].dtypes else None
    export(TrainedModel(output.stem, saved, from_dict(saved.tokenizer)), name, output, dtype=dtype)
    return output


@contextmanager
def ours(checkpoint: Path, folder: Path) -> Generator[Sample]:
    """NanoGPT itself."""
    del folder
    model, _ = load_model(checkpoint, "cpu")
    prepare_for_sampling(model, torch.float32, "none", by_columns=bool(native_problem()))

    def sample(ids: list[int], count: int) -> tuple[list[int], float]:
        start = time.perf_counter()
        with eager_mode():
            tokens = [*generate(model, torch.tensor([ids]), num_tokens=count, temperature=0)]
        return [int(token) for token in tokens], time.perf_counter() - start

    yield sample


@contextmanager
def in_transformers(checkpoint: Path, folder: Path) -> Generator[Sample]:
    """Hugging Face's transformers."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(exported(checkpoint, "hf", folder / "hf")).eval()

    def sample(ids: list[int], count: int) -> tuple[list[int], float]:
        start, prompt = time.perf_counter(), torch.tensor([ids])
        tokens = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        return tokens[0, len(ids) :].tolist(), time.perf_counter() - start

    yield sample


@contextmanager
def in_llama_cpp(checkpoint: Path, folder: Path) -> Generator[Sample]:
    """llama.cpp, in a process of its own (bench/llama.py)."""
    path = exported(checkpoint, "gguf", folder / "model.gguf")
    server = subprocess.Popen(
        [sys.executable, llama.__file__, "--serve", str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert server.stdin
    assert server.stdout
    address = server.stdout.readline().strip()

    def sample(ids: list[int], count: int) -> tuple[list[int], float]:
        body = {
            "prompt": ids, "n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False,
            "return_tokens": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)
        return answer["tokens"], count / answer["timings"]["predicted_per_second"]

    try:
        yield sample
    finally:
        server.stdin.close()
        server.wait(30)


@contextmanager
def in_onnxruntime(checkpoint: Path, folder: Path) -> Generator[Sample]:
    """Onnxruntime."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    folder = exported(checkpoint, "onnx", folder / "onnx")
    session = InferenceSession(folder / "onnx" / "model.onnx", options)
    sizes = {"batch_size": 1, "past_sequence_length": 0}
    empty = {
        given.name: np.zeros([sizes.get(size, size) for size in given.shape], np.float32)
        for given in session.get_inputs()
        if given.name.startswith("past")
    }

    def sample(ids: list[int], count: int) -> tuple[list[int], float]:
        start, cache, tokens, new = time.perf_counter(), empty, list[int](), ids
        for _ in range(count):
            seen, tokens = len(tokens), tokens + new
            inputs = {
                "input_ids": np.array([new], np.int64),
                "attention_mask": np.ones((1, len(tokens)), np.int64),
                "position_ids": np.arange(seen, len(tokens), dtype=np.int64)[None],
            }
            logits, *present = session.run(None, inputs | cache)
            cache, new = dict(zip(cache, present, strict=True)), [int(logits[0, -1].argmax())]
        return (tokens + new)[len(ids) :], time.perf_counter() - start

    yield sample


@contextmanager
def in_a_page(checkpoint: Path, folder: Path) -> Generator[Sample]:
    """The exported page in Chromium, whose weights have 8 bits."""
    tokenizer = from_dict(load_checkpoint(checkpoint).tokenizer)
    path = exported(checkpoint, "html", folder / "model.html")
    with page.chromium() as browser:
        opened = page.opened(browser, path)
        yield lambda ids, count: ([], count / page.rate_of(opened, tokenizer.decode(ids), count))


RUNTIMES: dict[str, Callable[[Path, Path], AbstractContextManager[Sample]]] = {
    "ours": ours,
    "transformers": in_transformers,
    "llama.cpp": in_llama_cpp,
    "onnxruntime": in_onnxruntime,
    "the page, int8": in_a_page,
}
"""Name -> a context with what samples; it is given a checkpoint, and a folder to export to."""


def compare(checkpoint: Path, folder: Path, count: int, rounds: int) -> list[dict[str, str | float]]:
    """The pace of all, in turn; the first round warms up."""
    prompt = list(range(1, llama.PROMPT + 1))
    with ExitStack() as stack:
        samples = {name: stack.enter_context(make(checkpoint, folder)) for name, make in RUNTIMES.items()}
        turns = [{name: sample(prompt, count) for name, sample in samples.items()} for _ in range(rounds + 1)]
    paces = {name: median(count / turn[name][1] for turn in turns[1:]) for name in samples}
    tokens = {name: turns[0][name][0] for name in samples}
    return [
        {
            "runtime": name,
            "tokens_per_s": pace,
            "of_ours": pace / paces["ours"],
            "same_tokens": common_prefix(tokens[name], tokens["ours"]) if tokens[name] else "",
        }
        for name, pace in paces.items()
    ]


def common_prefix(a: list[int], b: list[int]) -> int:
    """Number of tokens before two texts differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=240, help="no more than the context holds after 8")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.checkpoint or Path(folder) / "out" / "last.pt"
        if options.checkpoint is None:
            llama.call("train.py", "--out_dir", f"{folder}/out", "--max_iters", "1", "--eval_iters", "1")
        results = compare(path, Path(folder), options.tokens, options.rounds)
    table = Table("runtime", "tokens/s", "of ours", f"tokens as ours, of {options.tokens}")
    for row in results:
        name, pace, ratio, same = row.values()
        table.add_row(str(name), f"{pace:,.0f}", f"{ratio:.2f}", str(same))
    Console().print(table)
    common.write_json("runtimes", results)


if __name__ == "__main__":
    main()
