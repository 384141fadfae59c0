"""The plan counts what a training really allocates, for devices that are here and for those that are not."""

import functools
import re
from dataclasses import replace

import pytest
import torch

from nanogpt.cli import plan
from nanogpt.cli.config import ModelSummaryConfig, PlanConfig
from nanogpt.cli.model import main as summarize
from nanogpt.cli.parse import parse
from nanogpt.cli.plan import Target, main
from nanogpt.config import model_config
from nanogpt.errors import UserError
from nanogpt.model.gpt import GPT
from nanogpt.model.size import flops_per_token, meta_model
from nanogpt.training.memory_estimate import HEADROOM
from nanogpt.units import MIB

SMALL = PlanConfig(n_layer=3, n_head=2, n_embd=64, block_size=64, batch_size=8, vocab_size=65, device="cpu")
HERE = Target(torch.device("cpu"), torch.float32, 2.0**40)


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
    assert "at 40% of the published peak" in out


def test_what_does_not_fit_is_told_what_would(monkeypatch):
    there = replace(HERE, simulated=True)  # a GPU
    predict = functools.cache(plan.predict_memory)
    monkeypatch.setattr(plan, "predict_memory", predict)
    config = replace(SMALL, processes=4, batch_size=16, n_layer=12)

    def told(free: float) -> str:
        return plan.advise(config, replace(there, free=free / HEADROOM), predict(config, there, 4), 4)

    def total(micro: int, **settings) -> int:
        return predict(replace(config, **settings), there, micro).total

    assert told(total(4) + 1).startswith("It fits as it is")
    assert told(total(2) + 1).startswith("It fits with --micro_batch 2: ")
    assert told(total(1) + 1).startswith("It fits with --micro_batch 1: ")
    assert told(total(1) - 1).startswith("It fits with --micro_batch 1 --grad_checkpoint ")
    least = min(total(1, grad_checkpoint=mode) for mode in plan.CHECKPOINT_MODES)
    assert told(least - 1).startswith("It fits with")
    assert told(least - 1).split(":")[0].endswith("--parallel fsdp")
    assert told(1000) == "It does not fit: a smaller --n_layer, --n_embd or --block_size"
    alone = plan.advise(SMALL, replace(there, free=1000), predict(SMALL, there, 8), 8)
    assert alone.endswith(", or several devices (--processes 8 --parallel fsdp)")


def test_traffic_is_that_of_the_formulae(capsys):
    model = GPT(model_config(SMALL, 65))
    parameters, blocks = (sum(p.numel() for p in m.parameters()) for m in (model, model.blocks))
    config = replace(SMALL, processes=4)
    plan.print_traffic(config, torch.bfloat16, 2)
    plan.print_traffic(replace(config, parallel="fsdp"), torch.bfloat16, 2)
    ddp, fsdp = capsys.readouterr().out.splitlines()
    assert ddp.startswith(f"Traffic: {2 * 0.75 * 4 * parameters / 1e9:.3g} GB")
    a_micro_batch = 2 * (parameters + blocks) + 4 * parameters
    assert fsdp.startswith(f"Traffic: {2 * 0.75 * a_micro_batch / 1e9:.3g} GB")


class Launches:
    """A clock of a device that takes so long for the launches of a pass and so long for each sequence."""

    def __init__(self, monkeypatch, launches: float, sequence: float) -> None:
        self.sizes: list[int] = []
        self.launches, self.sequence = launches, sequence
        monkeypatch.setattr(plan, "measure_passes", self.measure)
        monkeypatch.setattr(plan, "seconds_of", lambda *_: 0.0)

    def measure(self, _model, _loss_fn, _target, sequences: int, _least: float) -> float:
        self.sizes.append(sequences)
        return self.launches + self.sequence * sequences


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "sizes"), [(256, 1, [32, 64, 128, 256, 256]), (96, 2, [32, 48, 48])]
)
def test_a_fast_device_is_measured_on_whole_micro_batches(monkeypatch, batch_size, accumulation, sizes):
    """A few tokens take as long as many, since launching the kernels takes longer than computing."""
    config = replace(SMALL, batch_size=batch_size, gradient_accumulation_steps=accumulation)
    clock = Launches(monkeypatch, 5e-3, 1e-5)
    update = accumulation * 5e-3 + batch_size * 1e-5
    assert plan.measure_update(config, HERE) == pytest.approx(update)
    assert clock.sizes == sizes


def test_a_slow_device_is_measured_on_a_part_of_a_micro_batch(monkeypatch):
    clock = Launches(monkeypatch, 0.0, 0.005)
    assert plan.measure_update(replace(SMALL, batch_size=1024), HERE) == pytest.approx(1024 * 0.005)
    assert clock.sizes == [32, 64, 64]


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_training_would_compile_is_measured_compiled(monkeypatch, capsys, fails):
    compiled: list[GPT] = []

    def compiled_loss(model: GPT):
        compiled.append(model)

        def loss(x, y):
            if fails:
                raise RuntimeError("no C compiler")
            return model.loss(x, y)

        return loss

    monkeypatch.setattr(plan, "TRIAL_SECONDS", 0.01)
    monkeypatch.setattr(plan, "compiled_loss", compiled_loss)
    assert plan.measure_update(SMALL, HERE)
    assert not compiled
    assert plan.measure_update(replace(SMALL, compile="on"), HERE)
    assert len(compiled) == 1
    assert ("measured without it: no C compiler" in capsys.readouterr().err) == fails


def test_what_does_not_fit_is_not_measured(capsys):
    plan.print_time(SMALL, replace(HERE, free=1000.0), 10**6)
    assert (
        capsys.readouterr().out
        == "Time: 0.000512 TFLOP an update, not measured, since not even a few sequences fit\n"
    )


def test_devices_without_bfloat16_are_not_told_to_shard(capsys):
    assert main(replace(SMALL, on="v100", processes=8, n_layer=96, n_head=96, n_embd=12_288)) == 0
    assert "It does not fit: a smaller --n_layer, --n_embd or --block_size\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not support float16"):
        main(replace(SMALL, on="v100", processes=8, parallel="fsdp"))


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


@pytest.mark.parametrize("preset", [None, "cpu", "best", "gpt2"])
def test_the_model_command_says_the_same(preset, capsys):
    arguments = ["--preset", preset] if preset else []
    config = parse(PlanConfig, [*arguments, "--on", "h100"], "plan")
    config = replace(config, vocab_size=config.vocab_size or 65)
    target = plan.pick_target(config)
    memory = plan.predict_memory(config, target, 1)
    capsys.readouterr()
    assert summarize(parse(ModelSummaryConfig, arguments, "model")) == 0
    said = capsys.readouterr().out
    for name, size in (
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
    ):
        assert re.search(rf"{name}[^,]* {re.escape(f'{size / MIB:,.1f}')} MiB", said), name
    flops = flops_per_token(meta_model(plan.gpt_config(config)))
    plan.print_time(config, target, flops)
    tera = re.search(r"Time: ([\d.,e-]+) TFLOP", capsys.readouterr().out)
    giga = re.search(r"([\d.,]+) GFLOP a sequence", said)
    assert tera is not None
    assert giga is not None
    an_update = float(giga[1].replace(",", "")) * config.batch_size / 1000
    assert float(tera[1].replace(",", "")) == pytest.approx(an_update, rel=0.01)
