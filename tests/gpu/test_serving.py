"""What only a GPU can show of texts for many requests. Skipped where there is none (conftest.py)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import Hearer, run

from nanogpt.checkpoint.format import load_model
from nanogpt.config import TrainConfig
from nanogpt.inference.config import SamplingParams
from nanogpt.inference.generate import generate
from nanogpt.inference.inspection import inspect_tokens
from nanogpt.inference.prompts import generators_for
from nanogpt.inference.scheduler import Request, Scheduler
from nanogpt.model.gpt import GPT
from nanogpt.scoring import score
from nanogpt.tokenizer.base import CharTokenizer
from nanogpt.training.fit import fit

from .test_cuda import MODERN

GREEDY = SamplingParams(temperature=0)
SEEDED = SamplingParams(temperature=0.8, top_k=20)


@pytest.fixture(params=[{}, MODERN], ids=["default", "modern"])
def model(config: TrainConfig, request) -> GPT:
    """A trained model on the device, in float32."""
    settings: dict[str, Any] = request.param
    fit(replace(config, dtype="float32", **settings))
    return load_model(Path(config.out_dir) / "ckpt.pt", config.device)[0]


def requests_of(params: SamplingParams) -> list[Request]:
    """Texts that come, grow and end at different times, some of them with the same prompt."""
    prompts, lengths = [[3], [3, 1, 4], [1, 5, 9, 2, 6], [3, 1, 4], [5], [8, 8]], [33, 60, 9, 41, 25, 70]
    return [
        Request(torch.tensor(prompt), params, length, seed, Hearer())
        for seed, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_text_is_the_one_that_it_would_be_alone(model: GPT, params: SamplingParams) -> None:
    requests, device = requests_of(params), next(model.parameters()).device
    scheduler = Scheduler(model, rows=4)
    run(scheduler, requests, arrivals=[0, 0, 3, 5, 20, 21])
    for request in requests:
        assert request.listener.ended == [""]
        generators = generators_for(model, [request.seed])
        prompt = request.prompt.to(device)[None]
        alone = generate(model, prompt, params, num_tokens=request.num_tokens, generator=generators)
        assert request.listener.ids == [int(token) for token in alone]


def test_steps_of_some_rows_are_captured(model: GPT, gpu_alone: torch.device) -> None:
    scheduler = Scheduler(model, rows=4)
    requests = requests_of(GREEDY)
    run(scheduler, requests)
    assert len(scheduler.steps.captured) > 2
    plain = Scheduler(model, rows=4)
    plain.steps, again = model, requests_of(GREEDY)
    run(plain, again)
    assert [one.listener.ids for one in requests] == [one.listener.ids for one in again]


def test_what_a_text_tells_is_what_it_tells_on_a_cpu(model: GPT, config: TrainConfig) -> None:
    tokens = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    on_cpu = load_model(Path(config.out_dir) / "ckpt.pt", "cpu")[0]
    scored = [score(one, tokens.numpy()) for one in (model, on_cpu)]
    assert scored[0] == pytest.approx(scored[1], abs=1e-3)
    letters = CharTokenizer("".join(chr(97 + i) for i in range(model.config.vocab_size)))
    here, there = (
        inspect_tokens(one, letters, tokens, attention=(0, 1), lens=True) for one in (model, on_cpu)
    )
    assert here.attention is not None
    assert there.attention is not None
    torch.testing.assert_close(here.attention.cpu(), there.attention, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(here.next.logprobs, there.next.logprobs, rtol=1e-3, atol=1e-3)
    assert here.lens is not None
    assert [token.rank for token in here.tokens[:3]] == [token.rank for token in there.tokens[:3]]
