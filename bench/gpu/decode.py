"""Sampling on a GPU, in tokens a second: launch by launch, as a CUDA graph, for requests, with guesses.

Run:    python bench/gpu/decode.py                           the default model and GPT-2 124 M; 1 and 64 texts
        python bench/gpu/decode.py --small --device cpu      tries the script
Greedy, in bfloat16, in turn; medians. "requests": as the server makes them, with continuous batching.
"guesses" is an upper limit: all four of them come true. Writes
gpu-decode.jsonl. Needs torch, numpy, psutil, rich.
"""

import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import common
import torch
from rows import Results, attempt, parser_of, place_of
from torch import Tensor

from nanogpt.config import GPTConfig
from nanogpt.inference.config import SamplingParams
from nanogpt.inference.generate import decode
from nanogpt.inference.scheduler import Request, Scheduler
from nanogpt.inference.speculation import NgramGuesses, Speculator
from nanogpt.inference.steps import StepModel, fastest_steps
from nanogpt.inference.tokens import Token
from nanogpt.machine.device import autocast, eager_mode
from nanogpt.model.gpt import GPT
from nanogpt.model.quantize import prepare_for_sampling

GREEDY = SamplingParams(temperature=0)

MODELS = {
    "default": GPTConfig(vocab_size=65, dropout=0.0),
    "GPT-2 124 M": GPTConfig(
        vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0
    ),
}
SMALL = {"small": GPTConfig(vocab_size=65, block_size=32, n_layer=1, n_head=2, n_embd=32, dropout=0.0)}


class TrueGuesses(NgramGuesses):
    """Guesses a text that is known."""

    def __init__(self, text: list[int]) -> None:
        super().__init__()
        self.text = text

    def next(self, count: int) -> list[int]:
        """What really comes next."""
        return self.text[len(self.tokens) :][:count]


class Sink:
    """Hears a text, and wants all of it."""

    cancelled = False

    def on_prompt(self, tokens: list[Token]) -> None:
        """Nothing to do."""

    def on_token(self, token: Token) -> bool:
        """Go on."""
        return True

    def on_end(self, error: str) -> None:
        """An error is the end of the measuring."""
        assert not error, error


def tokens_of(model: StepModel, prompts: Tensor, count: int) -> list[Tensor]:
    """Sample so many tokens."""
    return list(decode(model, list(prompts), GREEDY, count, None, observe=None))


def serve(model: GPT, prompts: Tensor, count: int, *, graphs: bool) -> None:
    """The same tokens as requests to the scheduler of the server, some rows of whose cache stay free."""
    scheduler = Scheduler(model, rows=len(prompts) + 1, dtype=torch.bfloat16)
    if not graphs:
        scheduler.steps = model
    waiting = deque(Request(prompt, GREEDY, count, 1, Sink()) for prompt in prompts)
    while waiting or scheduler.rows:
        scheduler.step(waiting)


def measure(config: GPTConfig, texts: int, place: torch.device, options: Any) -> dict[str, float]:
    """Tokens a second of each way."""
    torch.manual_seed(1)
    model = GPT(config).eval().to(place)
    prepare_for_sampling(model, torch.bfloat16, "none", by_columns=False)
    prompts = torch.randint(config.vocab_size, (texts, 8), device=place)
    count = config.block_size - 8
    with eager_mode(), autocast(place, torch.bfloat16), torch.no_grad():
        ways: dict[str, Callable[[], object]] = {
            "launches": lambda: tokens_of(model, prompts, count),
            "graph": lambda: tokens_of(fastest_steps(model), prompts, count),
            "requests, launches": lambda: serve(model, prompts, count, graphs=False),
            "requests, graph": lambda: serve(model, prompts, count, graphs=True),
        }
        if texts == 1:
            known = prompts[0].tolist() + torch.cat(tokens_of(model, prompts, count)).tolist()
            ways["guesses"] = lambda: tokens_of(Speculator(model, TrueGuesses(known), 4), prompts, count)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds + 1):
            for name, way in ways.items():
                times[name].append(common.seconds(way, place))
    return {name: round(texts * count / median(found[1:])) for name, found in times.items()}


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a tiny model")
    options = parser.parse_args()
    place = place_of(options)
    with Results("gpu-decode", options) as results, suppress(KeyboardInterrupt):
        chosen = SMALL if options.small else {name: MODELS[name] for name in options.models}
        for name, config in chosen.items():
            for texts in options.texts:
                row = {"model": name, "texts": texts}
                results.add(row | attempt(partial(measure, config, texts, place, options)))


if __name__ == "__main__":
    main()
