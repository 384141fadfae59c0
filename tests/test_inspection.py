"""How a model reads a text: its own numbers, the attention of every kind of block, the logit lens."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_kv_cache import SHAPES, SMALL, W, make
from torch import Tensor

from nanogpt import TextModel, UserError, inspect_text, presets
from nanogpt.api import score
from nanogpt.config import GPTConfig, model_config
from nanogpt.inference.inspection import Inspection, inspect_in_parts, inspect_tokens
from nanogpt.machine.device import CPU
from nanogpt.model.gpt import GPT
from nanogpt.model.quantize import sampling_copy
from nanogpt.tokenizer.base import ByteTokenizer, CharTokenizer

LETTERS = CharTokenizer("abcdefghijklmnopqrst")


@pytest.fixture(scope="module", params=[*SHAPES, *(f"preset {name}" for name in presets.PRESETS)])
def model(request: pytest.FixtureRequest) -> GPT:
    """A small model of each kind, and one with the blocks of each preset."""
    if request.param in SHAPES:
        return make(GPTConfig(vocab_size=20, **SMALL | SHAPES[request.param]))
    config = model_config(presets.get(request.param.removeprefix("preset ")), 20)
    heads = {"n_head": 4, "n_kv_head": 2 if config.n_kv_head else None}
    tables = min(config.ngram_vocab, 97)
    return make(replace(config, **SMALL | heads, mlp_width=None, ngram_vocab=tables))


def text_of(length: int = W) -> Tensor:
    return torch.randint(20, (length,), generator=torch.Generator().manual_seed(length))


def inspected(model: GPT, length: int = W, **wanted) -> Inspection:
    return inspect_tokens(model, LETTERS, text_of(length), **wanted)


# --- tokens ---


@torch.no_grad()
def test_the_numbers_are_those_of_the_logits(model: GPT):
    ids, found = text_of(), inspected(model, top=4)
    logits = model(ids[None])[0][0].double()  # (T, V)
    expected = logits - logits.exp().sum(dim=-1, keepdim=True).log()
    first, *rest = found.tokens
    assert (first.id, first.logprob, first.entropy, first.rank, first.top) == (
        int(ids[0]),
        None,
        None,
        None,
        (),
    )
    for place, token in enumerate([*rest, found.next]):
        row = expected[place].tolist()
        order = sorted(range(20), key=lambda i: -row[i])
        assert [other.id for other in token.top] == order[:4]
        assert [other.logprob for other in token.top] == pytest.approx([row[i] for i in order[:4]], abs=1e-5)
        assert token.entropy == pytest.approx(-sum(math.exp(value) * value for value in row), abs=1e-5)
        if place < len(rest):
            assert token.id == ids[place + 1]
            assert token.logprob == pytest.approx(row[token.id], abs=1e-5)
            assert order[token.rank - 1] == token.id
    assert found.next.logprobs.tolist() == pytest.approx(expected[-1].tolist(), abs=1e-5)
    assert "".join(token.text for token in found.tokens) == LETTERS.decode(ids.tolist())
    assert (found.attention, found.lens) == (None, None)


def test_one_token_alone(model: GPT):
    found = inspected(model, 1, attention=(1, 3), lens=True, top=50)
    assert len(found.tokens) == 1
    assert len(found.next.top) == 20
    assert found.attention.tolist() == [[1.0]]
    assert [len(layer) for layer in found.lens] == [1, 1, 1]


def test_a_certain_token_and_an_impossible_one():
    model = make(GPTConfig(vocab_size=20, **SMALL))
    with torch.no_grad():
        model.final_norm.weight.mul_(1e6)
    found = inspected(model)
    assert found.next.entropy == 0
    assert found.next.top[0].logprob == 0
    assert all(token.entropy == 0 and math.isfinite(token.logprob) for token in found.tokens[1:])


# --- attention ---


def normed(x: Tensor, module: torch.nn.Module, rms: bool) -> Tensor:
    """A norm by its formula."""
    if isinstance(module, torch.nn.Identity):
        return x
    if not rms:
        x = x - x.mean(dim=-1, keepdim=True)
    x = x / (x.square().mean(dim=-1, keepdim=True) + (1e-6 if rms else 1e-5)).sqrt() * module.weight
    return x + module.bias if getattr(module, "bias", None) is not None else x


def turned(x: Tensor, position: int, base: float) -> Tensor:
    """RoPE as a product of complex numbers, of a vector of one head, (D,)."""
    a, b = x.double().chunk(2)
    angles = position * base ** (-torch.arange(len(a)) / len(a))
    product = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((product.real, product.imag))


def plain_attention(model: GPT, layer: int, head: int, x: Tensor) -> list[list[float]]:
    """The weights by their formula, one query and one key at a time. x: what enters the block, (T, C)."""
    config, attn = model.config, model.blocks[layer].attn
    D, kv_heads, rms = config.head_width, config.n_kv_head or config.n_head, config.norm == "rmsnorm"
    y = normed(x, model.blocks[layer].norm_1, rms) @ attn.qkv.weight.T
    y = y + attn.qkv.bias if config.bias else y
    shared = head // (config.n_head // kv_heads)
    q = normed(y[:, head * D : (head + 1) * D], attn.q_norm, rms)
    k = normed(y[:, (config.n_head + shared) * D : (config.n_head + shared + 1) * D], attn.k_norm, rms)
    rope = partial(turned, base=config.rope_base)
    turn = rope if config.positions == "rope" else lambda vector, position: vector.double()
    rows = []
    for t in range(len(x)):
        scores = [float(turn(q[t], t) @ turn(k[s], s)) / math.sqrt(D) for s in range(t + 1)]
        total = sum(map(math.exp, scores))
        rows.append([math.exp(score) / total for score in scores] + [0.0] * (len(x) - t - 1))
    return rows


@torch.no_grad()
def test_attention_equals_its_formula(model: GPT):
    ids, entered = text_of(), []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0][0])) for block in model.blocks
    ]
    model(ids[None])
    for hook in hooks:
        hook.remove()
    for layer in range(model.config.n_layer):
        for head in range(model.config.n_head):
            found = inspected(model, attention=(layer, head)).attention
            expected = torch.tensor(plain_attention(model, layer, head, entered[layer]))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_in_float32_though_the_products_are_narrow(shape):
    """A row sums to 1 as exactly as float32 can, and heads differ from float32 by rounding alone."""
    model = make(GPTConfig(vocab_size=20, **SMALL | SHAPES[shape]))
    exact = inspected(model, attention=(0, 2)).attention
    narrow = sampling_copy(model, torch.bfloat16, "none")
    with torch.autocast("cpu", torch.bfloat16):
        found = inspected(narrow, attention=(0, 2)).attention
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(W), atol=1e-6, rtol=0)
    assert (found - exact).abs().max() < 0.1


# --- the logit lens ---


@torch.no_grad()
def test_the_last_layer_of_the_lens_is_the_model_and_the_first_the_embeddings(model: GPT):
    ids = text_of()
    lens = inspected(model, lens=True).lens
    assert [len(layer) for layer in lens] == [W] * (model.config.n_layer + 1)
    x = model.token_embedding(ids)
    if model.position_embedding is not None:
        x = x + model.position_embedding.weight[:W]
    if model.ngram_embedding is not None:
        x = x + model.ngram_embedding(ids[None])[0]
    for layer, logits in ((lens[-1], model(ids[None])[0][0]), (lens[0], model.logits(model.final_norm(x)))):
        top = logits.log_softmax(dim=-1).topk(3)
        assert [[other.id for other in found] for found in layer] == top.indices.tolist()
        values = torch.tensor([[other.logprob for other in found] for found in layer])
        torch.testing.assert_close(values, top.values, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_lens_after_a_layer_is_the_model_that_ends_there(model: GPT):
    shorter = make(model.config)
    shorter.load_state_dict(model.state_dict())
    del shorter.blocks[1:]
    expected = shorter(text_of()[None])[0][0].argmax(dim=-1).tolist()
    assert [top[0].id for top in inspected(model, lens=True).lens[1]] == expected


# --- parts ---


@torch.no_grad()
def test_parts_have_the_same_numbers_and_leave_no_hook(model: GPT, monkeypatch):
    whole = inspected(model, lens=True, attention=(0, 0))
    monkeypatch.setattr(CPU, "logits_per_chunk", 60)  # three positions
    *pauses, found = inspect_in_parts(model, LETTERS, text_of(), lens=True, attention=(0, 0))
    assert pauses == [None] * (1 + 4 + 3 * 4)
    assert [token.id for token in found.tokens] == [token.id for token in whole.tokens]
    for one, other in zip(found.tokens[1:], whole.tokens[1:], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert one.rank == other.rank
    assert [[top[0].id for top in layer] for layer in found.lens] == [
        [top[0].id for top in layer] for layer in whole.lens
    ]
    torch.testing.assert_close(found.attention, whole.attention)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("length", "wanted", "message"),
    [
        (0, {}, "the text has 0 tokens: give 1 to 12"),
        (W + 1, {}, "the text has 13 tokens: give 1 to 12"),
        (3, {"top": -1}, "top -1"),
        (3, {"attention": (2, 0)}, "attention: layer 2: those of this model are 0 to 1"),
        (3, {"attention": (0, -1)}, "attention: head -1: those of this model are 0 to 3"),
    ],
)
def test_the_impossible_is_refused_at_the_call(length: int, wanted, message: str):
    with pytest.raises(UserError, match=message):
        inspect_in_parts(make(GPTConfig(vocab_size=20, **SMALL)), LETTERS, text_of(length), **wanted)


# --- from Python ---


def test_a_text_has_the_losses_of_score_and_its_characters():
    model = TextModel(make(GPTConfig(vocab_size=256, **SMALL)), ByteTokenizer())
    found = inspect_text(model, "Süß 日", top=2, lens=True)
    scored = score(model, "Süß 日", quiet=True)
    assert [-token.logprob for token in found.tokens[1:]] == pytest.approx(scored.losses.tolist(), abs=1e-5)
    assert [token.text for token in found.tokens] == [scored.first, *scored.tokens]
    assert all(len(token.top) == 2 for token in found.tokens[1:])
    for text, message in (("", "0 tokens"), ("a" * 13, "13 tokens"), (b"a", "text is a bytes")):
        with pytest.raises(UserError, match=message):
            inspect_text(model, text)
