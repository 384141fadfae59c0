"""Every option of the model: equal to an independent implementation, causal, and trainable.

The oracle for the modern block is transformers' Qwen3 with the same random weights.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from nanogpt import presets
from nanogpt.cli.model import count_parameters
from nanogpt.config import Architecture, GPTConfig, NgramPairs, model_config
from nanogpt.errors import UserError
from nanogpt.model.gpt import GPT, rotate, rotation_table
from nanogpt.model.kernels import Dropout
from nanogpt.model.ngram import NgramEmbedding, hashed

TINY = GPTConfig(block_size=16, n_layer=2, n_head=4, n_embd=32, dropout=0.0, vocab_size=50)
QWEN3 = replace(
    TINY, norm="rmsnorm", positions="rope", mlp="swiglu", bias=False, qk_norm=True, n_kv_head=2, tied=False
)
OPTIONS = {
    "rmsnorm": {"norm": "rmsnorm"},
    "rope": {"positions": "rope"},
    "relu2": {"mlp": "relu2"},
    "swiglu": {"mlp": "swiglu"},
    "mlp_width": {"mlp_width": 24},
    "no bias": {"bias": False},
    "qk_norm": {"qk_norm": True},
    "gqa": {"n_kv_head": 2},
    "untied": {"tied": False},
    "zero_init": {"zero_init": True, "tied": False},
    "logit_cap": {"logit_cap": 5.0},
    "head_dim": {"head_dim": 12},
    "rope_base": {"positions": "rope", "rope_base": 1e6},
    "ngrams": {"ngram_vocab": 97},
    "hashed pairs": {"ngram_vocab": 97, "ngram_pairs": "hashed"},
    "plain": {"flash_attn": False},
}
each_option = pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)


def make(config: GPTConfig) -> GPT:
    """A model all of whose weights matter."""
    torch.manual_seed(1)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(T: int = 16) -> torch.Tensor:
    return torch.randint(50, (2, T), generator=torch.Generator().manual_seed(2))


PRESET = replace(
    model_config(presets.get("qwen3"), 50), block_size=16, n_layer=2, n_embd=32, n_head=4, n_kv_head=2
)


PUBLISHED = replace(QWEN3, head_dim=12, rope_base=1e6)


@pytest.mark.parametrize("config", [QWEN3, PRESET, PUBLISHED], ids=["options", "preset", "published"])
def test_equals_qwen3_of_transformers(config: GPTConfig) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    ours = make(config).eval()
    width = ours.blocks[0].mlp.proj.weight.shape[1]
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=config.head_width,
            max_position_embeddings=16,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        )
    ).eval()
    state = {
        "model.embed_tokens.weight": ours.token_embedding.weight,
        "model.norm.weight": ours.final_norm.weight,
    }
    state["lm_head.weight"] = ours.head.weight
    for number, block in enumerate(ours.blocks):
        name = f"model.layers.{number}"
        state[f"{name}.input_layernorm.weight"] = block.norm_1.weight
        state[f"{name}.post_attention_layernorm.weight"] = block.norm_2.weight
        q, k, v = block.attn.qkv.weight.split(block.attn.qkv_dims)
        gate, up = block.mlp.fc.weight.chunk(2)
        parts = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "mlp.gate_proj": gate}
        parts |= {"mlp.up_proj": up, "mlp.down_proj": block.mlp.proj.weight}
        parts |= {"self_attn.o_proj": block.attn.proj.weight}
        parts |= {"self_attn.q_norm": block.attn.q_norm.weight, "self_attn.k_norm": block.attn.k_norm.weight}
        state |= {f"{name}.{part}.weight": weight for part, weight in parts.items()}
    theirs.load_state_dict(state)
    logits, _ = ours(tokens())
    torch.testing.assert_close(logits, theirs(tokens()).logits, atol=1e-5, rtol=1e-4)


@each_option
def test_is_causal(option) -> None:
    """Changing a token changes logits at and after it, and none before."""
    model = make(replace(TINY, **option))
    x = tokens()
    changed = x.clone()
    changed[:, 7] = (x[:, 7] + 1) % 50
    difference = (model(x)[0] - model(changed)[0]).abs().amax(dim=(0, 2))
    assert difference[:7].max() == 0
    assert difference[7:].min() > 0


@each_option
def test_learns_one_batch_by_heart(option) -> None:
    torch.manual_seed(1)
    model = GPT(replace(TINY, **option))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = tokens(), tokens().roll(-1, 1)
    for _ in range(120):
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


@each_option
def test_the_option_changes_the_model(option) -> None:
    plain, other = make(TINY), make(replace(TINY, **option))
    if option == {"flash_attn": False}:
        torch.testing.assert_close(plain(tokens())[0], other(tokens())[0], atol=1e-5, rtol=1e-4)
    else:
        assert not torch.allclose(plain(tokens())[0], other(tokens())[0], atol=1e-3)


@each_option
def test_the_summary_counts_every_parameter(option) -> None:
    config = replace(TINY, **option)
    assert sum(count_parameters(GPT(config)).values()) == GPT(config).num_parameters()


def test_rotation_sees_distances_alone() -> None:
    """The product of two rotated vectors depends on how far apart they are, not on where."""
    torch.manual_seed(1)
    table = rotation_table(replace(TINY, block_size=32), torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 32, 8)
    scores = (rotate(q, table) @ rotate(k, table).mT)[0, 0]
    for distance in (0, 1, 5):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rotate(q, table).norm(dim=-1), q.norm(dim=-1))


@pytest.mark.parametrize("pairs", ["exact", "hashed"])
def test_ngrams_depend_on_the_last_three_tokens_alone(pairs: NgramPairs) -> None:
    torch.manual_seed(1)
    table = NgramEmbedding(replace(TINY, ngram_vocab=1000, ngram_pairs=pairs))
    x = tokens()
    torch.testing.assert_close(table(x)[:, 5:], table(x[:, 3:])[:, 2:])
    assert not torch.allclose(table(x)[:, 3], table(x[:, 3:])[:, 0])  # the beginning is marked


def test_every_pair_of_a_small_vocabulary_has_its_own_row() -> None:
    """Also those that begin before the text; a larger vocabulary shares the rows there are."""
    table = NgramEmbedding(GPTConfig(vocab_size=5, ngram_vocab=64, n_embd=6))
    assert table.pairs.num_embeddings == 30
    with torch.no_grad():
        table.pairs.weight.copy_(torch.arange(30.0)[:, None])
        table.triples.weight.zero_()
    firsts = table(torch.arange(5)[:, None])[:, 0, 0]
    seconds = table(torch.cartesian_prod(torch.arange(5), torch.arange(5)))[:, 1, 0]
    assert torch.cat((firsts, seconds)).sort().values.tolist() == list(range(30))
    assert NgramEmbedding(GPTConfig(vocab_size=50, ngram_vocab=64)).pairs.num_embeddings == 64


def test_hashed_triples_are_spread_evenly() -> None:
    """Whatever the number of rows: a fixed first token alone reaches no fewer of them than chance would."""
    for rows in (4096, 4099, 30_000):
        keys = 17 * 66 * 65 + torch.arange(65 * 65)
        reached = len((hashed(keys) % rows).unique())
        assert reached > 0.95 * rows * (1 - math.exp(-len(keys) / rows))


def test_zero_init_starts_as_a_uniform_guess() -> None:
    model = GPT(replace(TINY, zero_init=True, tied=False))
    loss = model(tokens(), tokens())[1]
    torch.testing.assert_close(loss, torch.tensor(50.0).log())


def test_logit_cap_bounds_the_logits() -> None:
    model = make(replace(TINY, logit_cap=2.0))
    with torch.no_grad():
        model.token_embedding.weight.mul_(100)
    logits, _ = model(tokens())
    assert 1.9 < logits.abs().max() <= 2


@pytest.mark.parametrize("p", [0.2, 0.5, 0.01])
def test_dropout_drops_as_often_as_it_should(p: float) -> None:
    torch.manual_seed(1)
    dropout = Dropout(p)
    x = torch.full((1001, 999), 3.0, requires_grad=True)  # not a multiple of four
    y = dropout(x)
    kept = y != 0
    assert kept.float().mean() == pytest.approx(1 - p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5 + 2e-5)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 3 / (1 - p)))
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, kept / (1 - p))
    rows, columns = kept.float().std(dim=1), kept.float().std(dim=0)  # no row or column alike throughout
    assert min(rows.min(), columns.min()) > 0 if p > 0.01 else True
    neighbours = F.cosine_similarity(kept[:, 1:].float() - (1 - p), kept[:, :-1].float() - (1 - p), dim=0)
    assert neighbours.abs().mean() < 0.1


def test_dropout_is_off_in_evaluation_and_follows_the_seed() -> None:
    dropout, x = Dropout(0.5), torch.ones(100)
    assert torch.equal(dropout.eval()(x), x)
    torch.manual_seed(3)
    first = dropout.train()(x)
    assert not torch.equal(dropout(x), first)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_kv_head": 4}, "--n_kv_head 4 does not divide --n_head 6"),
        ({"positions": "rope", "n_embd": 18}, "--positions rope needs heads of even width, not 3"),
        ({"positions": "rope", "head_dim": 15}, "--positions rope needs heads of even width, not 15: change"),
        ({"head_dim": 0}, "--head_dim 0 is too small"),
        ({"rope_base": 0.5}, "--rope_base 0.5 is too small"),
        ({"logit_cap": -1.0}, "--logit_cap -1.0"),
        ({"ngram_vocab": -1}, "--ngram_vocab -1"),
        ({"attn_dropout": 1.0}, "--attn_dropout 1.0"),
    ],
)
def test_nonsense_is_refused(values, message) -> None:
    with pytest.raises(UserError, match=message):
        Architecture(**values)
