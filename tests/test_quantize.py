"""Weights of 8 bits: what they lose is bounded, and both kernels give the same numbers."""

import json
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nanogpt.cli import evaluate, sample
from nanogpt.cli.config import EvaluateConfig
from nanogpt.config import GPTConfig
from nanogpt.inference.config import Quantization, SampleConfig
from nanogpt.inference.generate import generate
from nanogpt.model import quantize as quantization
from nanogpt.model.gpt import GPT
from nanogpt.model.quantize import (
    Int8Linear,
    linear_bytes,
    narrow_weights,
    prepare_for_sampling,
    quantize,
    quantize_rows,
)
from nanogpt.training.fit import fit

SHAPE = GPTConfig(vocab_size=40, block_size=16, n_layer=2, n_head=2, n_embd=64, dropout=0.0)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(1)
    return GPT(SHAPE).eval()


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 10**6), st.floats(1e-6, 1e3))
def test_a_weight_moves_by_half_a_step_at_most(seed, size):
    weight = size * torch.randn(7, 33, generator=torch.Generator().manual_seed(seed))
    whole, scale = quantize_rows(weight)
    error = (whole.double() * scale.double()[:, None] - weight.double()).abs()
    # Where bfloat16 rounds the scale down, the largest weights are cut off: by the same 2^-8 at most.
    step = weight.abs().amax(1, keepdim=True).double() / 127
    assert (error <= 0.5 * step * (1 + 2**-8) + weight.abs().double() * 2**-8).all()
    assert whole.abs().max() <= 127


def test_rows_of_zeros_stay_zeros():
    whole, scale = quantize_rows(torch.zeros(2, 5))
    assert not (whole.float() * scale.float()[:, None]).any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("positions", [1, 3, 40])
@pytest.mark.parametrize("packed", [True, False])
def test_the_product_is_that_of_the_rounded_weights(monkeypatch, bias, positions, packed):
    torch.manual_seed(1)
    monkeypatch.setattr(quantization, "packed_is_fast", lambda *_: packed)
    linear = nn.Linear(64, 24, bias=bias)
    layer, x = Int8Linear(linear), torch.randn(2, positions, 64)
    found = layer(x)
    narrow = x.to(torch.bfloat16).double()
    wanted = narrow @ layer.dequantized().double().T + (linear.bias.double() if bias else 0)
    assert found.dtype == torch.float32
    # One rounding to bfloat16 before the scale, or one after it.
    torch.testing.assert_close(found.double(), wanted, rtol=2**-7, atol=2e-2)


def test_a_kernel_that_is_not_there_is_not_chosen(monkeypatch):
    def missing(*_):
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr(quantization, "packed_product", missing)
    assert quantization.packed_is_fast(13, 17, torch.device("cpu")) is False


def test_all_linear_layers_are_exchanged_and_the_embedding_is_not(model):
    embedding, before = model.token_embedding.weight.clone(), linear_bytes(model)
    assert model.head.weight is model.token_embedding.weight  # tied
    quantize(model, "int8")
    assert not [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert torch.equal(model.token_embedding.weight, embedding)
    assert linear_bytes(model) == before / 4


@torch.no_grad()
def test_a_quantized_model_is_almost_the_same(model):
    idx = torch.randint(40, (4, 16))
    wanted, _ = model(idx)
    quantize(model, "int8")
    found, _ = model(idx)
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    text = [int(token) for token in generate(model, [idx[0, :5]], num_tokens=30, temperature=0)]
    assert len(text) == 30


@torch.no_grad()
@pytest.mark.filterwarnings("error")
def test_narrow_weights_are_those_of_autocast(model):
    idx = torch.randint(40, (4, 16))
    embedding = model.token_embedding.weight.clone()
    with torch.autocast("cpu", torch.bfloat16):
        wanted, _ = model(idx)
        narrow_weights(model, torch.bfloat16)
        found, _ = model(idx)
    assert torch.equal(found, wanted)
    assert torch.equal(model.token_embedding.weight, embedding)
    assert model.head.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_weights_stored_by_columns_are_the_same_weights(model):
    idx = torch.randint(40, (4, 16))
    wanted, _ = model(idx)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepare_for_sampling(model, torch.float32, "none")
    assert model.blocks[0].mlp.fc.weight.stride() == (1, 4 * 64)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    torch.testing.assert_close(model(idx)[0], wanted)


def test_every_kind_is_a_flag():
    assert get_args(Quantization) == ("none", *quantization.QUANTIZERS)


def test_the_commands_sample_and_measure_with_8_bits(tmp_path, config, capsys):
    fit(replace(config, max_iters=5))
    capsys.readouterr()
    best = f"{config.out_dir}/ckpt.pt"
    settings = {"checkpoint": best, "num_tokens": 12, "seed": 1, "prompt": "From", "device": "cpu"}
    assert sample.main(SampleConfig(**settings, quantize="int8")) == 0
    assert len(capsys.readouterr().out) == len("From") + 12 + 1
    losses = {}
    for kind in ("none", "int8"):
        evaluate.main(
            EvaluateConfig(checkpoint=best, data_dir=config.data_dir, device="cpu", quantize=kind, json=True)
        )
        losses[kind] = json.loads(capsys.readouterr().out)
    assert losses["none"] != losses["int8"]
