"""The GPT is GPT-2, number for number; it never looks ahead; it learns.

The oracle is transformers' GPT2LMHeadModel with the same random weights (nothing is downloaded).
"""

import importlib
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

import nanogpt.model
from nanogpt.config import GPTConfig, MLPKind, Norm
from nanogpt.model import kernels
from nanogpt.model.gpt import ACTIVATIONS, GPT, NORMS, attention
from nanogpt.model.kernels import Dropout
from nanogpt.model.size import flops_per_token, meta_model

TINY = GPTConfig(block_size=16, n_layer=3, n_head=4, n_embd=32, dropout=0.0, vocab_size=50)
GPT2 = GPTConfig(block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0, vocab_size=50257)
both_kernels = pytest.mark.parametrize("flash", [True, False], ids=["flash", "plain"])


def make(config=TINY, seed=1, std=None):
    """A model; with `std`, every parameter is random, biases and gains too, so that all of them matter."""
    torch.manual_seed(seed)
    model = GPT(config)
    if std is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(mean=1.0 if parameter.dim() == 1 else 0.0, std=std)
    return model


def tokens(B=2, T=16, V=50, seed=2):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


# GPT-2


def gpt2_names(n_layer):
    """(our name, transformers' name, whether the matrix is stored transposed), once for each parameter."""
    names = [("token_embedding.weight", "transformer.wte.weight", False)]
    names += [("position_embedding.weight", "transformer.wpe.weight", False)]
    names += [(f"final_norm.{kind}", f"transformer.ln_f.{kind}", False) for kind in ("weight", "bias")]
    parts = {
        "norm_1": "ln_1",
        "norm_2": "ln_2",
        "attn.qkv": "attn.c_attn",
        "attn.proj": "attn.c_proj",
        "mlp.fc": "mlp.c_fc",
        "mlp.proj": "mlp.c_proj",
    }
    for i in range(n_layer):
        for ours, theirs in parts.items():
            for kind in ("weight", "bias"):
                transposed = kind == "weight" and "." in ours  # Conv1D keeps (in, out)
                names.append((f"blocks.{i}.{ours}.{kind}", f"transformer.h.{i}.{theirs}.{kind}", transposed))
    return names


@pytest.fixture(
    scope="module", params=[("gelu", "gelu"), ("gelu_tanh", "gelu_new")], ids=lambda pair: pair[0]
)
def gpt2(request):
    """transformers' GPT-2 in the shape of TINY, all parameters random; .mlp_kind is our name for its MLP."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=TINY.vocab_size,
            n_positions=TINY.block_size,
            n_embd=TINY.n_embd,
            n_layer=TINY.n_layer,
            n_head=TINY.n_head,
            activation_function=request.param[1],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    model.mlp_kind = request.param[0]
    return model


@both_kernels
@pytest.mark.parametrize("T", [16, 5, 1])
def test_equals_gpt2_of_transformers(gpt2, flash, T):
    model = GPT(replace(TINY, flash_attn=flash, mlp=gpt2.mlp_kind))
    ours, theirs = dict(model.named_parameters()), dict(gpt2.named_parameters())
    names = gpt2_names(TINY.n_layer)
    assert {name for name, _, _ in names} == set(ours)
    assert {name for _, name, _ in names} == set(theirs)
    with torch.no_grad():
        for name, other, transposed in names:
            ours[name].copy_(theirs[other].T if transposed else theirs[other])

    x = tokens(B=3, T=T + 1)
    logits, loss = model(x[:, :-1], x[:, 1:])
    expected = gpt2(x[:, :-1]).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=1e-6)

    loss.backward()
    gpt2.zero_grad()
    expected_loss.backward()
    for name, other, transposed in names:
        gradient = theirs[other].grad
        torch.testing.assert_close(
            ours[name].grad, gradient.T if transposed else gradient, atol=1e-5, rtol=1e-4, msg=name
        )


# Attention


def window(T: int, S: int, size: int) -> torch.Tensor:
    """A mask by which each query attends to itself and the size - 1 keys before it, (T, S)."""
    queries, keys = torch.arange(S - T, S)[:, None], torch.arange(S)
    return (keys <= queries) & (keys > queries - size)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "window"])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (2, 2), (16, 16), (1, 5), (3, 7), (15, 16)])
def test_kernels_equal_the_formula_of_attention(T, S, masked):
    """Results and gradients, as many keys as queries or more, which is what a cache has."""
    torch.manual_seed(1)
    q, weight = torch.randn(2, 2, 3, T, 8, dtype=torch.float64).unbind()
    k, v = torch.randn(2, 2, 3, S, 8, dtype=torch.float64).unbind()
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    mask = window(T, S, 3) if masked else None
    calls = [lambda: attention(*inputs, mask), lambda: kernels.attention(*inputs, mask)]
    if not masked:
        calls.append(lambda: kernels.explicit_attention(*inputs, 0.0))
    if T == 1:
        calls.append(lambda: kernels.one_query_attention(*inputs, mask))
    expected, *others = ((y := call(), *torch.autograd.grad((y * weight).sum(), inputs)) for call in calls)
    for other in others:
        for one, another in zip(expected, other, strict=True):
            torch.testing.assert_close(one, another)


@pytest.mark.parametrize("attend", [attention, kernels.attention, kernels.explicit_attention])
def test_the_last_queries_attend_as_they_do_among_all(attend):
    """Causal by offset: what a step with a cache computes is the end of the whole."""
    q, k, v = torch.randn(3, 1, 2, 10, 8, dtype=torch.float64).unbind()
    whole = attend(q, k, v, dropout=0.0)
    for T in (1, 4, 9):
        torch.testing.assert_close(attend(q[:, :, -T:], k, v, dropout=0.0), whole[:, :, -T:])


@both_kernels
@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_positions_and_mask_are_arguments(flash, positions):
    """Two texts in one sequence, each with its own positions and hidden from the other, are as if alone."""
    model = make(replace(TINY, flash_attn=flash, positions=positions), std=0.2).eval()
    x = tokens(B=1, T=16)
    document = torch.arange(16) // 9
    mask = (document[:, None] == document) & torch.ones(16, 16, dtype=torch.bool).tril()
    places = torch.cat((torch.arange(9), torch.arange(7)))
    logits, _ = model(x, positions=places, mask=mask)
    alone = torch.cat([model(x[:, :9])[0], model(x[:, 9:])[0]], dim=1)
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)


def test_the_whole_model_is_the_same_with_either_kernel():
    models = [make(replace(TINY, flash_attn=flash), std=0.2) for flash in (True, False)]
    x = tokens(T=17)
    losses = [model(x[:, :-1], x[:, 1:])[1] for model in models]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


@both_kernels
def test_a_logit_depends_on_every_token_up_to_it_and_on_none_after(flash):
    model = make(replace(TINY, flash_attn=flash), std=0.2)
    embedded = []
    model.token_embedding.register_forward_hook(lambda _module, _args, out: embedded.append(out))
    logits, _ = model(tokens(B=1))
    T = TINY.block_size
    for t in range(T):
        (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), embedded[0], retain_graph=True)
        reached = gradient[0].abs().amax(dim=-1)  # (T,)
        assert torch.all(reached[t + 1 :] == 0)
        assert torch.all(reached[: t + 1] > 0)


@both_kernels
def test_sequences_of_a_batch_do_not_mix(flash):
    model = make(replace(TINY, flash_attn=flash), std=0.2)
    x = tokens(B=3)
    alone = torch.cat([model(row[None])[0] for row in x])
    torch.testing.assert_close(model(x)[0], alone, atol=1e-5, rtol=1e-5)


def test_position_matters():
    model = make(std=0.2)
    logits, _ = model(torch.full((1, 16), 7))
    assert torch.pdist(logits[0]).min() > 1e-3


# Shapes and sizes


@pytest.mark.parametrize("T", range(1, 17))
def test_any_length_up_to_the_block_size(T):
    model = make(std=0.2)
    x = tokens(T=16)
    logits, loss = model(x[:, :T])
    assert logits.shape == (2, T, 50)
    assert loss is None
    torch.testing.assert_close(logits, model(x)[0][:, :T], atol=1e-5, rtol=1e-5)


def test_longer_than_the_block_size_is_refused():
    with pytest.raises(ValueError, match="17 tokens are more than"):
        make()(tokens(T=17))


@pytest.mark.parametrize(
    "config",
    [TINY, GPT2, GPTConfig(), GPTConfig(block_size=1, n_layer=1, n_head=1, n_embd=1, vocab_size=1)],
)
def test_the_number_of_parameters_is_the_formula(config):
    V, T, C, L = config.vocab_size, config.block_size, config.n_embd, config.n_layer
    block = 12 * C * C + 13 * C  # 4 C^2 + 4 C in the attention, 8 C^2 + 5 C in the MLP, 4 C in the norms
    assert meta_model(config).num_parameters() == V * C + T * C + L * block + 2 * C


def test_gpt2_has_124_million_parameters_and_costs_0_855_gigaflop_a_token():
    model = meta_model(GPT2)
    assert model.num_parameters() == 124_439_808
    assert flops_per_token(model) == pytest.approx(0.855e9, rel=1e-3)


def test_flops_count_the_matrix_products_that_the_model_does():
    from torch.utils.flop_counter import FlopCounterMode

    model = make(replace(TINY, flash_attn=False))
    x = tokens(B=2)
    with FlopCounterMode(display=False) as counter:
        model(x, x)[1].backward()
    assert counter.get_total_flops() == flops_per_token(model) * x.numel()


def test_token_embedding_and_output_are_one_tensor():
    model = make()
    assert model.head.weight is model.token_embedding.weight
    names = [name for name, _ in model.named_parameters()]
    assert "token_embedding.weight" in names
    assert "head.weight" not in names
    x = tokens(T=17)
    model(x[:, :-1], x[:, 1:])[1].backward()
    with torch.no_grad():
        model.token_embedding.weight.add_(model.token_embedding.weight.grad, alpha=-0.1)
    assert torch.equal(model.head.weight, model.token_embedding.weight)


# Initialization


def test_initial_weights():
    model = make(GPTConfig(block_size=64, n_layer=4, n_head=4, n_embd=256, dropout=0.0, vocab_size=300))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert torch.all(parameter == 0), name
        elif parameter.dim() == 1:
            assert torch.all(parameter == 1), name
        else:
            expected = 0.02 / math.sqrt(2 * 4) if name.endswith("proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name
    assert sum(name.endswith("proj.weight") for name, _ in model.named_parameters()) == 2 * 4


@pytest.mark.parametrize("V", [2, 50, 1000])
def test_the_first_loss_is_that_of_guessing(V):
    model = make(replace(TINY, vocab_size=V))
    x = tokens(B=64, T=17, V=V)
    _, loss = model(x[:, :-1], x[:, 1:])
    assert loss.item() == pytest.approx(math.log(V), abs=0.03)


def test_a_seed_fixes_the_weights():
    one, same, other = make(seed=1), make(seed=1), make(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.token_embedding.weight, other.token_embedding.weight)


# Training


def test_learns_a_batch_by_heart():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = tokens(B=4, T=17)
    for _ in range(80):
        _, loss = model(x[:, :-1], x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    assert torch.equal(model(x[:, :-1])[0].argmax(-1)[:, 3:], x[:, 4:])


@both_kernels
def test_dropout_in_training_alone(flash):
    model = make(replace(TINY, dropout=0.5, flash_attn=flash), std=0.2)
    x = tokens()
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])
    without = make(replace(TINY, flash_attn=flash), std=0.2)
    assert torch.equal(model(x)[0], without.eval()(x)[0])


@both_kernels
def test_every_place_of_dropout_is_used(flash):
    """On the embeddings, and where each branch ends; inside the attention, see below."""
    model = make(replace(TINY, dropout=0.5, flash_attn=flash)).train()
    used = []
    places = [module for module in model.modules() if isinstance(module, Dropout)]
    for place in places:
        assert place.p == 0.5
        place.register_forward_hook(lambda module, _args, _out: used.append(module))
    model(tokens())
    assert len(places) == 1 + 2 * TINY.n_layer
    assert set(used) == set(places)
    assert len(used) == len(places)


@pytest.mark.parametrize("attend", [kernels.attention, kernels.explicit_attention, attention])
def test_attention_dropout_keeps_the_mean(attend):
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 1, 1, 4, 2).unbind()
    dropped = attend(*(t.expand(20_000, 1, 4, 2) for t in (q, k, v)), dropout=0.3)
    torch.testing.assert_close(dropped.mean(0), attend(q, k, v, dropout=0.0)[0], atol=0.05, rtol=0)
    assert dropped.std(0).min() > 0.05
    first = dropped[:, 0, 0] / v[0, 0, 0]  # attends to itself alone: dropped, or scaled up
    assert sorted({round(x, 2) for x in first.flatten().tolist()}) == [0.0, 1.43]


def test_the_loss_is_in_float32_where_the_arithmetic_is_not():
    model = make()
    x = tokens(T=17)
    logits, loss = make().bfloat16()(x[:, :-1], x[:, 1:])
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(x[:, :-1], x[:, 1:])
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32


# The rest of the contract


def test_every_name_in_the_configuration_has_a_row():
    assert set(ACTIVATIONS) == set(get_args(MLPKind))
    assert set(NORMS) == set(get_args(Norm))


def test_state_dict_round_trip():
    one, other = make(seed=1, std=0.2), make(seed=2)
    x = tokens()
    assert not torch.equal(one(x)[0], other(x)[0])
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x)[0], other(x)[0])
    assert other.head.weight is other.token_embedding.weight


def test_the_root_model_file_exports_the_same_classes(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    monkeypatch.delitem(sys.modules, "model", raising=False)
    root = importlib.import_module("model")
    sys.modules.pop("model")
    assert root.GPT is nanogpt.model.gpt.GPT
    assert root.GPTConfig is nanogpt.model.gpt.GPTConfig is GPTConfig


def test_a_model_without_memory_costs_no_import():
    """PyTorch would import sympy and its compiler for an operation on the meta device."""
    code = (
        "import sys; from nanogpt.config import GPTConfig; from nanogpt.model.size import meta_model;"
        " meta_model(GPTConfig(positions='rope', ngram_vocab=9, vocab_size=9));"
        " print([name for name in ('sympy', 'torch._dynamo') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
