"""Training steps a second on a GPU: the default model and GPT-2 124 M, compiled in several ways.

Run:    python bench/gpu/throughput.py                        everything, quick ways of compiling first
        python bench/gpu/throughput.py --modes "" default     two ways of compiling, "" being none
        python bench/gpu/throughput.py --small --device cpu   tries the script
Kinds of step, on synthetic tokens: "train" is trainer.train_step as the command runs it (batch, guard
against numbers that are not finite, clipping, optimizers, average, the numbers read one step late); "bare"
is forward, backward, clip and optimizers on one batch that lies on the device. The difference is the host's
work. "graph" is "train" captured as a CUDA graph, whatever the size of the model: where it is faster says
what MAX_GRAPH_FLOPS (training/cuda_graph.py) should be. GPT-2's vocabulary is measured as it is (50,257,
padded by kernels.Head) and as a multiple of 128 (50,304). MFU is
against a large matrix product in the same dtype, measured in the same run.
Writes gpu-throughput.jsonl row by row; a row that does not fit says so. "bare" needs torch, numpy and psutil,
"train" also rich and filelock. GPT-2 at 32 x 1024 takes about 40 GiB: give --gpt2_batch 8 to a
smaller card.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import common
import numpy as np
import torch
from rows import Results, attempt, fresh, parser_of, place_of, reset_peak

from nanogpt import presets
from nanogpt.config import TrainConfig, model_config
from nanogpt.data.config import PrepareConfig
from nanogpt.machine.device import kind_of
from nanogpt.model.size import flops_per_token, meta_model

MODES = ("", "default", "reduce-overhead", "max-autotune-no-cudagraphs")
"""Ways to compile, the quick ones first; "" is not at all."""

KINDS = ("bare", "train", "graph")

PADDED = 50_304
"""GPT-2's 50,257 tokens, rounded up to a multiple of 128, as kernels like them."""

Update = Callable[[], None]


class Case(NamedTuple):
    """A model, its batch and its optimizer."""

    name: str
    config: TrainConfig
    vocab_size: int


def cases(options: argparse.Namespace) -> list[Case]:
    """What is measured."""
    if options.small:
        tiny = TrainConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, batch_size=4)
        return [Case("tiny", tiny, 65), Case("tiny", replace(tiny, optimizer="muon"), 5000)]
    default = TrainConfig()
    muon = replace(default, optimizer="muon")
    batch = options.gpt2_batch
    gpt2 = replace(presets.get("gpt2"), batch_size=batch, gradient_accumulation_steps=1)
    return [
        Case("default, 64 x 256", default, 65),
        Case("default, 64 x 256", muon, 65),
        Case("default without dropout", replace(muon, dropout=0.0), 65),
        Case(f"GPT-2 124 M, {batch} x 1024", gpt2, presets.PRESETS["gpt2"].vocab_size),
        Case(f"GPT-2 124 M, {batch} x 1024, padded", gpt2, PADDED),
    ]


def bare_update(case: Case, mode: str, place: torch.device, dtype: torch.dtype) -> Update:
    """Forward, backward, clip and optimizers, always on the same batch."""
    config = model_config(case.config, case.vocab_size)
    step = common.our_step(config, dtype, place, mode, case.config)
    shape = (2, case.config.batch_size, case.config.block_size)
    x, y = torch.randint(case.vocab_size, shape, device=place)
    return lambda: step(x, y)


def train_update(  # noqa: PLR0917
    case: Case, mode: str, place: torch.device, dtype: torch.dtype, folder: Path, captured: bool = False
) -> Update:
    """An update as the command makes it: its numbers are read when the next one has been queued."""
    from nanogpt.checkpoint.run_dir import RunFolder
    from nanogpt.training import trainer
    from nanogpt.training.cuda_graph import UpdateGraph
    from nanogpt.training.results import read_result
    from nanogpt.training.setup import set_up

    config = replace(
        case.config,
        data_dir=str(prepared(case.vocab_size, folder)),
        out_dir=str(folder / "out"),
        overwrite=True,
        device=str(place),
        dtype=str(dtype).removeprefix("torch."),
        micro_batch=case.config.batch_size,  # out of memory is a result here, and not to be halved away
    )
    with contextlib.redirect_stdout(io.StringIO()):
        run = set_up(config, RunFolder(folder / "out"))
    if mode:
        run.loss_fn = torch.compile(run.loss_fn, mode=mode, dynamic=False)
    if captured:
        run.graph = UpdateGraph(trainer.update, trainer.next_batch)
    queued = [trainer.train_step(run)]

    def update() -> None:
        queued.append(trainer.train_step(run))
        read_result(run, queued.pop(0))
        if captured and run.graph is None:
            raise RuntimeError("the update could not be captured")

    return update


def prepared(vocab_size: int, folder: Path) -> Path:
    """A data folder of random text with so many different characters, written once for each number."""
    from nanogpt.data.prepare import prepare

    data = folder / f"data-{vocab_size}"
    if not (data / "vocab.pt").exists():
        data.mkdir(exist_ok=True)
        alphabet = np.arange(0x100, 0x100 + vocab_size)  # no line ends, no surrogates
        random = np.random.default_rng(1).choice(alphabet, 1_000_000)
        text = folder / f"{vocab_size}.txt"
        text.write_text("".join(map(chr, [*alphabet, *random])), "utf-8")
        with contextlib.redirect_stdout(io.StringIO()):
            prepare(PrepareConfig(input_file=(str(text),), data_dir=str(data)))
    return data


def measure(
    make: Callable[[], Update], case: Case, place: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """Pace, speed and memory of an update. The clock waits for the device once in options.updates."""
    fresh(place)
    torch.manual_seed(1)
    update = make()

    def many() -> None:
        for _ in range(options.updates):
            update()

    many()  # compiles
    reset_peak(place)
    pace = median(common.seconds(many, place) for _ in range(options.rounds)) / options.updates
    return {
        "ms": 1000 * pace,
        "tokens_per_s": case.config.batch_size * case.config.block_size / pace,
        "peak_gib": common.peak_memory(place) / 1024,
    }


def work(case: Case) -> int:
    """Floating-point operations of a token, forward and backward."""
    config = model_config(case.config, case.vocab_size)
    return flops_per_token(meta_model(config))


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--modes", nargs="+", default=MODES, help='ways to compile; "" or no: not at all')
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--only", default="", help="only models whose name has this in it")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--gpt2_batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=20, help="in one timing")
    parser.add_argument("--small", action="store_true", help="tiny models")
    options = parser.parse_args()
    place, dtype = place_of(options), getattr(torch, options.dtype)
    torch.set_float32_matmul_precision("high")
    size = 256 if options.small else None
    with Results("gpu-throughput", options) as results, tempfile.TemporaryDirectory() as folder:
        peak = common.ceiling(dtype, place, size)
        results.add({"model": f"matrix products, {options.dtype}", "tflops": peak / 1e12})
        for mode in ("" if mode == "no" else mode for mode in options.modes):
            for case in (case for case in cases(options) if options.only in case.name):
                makers = {
                    "bare": partial(bare_update, case, mode, place, dtype),
                    "train": partial(train_update, case, mode, place, dtype, Path(folder)),
                    "graph": partial(train_update, case, mode, place, dtype, Path(folder), captured=True),
                }
                with_graph = kind_of(place).graphs is not None and mode != "reduce-overhead"
                for kind in (kind for kind in options.kinds if with_graph or kind != "graph"):
                    row = {
                        "model": case.name,
                        "vocabulary": case.vocab_size,
                        "optimizer": case.config.optimizer,
                        "compiled": mode or "no",
                        "step": kind,
                    }
                    row |= attempt(partial(measure, makers[kind], case, place, options))
                    if "tokens_per_s" in row:
                        row["tflops"] = row["tokens_per_s"] * work(case) / 1e12
                        row["mfu"] = row["tflops"] * 1e12 / peak
                    results.add(row)


if __name__ == "__main__":
    main()
