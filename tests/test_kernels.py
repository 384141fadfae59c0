"""The loss in chunks equals the loss in one; norms keep the dtype; recomputation keeps names and numbers."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nanogpt.config import GPTConfig
from nanogpt.machine import device
from nanogpt.model import kernels
from nanogpt.model.gpt import GPT


def squash(logits, cap):
    return cap * torch.tanh(logits.float() / cap) if cap else logits


def plain(x, weight, targets, cap):
    return F.cross_entropy(squash(F.linear(x, weight), cap).float(), targets)


def chunked_cross_entropy(x, weight, targets, cap):
    head = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    head.weight = weight
    return kernels.chunked_cross_entropy(head, lambda logits: squash(logits, cap), x, targets, len(weight))


@pytest.mark.parametrize("cap", [0.0, 4.0])
@pytest.mark.parametrize("rows", [1, 5, 23, 1000])
def test_loss_and_gradients_are_those_of_the_whole(monkeypatch, cap, rows):
    torch.manual_seed(1)
    x, weight = torch.randn(23, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    targets = torch.randint(50, (23,))
    monkeypatch.setattr(device.CPU, "logits_per_chunk", rows * 50)
    results = []
    for function in (plain, chunked_cross_entropy):
        leaves = [x.clone().requires_grad_(), nn.Parameter(weight.clone())]
        value = function(*leaves, targets, cap)
        (3 * value).backward()  # a scaled loss, as float16 has it
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_it_takes_the_dtype_of_autocast_and_gives_gradients_in_that_of_the_weights():
    torch.manual_seed(1)
    x, weight = torch.randn(64, 32, requires_grad=True), nn.Parameter(torch.randn(99, 32))
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
        leaf = nn.Parameter(weight.clone())
        with torch.autocast("cpu", dtype=torch.float16):
            value = function(x, leaf, targets, 0.0)
        (2**16 * value).backward()
        gradients.append(leaf.grad[1:] / 2**16)  # the tokens that are never right
    torch.testing.assert_close(*gradients[::-1], rtol=0.02, atol=2e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch.compile itself
@pytest.mark.parametrize("multiple", [1, 16])
def test_it_can_be_compiled(monkeypatch, multiple):
    """Whole: fullgraph refuses to fall back to PyTorch as it is."""
    dynamo = pytest.importorskip("torch._dynamo.config")
    if not hasattr(dynamo, "trace_autograd_ops"):
        pytest.skip("this PyTorch runs the loss uncompiled")
    monkeypatch.setattr(dynamo, "trace_autograd_ops", True)  # as compile_model does
    torch.manual_seed(1)
    monkeypatch.setattr(kernels, "CHUNKED_LOSS_MIN_VOCAB", 50)
    monkeypatch.setattr(device.CPU, "logits_per_chunk", 10 * 70)
    monkeypatch.setattr(device.CPU, "vocab_multiple", multiple)
    monkeypatch.setattr(kernels, "PADDED_MIN_VOCAB", 1)
    monkeypatch.setattr(kernels, "PADDED_MIN_POSITIONS", 1)
    network = GPT(GPTConfig(vocab_size=70, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.0))
    x, y = torch.randint(70, (2, 3, 8))
    gradients = []
    for function in (network.loss, torch.compile(network.loss, fullgraph=True)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = function(x, y)
        gradients.append([value, *torch.autograd.grad(value, list(network.parameters()))])
    torch.testing.assert_close(*gradients, rtol=0.05, atol=2e-3)


def test_without_gradients_nothing_is_kept():
    x, weight = torch.randn(4, 3, requires_grad=True), nn.Parameter(torch.randn(9, 3))
    with torch.inference_mode():
        value = chunked_cross_entropy(x, weight, torch.arange(4), 0.0)
    assert not value.requires_grad
    assert value.item() == pytest.approx(plain(x, weight, torch.arange(4), 0.0).item())


def test_what_hangs_on_the_head_acts_in_the_loss(monkeypatch):
    """One way to the logits: a hook, and an adapter that alone is trained, in one chunk or many."""
    torch.manual_seed(1)
    network = GPT(GPTConfig(vocab_size=70, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.0))
    network.requires_grad_(False)
    base, low, high = network.head, nn.Linear(16, 2, bias=False), nn.Linear(2, 70, bias=False)

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.low, self.high = base, low, high

        def forward(self, x):
            return self.base(x) + self.high(self.low(x))

    network.head = Adapted()
    network.head.register_forward_hook(lambda _module, _args, logits: 3 * logits)
    x, y = torch.randint(70, (2, 3, 8))
    monkeypatch.setattr(device.CPU, "logits_per_chunk", 10 * 70)
    results = []
    for limit in (71, 70):
        monkeypatch.setattr(kernels, "CHUNKED_LOSS_MIN_VOCAB", limit)
        value = network.loss(x, y)
        results.append([value, *torch.autograd.grad(value, [low.weight, high.weight])])
    torch.testing.assert_close(*results)
    torch.testing.assert_close(results[1][0], network(x, y)[1])


@pytest.mark.parametrize("mode", ["blocks", "selective"])
def test_recomputation_keeps_names_and_numbers(mode):
    torch.manual_seed(1)
    network = GPT(GPTConfig(vocab_size=70, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.5))
    other = deepcopy(network)
    for number, block in enumerate(other.blocks):
        other.blocks[number] = kernels.Recomputed(block, selective=mode == "selective")
    assert list(other.state_dict()) == list(network.state_dict())
    x, y = torch.randint(70, (2, 3, 8))
    results = []
    for model in (network, other, other.eval(), network.eval()):
        torch.manual_seed(2)
        value = model.loss(x, y)
        results.append([value, *torch.autograd.grad(value, list(model.parameters()))])
    assert all(torch.equal(*pair) for pair in zip(results[0], results[1], strict=True))
    assert all(torch.equal(*pair) for pair in zip(results[2], results[3], strict=True))


@pytest.mark.parametrize("norm", [kernels.LayerNorm, kernels.RMSNorm])
def test_a_norm_computes_in_the_dtype_of_its_weight_and_returns_that_of_its_input(norm):
    module, x = norm(64), torch.randn(5, 64).bfloat16()
    exact = super(norm, module).forward(x.float()).bfloat16()
    torch.testing.assert_close(module(x), exact, rtol=0.01, atol=0)  # bfloat16's rounding
    assert module.bfloat16()(x).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(7, 48), (2, 5, 3, 8), (1, 384)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_rms_norm_equals_pytorchs_forward_and_backward(shape, scale):
    """Rows of zeros too, where the epsilon alone is left."""
    torch.manual_seed(1)
    assert device.CPU.composes_rms_norm
    ours, theirs = kernels.RMSNorm(shape[-1], eps=1e-6), nn.RMSNorm(shape[-1], eps=1e-6)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x, grad = scale * torch.randn(shape), torch.randn(shape)
    x.flatten(0, -2)[0] = 0
    results = []
    for norm in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        y.backward(grad)
        results.append((y.detach(), leaf.grad, norm.weight.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("tied", [True, False])
def test_a_large_vocabulary_trains_the_same(monkeypatch, tied):
    """The whole model's gradients, a tied embedding's two among them."""
    torch.manual_seed(1)
    config = GPTConfig(vocab_size=70, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.0, tied=tied)
    network = GPT(config)
    x, y = torch.randint(70, (2, 3, 8))
    gradients = []
    for limit in (71, 70):
        monkeypatch.setattr(kernels, "CHUNKED_LOSS_MIN_VOCAB", limit)
        value = network.loss(x, y)
        gradients.append([value, *torch.autograd.grad(value, list(network.parameters()))])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.fixture
def padding(monkeypatch):
    """A device that wants multiples of 16 logits, however few."""
    monkeypatch.setattr(device.CPU, "vocab_multiple", 16)
    monkeypatch.setattr(kernels, "PADDED_MIN_VOCAB", 1)
    monkeypatch.setattr(kernels, "PADDED_MIN_POSITIONS", 2)
    monkeypatch.setattr(device.CPU, "logits_per_chunk", 10 * 70)


class Products(TorchFunctionMode):
    """Notes the number of columns of each product with a wide weight."""

    def __init__(self):
        super().__init__()
        self.columns = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and len(args[1]) >= 70:
            self.columns.append(len(args[1]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cap", [0.0, 4.0])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_padded_output_layer_is_the_plain_one(monkeypatch, request, tied, cap, chunked, dtype):  # noqa: PLR0917
    """Logits, loss and all gradients; the weights are the model's own."""
    torch.manual_seed(1)
    config = GPTConfig(
        vocab_size=70, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.0, tied=tied, logit_cap=cap
    )
    network = GPT(config)
    x, y = torch.randint(70, (2, 3, 8))
    monkeypatch.setattr(kernels, "CHUNKED_LOSS_MIN_VOCAB", 70 if chunked else 71)
    results = []
    for columns in (70, 80):
        if columns == 80:
            request.getfixturevalue("padding")
        with Products() as products, torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            value, logits = network.loss(x, y), network(x)[0]
            first = network(x[:1, :1])[0]
        assert set(products.columns[:-1]) == {columns}
        assert products.columns[-1] == 70  # one position, as in sampling
        assert logits.shape == (3, 8, 70)
        results.append([value, logits, first, *torch.autograd.grad(value, list(network.parameters()))])
    close = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 1e-4}
    torch.testing.assert_close(*results, **close)


def test_what_hangs_on_a_padded_head_sees_no_padding(monkeypatch, padding):
    torch.manual_seed(1)
    network = GPT(GPTConfig(vocab_size=70, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.0))
    x, y = torch.randint(70, (2, 3, 8))
    shift = torch.randn(70)
    network.head.register_forward_hook(lambda _module, _args, logits: logits + shift)
    values = []
    for limit in (71, 70):
        monkeypatch.setattr(kernels, "CHUNKED_LOSS_MIN_VOCAB", limit)
        values.append(network.loss(x, y))
    torch.testing.assert_close(*values)


def test_no_tensor_of_all_logits_is_made(monkeypatch):
    """Counted: the largest tensor that the loss makes."""
    monkeypatch.setattr(device.CPU, "logits_per_chunk", 2**22)
    x, weight = torch.randn(4096, 8, requires_grad=True), nn.Parameter(torch.randn(8192, 8))
    with torch.profiler.profile(profile_memory=True) as profile:
        chunked_cross_entropy(x, weight, torch.zeros(4096, dtype=torch.int64), 0.0).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 4 * 4096 * 8192 / 2


def test_the_gradient_of_a_bfloat16_weight_is_added_up_in_float32(monkeypatch):
    """As under FSDP: rounded once in the end, not after each of many pieces."""
    monkeypatch.setattr(device.CPU, "logits_per_chunk", 70)
    torch.manual_seed(1)
    x, weight, targets = torch.randn(2000, 32), torch.randn(70, 32), torch.randint(70, (2000,))
    exact, narrow = (nn.Parameter(weight.clone().to(dtype)) for dtype in (torch.float32, torch.bfloat16))
    exact.data = narrow.data.float()
    for z in (exact, narrow):
        chunked_cross_entropy(x.to(z.dtype), z, targets, 0.0).backward()
    error = (narrow.grad.float() - exact.grad).norm() / exact.grad.norm()
    assert narrow.grad.dtype == torch.bfloat16
    assert error < 7e-3  # added up in bfloat16 it is 2e-2
