"""Sampling, in tokens a second: ours in float32, bfloat16 and int8 against transformers' generate.

Run:    python bench/decode.py                       the default model, batch 1 and 64; some minutes
        python bench/decode.py --checkpoint out/ckpt.pt     guesses (--speculate) with a trained model
        python bench/decode.py --small               tries the script
The same shape and (random) weights in transformers' GPT-2, greedy, the same number of new tokens, with its
usual cache and its static one. All take turns; the table shows medians. Also: the time to the first token;
the part of the memory's bandwidth that reading the weights takes (measured in the same run, with a sum over a
tensor that fits no cache); and the cost of a token late in the context over that of an early one. With a
checkpoint instead: how many tokens a pass gives when guesses are computed along, and how much faster that is.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import common
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from nanogpt.checkpoint.format import load_checkpoint, load_model
from nanogpt.config import GPTConfig
from nanogpt.data.dataset import load_dataset
from nanogpt.inference.config import SamplingParams
from nanogpt.inference.generate import decode, generate
from nanogpt.inference.speculation import MAX_LEARNED, NgramGuesses, Speculator
from nanogpt.inference.steps import StepModel
from nanogpt.machine.device import autocast, eager_mode
from nanogpt.model.gpt import GPT
from nanogpt.model.quantize import linear_bytes, prepare_for_sampling
from nanogpt.native.step import native_problem, with_native_steps

CPU = torch.device("cpu")
PROMPT = 8
"""Tokens of a prompt."""

SPECULATED = 500
"""Tokens of a text with guesses."""

Run = Callable[[Tensor, int], list[float]]
"""Prompts (R, T), number of new tokens -> seconds until each token was there, or until the last was."""


class Way(NamedTuple):
    """A way to sample."""

    name: str
    run: Run
    bytes_read: int
    """Of weights, for each token."""


def ours(config: GPTConfig, kind: str) -> Way:
    """Our model, with weights of a kind."""
    torch.manual_seed(1)
    model = GPT(config).eval()
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    quantization = kind if kind == "int8" else "none"
    prepare_for_sampling(model, dtype, quantization, by_columns=bool(native_problem()))

    def run(prompts: Tensor, count: int) -> list[float]:
        start, times = time.perf_counter(), list[float]()
        with eager_mode(), autocast(CPU, dtype):
            for _ in generate(model, prompts, num_tokens=count, temperature=0):
                times.append(time.perf_counter() - start)
        return times

    return Way(f"ours, {kind}", run, linear_bytes(model))


def theirs(config: GPTConfig, dtype: torch.dtype, cache: str | None) -> Way:
    """The same GPT-2 in transformers."""
    logging.set_verbosity_error()
    torch.manual_seed(1)
    shape = GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
        n_layer=config.n_layer, n_head=config.n_head, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(shape).eval().to(dtype)

    def run(prompts: Tensor, count: int) -> list[float]:
        settings: dict[str, Any] = {"cache_implementation": cache} if cache else {}
        start = time.perf_counter()
        model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, pad_token_id=0, **settings,
        )  # fmt: skip
        return [time.perf_counter() - start]

    size = sum(p.nbytes for p in model.transformer.h.parameters()) + model.lm_head.weight.nbytes
    name = str(dtype).removeprefix("torch.")
    return Way(f"transformers, {name}{', static cache' if cache else ''}", run, size)


def bandwidth() -> float:
    """Bytes a second that a sum reads from a large tensor."""
    large = torch.ones(64 * 2**20)  # 256 MiB
    return large.nbytes / median(common.seconds(large.sum) for _ in range(5))


def measure(ways: list[Way], batch: int, count: int, rounds: int) -> list[dict[str, float]]:
    """Tokens a second, seconds to the first token, and late over early tokens, of each way."""
    prompts = torch.randint(1, 60, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    rows: list[dict[str, list[float]]] = [{"all": [], "first": [], "late": []} for _ in ways]
    for turn in range(rounds + 1):
        for way, row in zip(ways, rows, strict=True):
            times = way.run(prompts, count)
            first = way.run(prompts, 1)[-1]
            if turn:  # the first turn warms up
                row["all"].append(batch * count / times[-1])
                row["first"].append(first)
                if len(times) >= 100:
                    quarter = len(times) // 4
                    early = times[quarter] - times[0]
                    row["late"].append((times[-1] - times[-1 - quarter]) / early)
    return [{name: median(values) for name, values in row.items() if values} for row in rows]


def guesses(path: Path, rounds: int) -> list[dict[str, object]]:
    """Measure and print what guesses gain with a trained model, text by text in turn with none."""
    table = Table("weights", "temperature", "guesses", "learned from", "tokens a pass", "faster")
    results = list[dict[str, object]]()
    for kind in ("float32", "int8"):
        model, tokenizer = load_model(path, "cpu")
        prepare_for_sampling(model, torch.float32, "int8" if kind == "int8" else "none", by_columns=False)
        data = load_dataset(Path(load_checkpoint(path).train_config.data_dir)).train[:MAX_LEARNED]
        prompt = torch.from_numpy(tokenizer.encode("\n").astype(np.int64))
        for temperature in (0, 0.8):
            params = SamplingParams(temperature=temperature)
            for count, learned in itertools.product((1, 2, 4, 8), (None, data)):
                speculator = Speculator(with_native_steps(model), NgramGuesses(learned), count)
                faster = list[float]()
                for seed in range(rounds):
                    times = [
                        common.seconds(partial(sample, way, prompt, params, seed))
                        for way in (speculator, with_native_steps(model))
                    ]
                    faster.append(times[1] / times[0])
                row = {
                    "weights": kind,
                    "temperature": temperature,
                    "guesses": count,
                    "learned from": "text so far" if learned is None else "training",
                    "tokens a pass": rounds * SPECULATED / speculator.passes,
                    "faster": median(faster),
                }
                results.append(row)
                table.add_row(
                    *(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row.values())
                )
    Console().print(table)
    return results


def sample(model: StepModel, prompt: Tensor, params: SamplingParams, seed: int) -> None:
    """Sample SPECULATED tokens."""
    generator = torch.Generator().manual_seed(seed)
    for _ in decode(model, [prompt], params, SPECULATED, generator, observe=None):
        pass


def main() -> None:
    """Measure and print a table for each batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--checkpoint", type=Path, help="measure guesses with this model instead")
    options = parser.parse_args()
    if options.checkpoint:
        common.write_json("decode-guesses", guesses(options.checkpoint, options.rounds))
        return
    config = GPTConfig(vocab_size=65, dropout=0.0)
    if options.small:
        config = GPTConfig(vocab_size=65, dropout=0.0, n_layer=1, n_head=2, n_embd=32, block_size=32)
    ways = [
        *(ours(config, kind) for kind in ("float32", "bfloat16", "int8")),
        theirs(config, torch.float32, None),
        theirs(config, torch.float32, "static"),
        theirs(config, torch.bfloat16, None),
    ]
    count, limit, results = config.block_size - PROMPT, bandwidth(), list[dict[str, object]]()
    for batch in options.batch:
        table = Table(
            "batch",
            "",
            "tokens/s",
            "over transformers",
            "to the first, ms",
            "of the bandwidth",
            "late / early",
        )
        measured = measure(ways, batch, count, options.rounds)
        their_best = max(row["all"] for way, row in zip(ways, measured, strict=True) if "transf" in way.name)
        for way, row in zip(ways, measured, strict=True):
            share = row["all"] / batch * way.bytes_read / limit
            late = f"{row['late']:.2f}" if "late" in row else ""
            cells = [f"{row['all']:,.0f}", f"{row['all'] / their_best:.2f}", f"{1000 * row['first']:.1f}"]
            table.add_row(str(batch), way.name, *cells, f"{share:.0%}", late)
            results.append({"batch": batch, "way": way.name, "bandwidth": share, **row})
        Console().print(table)
    common.write_json("decode", results)


if __name__ == "__main__":
    main()
