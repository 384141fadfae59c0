"""The optimizer is AdamW as published, on the right parameters, at the rate of the schedule."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.model import GPT
from nanogpt.optim import adamw, learning_rate, set_learning_rate

CONFIG = TrainConfig(learning_rate=1e-2, warmup_iters=10, max_iters=110, min_lr=0.1, weight_decay=0.3)
TINY = GPTConfig(block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.0, vocab_size=20)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads, and lose much where other programs want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def schedule(config, steps=None):
    return [learning_rate(step, config) for step in range(config.max_iters if steps is None else steps)]


# Parameter groups


def test_matrices_and_embeddings_decay_and_vectors_do_not():
    model = GPT(TINY)
    groups = adamw(model, CONFIG).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        vector = name.endswith("bias") or "ln_" in name
        assert decay[id(parameter)] == (0.0 if vector else 0.3), name


def test_every_parameter_is_there_once():
    model = GPT(TINY)
    held = [id(p) for group in adamw(model, CONFIG).param_groups for p in group["params"]]
    assert len(held) == len(set(held))  # the tied embedding too
    assert set(held) == {id(p) for p in model.parameters()}


def test_frozen_parameters_are_left_out():
    model = GPT(TINY)
    model.wpe.weight.requires_grad_(False)
    held = {id(p) for group in adamw(model, CONFIG).param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p is not model.wpe.weight}


def test_the_settings_arrive():
    config = replace(CONFIG, beta1=0.8, beta2=0.7)
    for group in adamw(GPT(TINY), config).param_groups:
        assert group["betas"] == (0.8, 0.7)
        assert group["lr"] == 1e-2


def test_set_learning_rate_reaches_every_group():
    optimizer = adamw(GPT(TINY), CONFIG)
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


# The update


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, beta1=0.0, beta2=0.0),
        replace(CONFIG, beta1=0.5, beta2=0.999, weight_decay=0.0),
    ],
)
def test_steps_are_those_of_the_paper(config):
    """Algorithm 2 of Loshchilov & Hutter (2019), written out in float64, over five steps."""
    torch.manual_seed(1)
    layer = nn.Linear(5, 3)
    optimizer = adamw(layer, config)
    expected = {name: p.detach().double() for name, p in layer.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for t in range(1, 6):
        rate = learning_rate(t - 1, config)
        set_learning_rate(optimizer, rate)
        for name, parameter in layer.named_parameters():
            g = torch.randn_like(parameter)
            parameter.grad = g
            g, w = g.double(), expected[name]
            decay = config.weight_decay if w.dim() == 2 else 0.0
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * g
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * g**2
            m = first[name] / (1 - config.beta1**t)
            v = second[name] / (1 - config.beta2**t)
            expected[name] = w - rate * decay * w - rate * m / (v.sqrt() + 1e-8)
        optimizer.step()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


# The schedule


def test_warm_up_is_a_straight_line_to_the_highest_rate():
    rates = schedule(CONFIG)
    assert rates[:10] == pytest.approx([1e-2 * (i + 1) / 10 for i in range(10)])
    assert rates[0] == pytest.approx(1e-3)  # never 0: the first update counts
    assert max(rates) == pytest.approx(1e-2)
    assert rates[10] == pytest.approx(1e-2)


def test_from_the_highest_rate_it_falls_along_a_cosine():
    rates = schedule(CONFIG)
    assert rates[60] == pytest.approx(1e-2 * (0.1 + 0.9 / 2))  # half way
    assert rates[35] == pytest.approx(1e-2 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))  # a quarter
    assert all(b < a for a, b in pairwise(rates[10:]))


@pytest.mark.parametrize("min_lr", [0.0, 0.1, 1.0])
def test_it_ends_at_the_fraction_and_stays_there(min_lr):
    config = replace(CONFIG, min_lr=min_lr)
    assert learning_rate(110, config) == pytest.approx(1e-2 * min_lr)
    assert learning_rate(10_000, config) == pytest.approx(1e-2 * min_lr)
    assert learning_rate(109, config) == pytest.approx(1e-2 * min_lr, abs=1e-5)  # no jump at the end
    assert min(schedule(config)[10:]) >= 1e-2 * min_lr


def test_without_warm_up_it_starts_at_the_highest_rate():
    rates = schedule(replace(CONFIG, warmup_iters=0))
    assert rates[0] == pytest.approx(1e-2)
    assert all(b < a for a, b in pairwise(rates))


@pytest.mark.parametrize("max_iters", [1, 5, 9, 10, 11])
def test_a_run_as_short_as_the_warm_up(max_iters):
    rates = schedule(replace(CONFIG, max_iters=max_iters), steps=20)
    assert rates[: min(10, max_iters)] == pytest.approx(
        [1e-2 * (i + 1) / 10 for i in range(min(10, max_iters))]
    )
    assert all(1e-3 <= rate <= 1e-2 * (1 + 1e-9) for rate in rates)
    assert rates[max(10, max_iters) :] == pytest.approx([1e-3] * (20 - max(10, max_iters)))


def test_max_iters_alone_decides_where_the_cosine_ends():
    """The rate at a step depends on nothing but the step and the settings: resuming needs no state."""
    assert schedule(CONFIG) == schedule(replace(CONFIG, seed=7, batch_size=3, eval_interval=1))
    assert learning_rate(60, replace(CONFIG, max_iters=210)) > learning_rate(60, CONFIG)
