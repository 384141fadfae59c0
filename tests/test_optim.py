"""The optimizer is AdamW as published, on the right parameters, at the rate of the schedule."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt.config import GPTConfig, OptimizerName, TrainConfig
from nanogpt.errors import UserError
from nanogpt.model.gpt import GPT
from nanogpt.training.optimizer import (
    OPTIMIZERS,
    Muon,
    adamw,
    build_optimizers,
    learning_rate,
    lr_multiplier,
    orthogonalize,
    set_learning_rate,
    step_optimizers,
)
from nanogpt.training.snapshot import state_of

CONFIG = TrainConfig(learning_rate=1e-2, warmup_iters=10, max_iters=110, min_lr=0.1, weight_decay=0.3)
TINY = GPTConfig(block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.0, vocab_size=20)


def schedule(config, steps=None):
    return [learning_rate(step, config) for step in range(config.max_iters if steps is None else steps)]


# Parameter groups


def test_matrices_and_embeddings_decay_and_vectors_do_not():
    model = GPT(TINY)
    groups = adamw(model.parameters(), CONFIG).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        vector = name.endswith("bias") or "norm" in name
        assert decay[id(parameter)] == (0.0 if vector else 0.3), name


def test_every_parameter_is_there_once():
    model = GPT(TINY)
    held = [id(p) for group in adamw(model.parameters(), CONFIG).param_groups for p in group["params"]]
    assert len(held) == len(set(held))  # the tied embedding too
    assert set(held) == {id(p) for p in model.parameters()}


def test_frozen_parameters_are_left_out():
    model = GPT(TINY)
    model.position_embedding.weight.requires_grad_(False)
    for config in (CONFIG, replace(CONFIG, optimizer="muon")):
        groups = [
            group
            for optimizer in build_optimizers(model, config, torch.float32)
            for group in optimizer.param_groups
        ]
        held = {id(p) for group in groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters() if p is not model.position_embedding.weight}


def test_the_settings_arrive():
    config = replace(CONFIG, beta1=0.8, beta2=0.7)
    for group in adamw(GPT(TINY).parameters(), config).param_groups:
        assert group["betas"] == (0.8, 0.7)
        assert group["lr"] == 1e-2


def test_set_learning_rate_reaches_every_group():
    (optimizer,) = build_optimizers(GPT(TINY), CONFIG, torch.float32)
    optimizer.param_groups[1]["base_lr"] = 8.0
    set_learning_rate([optimizer], 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125 * CONFIG.learning_rate, 1.0]


def test_an_unknown_optimizer_is_named_with_those_there_are():
    with pytest.raises(UserError, match=r"--optimizer .*sgd.*adamw.*muon"):
        replace(CONFIG, optimizer="sgd")


def test_optimizers_of_the_settings_are_those_of_the_registry():
    assert get_args(OptimizerName) == tuple(OPTIMIZERS)


class Sgd(torch.optim.SGD):
    """An optimizer that knows nothing of found_inf."""


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("bad", [False, True])
def test_a_bad_step_changes_nothing(is_async: bool, bad: bool):
    """Whether an optimizer honours found_inf or has to be left out."""
    torch.manual_seed(1)
    model = GPT(TINY)
    optimizers = [
        *build_optimizers(model, replace(CONFIG, optimizer="muon"), torch.float32),
        Sgd(model.parameters()),
    ]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan") if bad else 1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step_optimizers(optimizers, skip=torch.tensor(bad), is_async=is_async)
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new) == bad


def test_a_tensor_that_could_not_be_resumed_is_found_when_it_is_saved():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    with pytest.raises(AssertionError, match=r"SGD keeps \{'momentum_buffer'\}, but its state_names are"):
        state_of(optimizer)
    optimizer.state_names = ("momentum_buffer",)
    assert torch.equal(state_of(optimizer)["state"][0]["momentum_buffer"], torch.ones(3))


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
    (optimizer,) = build_optimizers(layer, config, torch.float32)
    expected = {name: p.detach().double() for name, p in layer.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for t in range(1, 6):
        rate = learning_rate(t - 1, config)
        set_learning_rate([optimizer], lr_multiplier(t - 1, config))
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


# Muon and the trapezoid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [7.0, 1e6, 1e-6])
@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (1, 48, 16), (3, 40, 40)])
def test_orthogonalize_brings_the_singular_values_near_1(shape, scale, dtype):
    torch.manual_seed(1)
    matrices = torch.randn(shape).view(-1, *shape[-2:]) * scale
    singular = torch.linalg.svdvals(orthogonalize(matrices, dtype))
    large = torch.linalg.svdvals(matrices) > 0.1 * torch.linalg.matrix_norm(matrices, 2)[:, None]
    assert singular[large].min() > 0.6
    assert singular.max() < 1.3


def test_orthogonalize_keeps_the_singular_vectors():
    torch.manual_seed(1)
    matrix = torch.randn(1, 48, 32)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.mT @ orthogonalize(matrix, torch.bfloat16) @ v.mT  # diagonal if the vectors are the same
    off = turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 0.05


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = GPT(TINY)
    rest, muon = build_optimizers(model, replace(CONFIG, optimizer="muon"), torch.bfloat16)
    assert isinstance(muon, Muon)
    matrices = {id(p) for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2}
    assert {id(p) for group in muon.param_groups for p in group["params"]} == matrices
    others = {id(p) for p in model.parameters()} - matrices
    assert {id(p) for group in rest.param_groups for p in group["params"]} == others


def test_stacked_updates_are_those_of_each_matrix_alone():
    torch.manual_seed(1)
    shapes = [(32, 32), (64, 32), (32, 64), (32, 32), (64, 32)]
    config = replace(CONFIG, optimizer="muon", weight_decay=0.2)
    together = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [Muon(together, config, torch.bfloat16), *(Muon([p], config, torch.bfloat16) for p in alone)]
    for _ in range(3):
        for a, b in zip(together, alone, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)  # bfloat16 products inside


def plain_muon(matrix, momentum, gradient, config, dtype) -> None:
    """One update of one matrix, in plain operations."""
    momentum.lerp_(gradient, 1 - 0.95)
    direction = gradient.lerp(momentum, 0.95)
    rows, columns = matrix.shape
    direction = direction if rows < columns else direction.T
    direction = orthogonalize(direction[None], dtype)[0]
    matrix.mul_(1 - config.muon_lr * config.weight_decay)
    matrix.add_(
        direction if rows < columns else direction.T, alpha=-config.muon_lr * max(1, rows / columns) ** 0.5
    )


@pytest.mark.parametrize("is_async", [False, True])
def test_muon_is_the_plain_loop_over_matrices(is_async: bool):
    """With found_inf too, whose broken steps in between leave no trace."""
    torch.manual_seed(1)
    shapes = [(32, 32), (64, 32), (32, 64), (32, 32), (48, 16), (64, 32)]
    config = replace(CONFIG, optimizer="muon", weight_decay=0.2, muon_lr=0.05)
    matrices = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    plain = [matrix.detach().clone() for matrix in matrices]
    momenta = [torch.zeros_like(matrix) for matrix in plain]
    muon = Muon(matrices, config, torch.float32)
    for step in range(5):
        broken = is_async and step in {0, 2}
        for matrix, other, momentum in zip(matrices, plain, momenta, strict=True):
            gradient = torch.randn_like(matrix)
            matrix.grad = torch.full_like(gradient, float("nan")) if broken else gradient.clone()
            if not broken:
                plain_muon(other, momentum, gradient, config, torch.float32)
        before = [matrix.detach().clone() for matrix in matrices]
        step_optimizers([muon], skip=torch.tensor(broken), is_async=is_async)
        for matrix, other, momentum, old in zip(matrices, plain, momenta, before, strict=True):
            assert torch.equal(matrix, old) == broken
            torch.testing.assert_close(matrix.detach(), other, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(muon.state[matrix]["momentum"], momentum, rtol=1e-6, atol=1e-6)


class CountedLaunches(TorchDispatchMode):
    """Counts the operations that a GPU would be given a kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        without = ("profiler", "aten::empty", "aten::_unsafe_view", "aten::detach")
        self.number += not (function.is_view or function.name().startswith(without))
        return function(*args, **(kwargs or {}))


def test_muon_launches_as_much_for_a_deep_model_as_for_a_shallow_one():
    """On a GPU, where its small kernels are bound by their number: for each shape, not for each matrix."""
    counts = []
    for n_layer in (6, 12):
        model = GPT(replace(TINY, n_layer=n_layer))
        _, muon = build_optimizers(model, replace(CONFIG, optimizer="muon"), torch.bfloat16)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        step_optimizers([muon], skip=torch.tensor(False), is_async=True)
        with CountedLaunches() as launches:
            step_optimizers([muon], skip=torch.tensor(False), is_async=True)
        counts.append(launches.number)
    assert counts[0] == counts[1] < 125


def test_a_muon_step_has_the_length_and_decay_it_should():
    torch.manual_seed(1)
    config = replace(CONFIG, optimizer="muon", weight_decay=0.5, muon_lr=0.1)
    weight = nn.Parameter(torch.randn(64, 16))
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    Muon([weight], config, torch.bfloat16).step()
    step = before * (1 - 0.1 * 0.5) - weight.detach()
    singular = torch.linalg.svdvals(step) / (0.1 * 2.0)  # the square root of 64 / 16
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    assert (step * weight.grad).sum() > 0  # against the gradient


def test_the_trapezoid_is_flat_and_then_straight():
    config = replace(CONFIG, schedule="trapezoid", warmup_iters=10, max_iters=110, cooldown=0.5, min_lr=0.1)
    rates = [lr_multiplier(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10:56] == pytest.approx([1.0] * 46)
    falls = [a - b for a, b in pairwise(rates[55:])]
    assert falls == pytest.approx([0.9 / 55] * len(falls))
    assert rates[110] == pytest.approx(0.1)
