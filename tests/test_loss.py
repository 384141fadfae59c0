"""The loss in pieces equals the loss in one."""

import pytest
import torch
from torch.nn import functional as F

from nanogpt import device
from nanogpt.config import GPTConfig
from nanogpt.model import gpt as model_module
from nanogpt.model.gpt import GPT
from nanogpt.model.loss import chunked_cross_entropy


def plain(x, weight, targets, cap):
    logits = x @ weight.T
    logits = cap * torch.tanh(logits.float() / cap) if cap else logits.float()
    return F.cross_entropy(logits, targets)


@pytest.mark.parametrize("cap", [0.0, 4.0])
@pytest.mark.parametrize("rows", [1, 5, 23, 1000])
def test_loss_and_gradients_are_those_of_the_whole(monkeypatch, cap, rows):
    torch.manual_seed(1)
    x, weight = torch.randn(23, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    targets = torch.randint(50, (23,))
    monkeypatch.setattr(device.CPU, "chunk_logits", rows * 50)
    results = []
    for function in (plain, chunked_cross_entropy):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        value = function(*leaves, targets, cap)
        (3 * value).backward()  # a scaled loss, as float16 has it
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_it_takes_the_dtype_of_autocast_and_gives_gradients_in_that_of_the_weights():
    torch.manual_seed(1)
    x, weight = torch.randn(64, 32, requires_grad=True), torch.randn(99, 32, requires_grad=True)
    targets = torch.randint(99, (64,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = chunked_cross_entropy(x, weight, targets, 0.0)
    value.backward()
    assert value.dtype == x.grad.dtype == weight.grad.dtype == torch.float32
    exact = plain(x, weight, targets, 0.0)
    assert value.item() == pytest.approx(exact.item(), rel=1e-2)
    assert value.item() != exact.item()


def test_float16_does_not_lose_the_gradient_of_unlikely_tokens():
    """As the gradient scaler uses it. 4,096 positions x 5,000 tokens: p / N is nothing in float16."""
    torch.manual_seed(1)
    x, weight = torch.randn(4096, 8), torch.randn(5000, 8) * 0.02
    targets = torch.zeros(4096, dtype=torch.int64)
    gradients = []
    for function in (plain, chunked_cross_entropy):
        leaf = weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16):
            value = function(x, leaf, targets, 0.0)
        (2**16 * value).backward()
        gradients.append(leaf.grad[1:] / 2**16)  # the tokens that are never right
    torch.testing.assert_close(*gradients[::-1], rtol=0.02, atol=2e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch.compile itself
def test_it_can_be_compiled(monkeypatch):
    """Whole: fullgraph refuses to fall back to PyTorch as it is."""
    torch.manual_seed(1)
    monkeypatch.setattr(model_module, "LARGE_VOCAB", 50)
    monkeypatch.setattr(device.CPU, "chunk_logits", 10 * 70)
    network = GPT(GPTConfig(vocab_size=70, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.0))
    x, y = torch.randint(70, (2, 3, 8))
    gradients = []
    for function in (network.loss, torch.compile(network.loss, fullgraph=True)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = function(x, y)
        gradients.append([value, *torch.autograd.grad(value, list(network.parameters()))])
    torch.testing.assert_close(*gradients, rtol=0.05, atol=2e-3)


def test_without_gradients_nothing_is_kept():
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    with torch.inference_mode():
        value = chunked_cross_entropy(x, weight, torch.arange(4), 0.0)
    assert not value.requires_grad
    assert value.item() == pytest.approx(plain(x, weight, torch.arange(4), 0.0).item())


@pytest.mark.parametrize("tied", [True, False])
def test_a_large_vocabulary_trains_the_same(monkeypatch, tied):
    """The whole model's gradients, a tied embedding's two among them."""
    torch.manual_seed(1)
    config = GPTConfig(vocab_size=70, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.0, tied=tied)
    network = GPT(config)
    x, y = torch.randint(70, (2, 3, 8))
    gradients = []
    for limit in (71, 70):
        monkeypatch.setattr(model_module, "LARGE_VOCAB", limit)
        value = network.loss(x, y)
        gradients.append([value, *torch.autograd.grad(value, list(network.parameters()))])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_no_tensor_of_all_logits_is_made(monkeypatch):
    """Counted: the largest tensor that the loss makes."""
    monkeypatch.setattr(device.CPU, "chunk_logits", 2**22)
    x, weight = torch.randn(4096, 8, requires_grad=True), torch.randn(8192, 8, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        chunked_cross_entropy(x, weight, torch.zeros(4096, dtype=torch.int64), 0.0).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 4 * 4096 * 8192 / 2


def test_the_gradient_of_a_bfloat16_weight_is_added_up_in_float32(monkeypatch):
    """As under FSDP: rounded once in the end, not after each of many pieces."""
    monkeypatch.setattr(device.CPU, "chunk_logits", 70)
    torch.manual_seed(1)
    x, weight, targets = torch.randn(2000, 32), torch.randn(70, 32), torch.randint(70, (2000,))
    exact, narrow = (
        weight.detach().clone().to(dtype).requires_grad_() for dtype in (torch.float32, torch.bfloat16)
    )
    exact.data = narrow.data.float()
    for z in (exact, narrow):
        chunked_cross_entropy(x.to(z.dtype), z, targets, 0.0).backward()
    error = (narrow.grad.float() - exact.grad).norm() / exact.grad.norm()
    assert narrow.grad.dtype == torch.bfloat16
    assert error < 7e-3  # added up in bfloat16 it is 2e-2
