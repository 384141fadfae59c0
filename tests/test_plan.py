"""The plan counts what a training really allocates, for devices that are here and for those that are not."""

from dataclasses import replace

import pytest
import torch

from nanogpt import optim, plan
from nanogpt.config import PlanConfig, UserError
from nanogpt.model import GPT
from nanogpt.plan import Machine, main, predict
from nanogpt.run import model_config

SMALL = PlanConfig(n_layer=3, n_head=2, n_embd=64, block_size=64, batch_size=8, vocab_size=65, device="cpu")
HERE = Machine(torch.device("cpu"), torch.float32, 2.0**40)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_gradients_and_moments_are_those_of_a_real_update(optimizer):
    config = replace(SMALL, optimizer=optimizer)
    predicted = predict(config, HERE, "off", 8)
    model = GPT(model_config(config, 65))
    optimizers = optim.build(model, config)
    x, y = torch.randint(65, (2, 8, 64))
    model.loss(x, y).backward()
    for one in optimizers:
        one.step()
    assert predicted.weights == sum(p.nbytes for p in model.parameters())
    assert predicted.gradients == sum(p.grad.nbytes for p in model.parameters())
    states = [state for one in optimizers for state in one.state.values()]
    moments = sum(value.nbytes for state in states for value in state.values() if torch.is_tensor(value))
    assert predicted.optimizer == pytest.approx(moments, rel=0.01)


def test_activations_are_at_least_what_autograd_keeps():
    """And grow with the batch; checkpointing saves most of them."""
    torch.manual_seed(1)
    model = GPT(model_config(SMALL, 65))
    kept: dict[int, torch.Tensor] = {}
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.loss(*torch.randint(65, (2, 8, 64)))
    least = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in mine)
    off, half, blocks = (
        predict(SMALL, HERE, mode, micro).activations
        for mode, micro in (("off", 8), ("off", 4), ("blocks", 8))
    )
    assert least <= off <= 2 * least
    assert half == pytest.approx(off / 2, rel=0.1)
    assert blocks < 0.6 * off


def test_averaged_weights_count():
    assert (
        predict(replace(SMALL, ema_decay=0.9), HERE, "off", 1).weights
        == 2 * predict(SMALL, HERE, "off", 1).weights
    )


def test_a_plan_for_this_machine(capsys, monkeypatch):
    monkeypatch.setattr(plan, "TRIAL_SECONDS", 0.01)
    assert main(replace(SMALL, vocab_size=None, data_dir="nowhere", processes=2)) == 0
    out = capsys.readouterr().out
    assert "Using CPU" in out
    assert "vocabulary of 65" in out
    assert "Batch: 8 sequences of 64 tokens on 2 processes, 4 at a time" in out
    assert "It fits as it is" in out
    assert "measured here" in out
    assert "5,000 updates, 2,560,000 tokens" in out


def test_a_plan_for_another_device(capsys):
    assert main(replace(SMALL, on="h100")) == 0
    out = capsys.readouterr().out
    assert "For one H100, 80 GB" in out
    assert "bfloat16" in out
    assert "at 40% of its published peak" in out


def test_what_does_not_fit_is_told_what_would():
    off = predict(SMALL, HERE, "off", 8)
    plans = {mode: predict(SMALL, HERE, mode, 8) for mode in plan.MODES}

    def told(free: float) -> str:
        return plan.advice(SMALL, replace(HERE, free=free / plan.HEADROOM), plans, 8)

    assert told(1.1 * off.total).startswith("It fits as it is")
    smaller = predict(SMALL, HERE, "off", 4)
    assert told(1.05 * smaller.total).startswith("It fits with --micro_batch 4: ")
    blocks = predict(SMALL, HERE, "blocks", 1)
    assert "--grad_checkpoint blocks" in told(1.001 * blocks.total) or "--micro_batch 1" in told(
        1.001 * blocks.total
    )
    assert told(1000) == "It does not fit: a smaller --n_layer, --n_embd or --block_size"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on": "abacus"}, "--on abacus is unknown: use one of t4"),
        ({"processes": 99}, "--batch_size 8 is too small"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(UserError, match=message):
        main(replace(SMALL, **settings))
