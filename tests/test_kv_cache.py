"""With a cache a model computes what it computes without one, whatever is fed to it at a time."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt import presets
from nanogpt.config import GPTConfig, model_config
from nanogpt.errors import UserError
from nanogpt.inference.generate import generate
from nanogpt.model.gpt import GPT
from nanogpt.model.kv_cache import KVCache
from nanogpt.native import step
from nanogpt.native.build import BuildError

W = 12
"""Tokens of a context."""

SMALL: dict[str, Any] = {"block_size": W, "n_layer": 2, "n_head": 4, "n_embd": 32, "dropout": 0.0}

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "textbook attention": {"flash_attn": False},
    "one kv head": {"n_kv_head": 1},
    "modern": {"positions": "rope", "norm": "rmsnorm", "mlp": "relu2", "qk_norm": True, "bias": False,
               "tied": False, "logit_cap": 15.0, "ngram_vocab": 97},
    "hashed pairs": {"ngram_vocab": 97, "ngram_pairs": "hashed"},
    "qwen3": {"positions": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "n_kv_head": 2},
    "wide heads": {"positions": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "n_kv_head": 2,
                   "head_dim": 20, "rope_base": 1e6},
    "narrow heads": {"head_dim": 3},
}  # fmt: skip

quick = settings(deadline=None, derandomize=True, max_examples=25)


def make(config: GPTConfig) -> GPT:
    torch.manual_seed(1)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module", params=["PyTorch", "native"])
def engine(request: pytest.FixtureRequest):
    """What computes the steps: PyTorch, or C where there is a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "PyTorch":
            patch.setattr(step, "library", lambda: BuildError("a test"))
        elif isinstance(step.library(), BuildError):
            pytest.skip(str(step.library()))
        yield request.param


@pytest.fixture(scope="module", params=[*SHAPES, *(f"preset {name}" for name in presets.PRESETS)])
def model(request: pytest.FixtureRequest, engine: str) -> GPT:
    """A small model of each kind, and one with the blocks of each preset."""
    if request.param in SHAPES:
        return make(GPTConfig(vocab_size=20, **SMALL | SHAPES[request.param]))
    config = model_config(presets.get(request.param.removeprefix("preset ")), 20)
    heads = {"n_head": 4, "n_kv_head": 2 if config.n_kv_head else None}
    tables = min(config.ngram_vocab, 97)
    return make(replace(config, **SMALL | heads, mlp_width=None, ngram_vocab=tables))


@pytest.fixture(scope="module")
def modern() -> GPT:
    return make(GPTConfig(vocab_size=20, **SMALL | SHAPES["modern"]))


@torch.no_grad()
def fed(model: GPT, cache: KVCache, rows: list[int], idx: torch.Tensor, counts=None) -> torch.Tensor:
    """The logits after the last token of each row, (R, V)."""
    tokens = cache.step(rows, idx, counts)
    logits, _ = step.with_native_steps(model)(idx, cache=tokens)
    cache.advance(tokens, idx)
    assert logits.shape[1] == 1  # the output layer has seen the last token alone
    return logits[:, 0]


@torch.no_grad()
def plain(model: GPT, text: torch.Tensor) -> torch.Tensor:
    """The logits after a text (T,), without a cache, (V,)."""
    return model(text[None])[0][0, -1]


@quick
@given(data=st.data())
def test_any_split_of_a_text_gives_the_same_numbers(model, data):
    text = torch.tensor(data.draw(st.lists(st.integers(0, 19), min_size=1, max_size=W)))
    cuts = sorted(data.draw(st.sets(st.integers(1, W - 1), max_size=4)))
    pieces = [piece for piece in text.tensor_split(cuts) if len(piece)]
    cache, done = KVCache(model.config, 1, W), 0
    for piece in pieces:
        done += len(piece)
        torch.testing.assert_close(
            fed(model, cache, [0], piece[None])[0], plain(model, text[:done]), rtol=1e-5, atol=1e-5
        )
    assert cache.lengths == [len(text)]


@quick
@given(data=st.data())
def test_texts_of_different_lengths_share_a_batch(model, data):
    texts = data.draw(st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=6), min_size=2, max_size=4))
    rows, longest = list(range(len(texts))), max(map(len, texts))
    idx = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    cache = KVCache(model.config, len(texts), W)
    logits = fed(model, cache, rows, idx, list(map(len, texts)))
    for turn in range(4):
        for row, text in enumerate(texts):
            torch.testing.assert_close(logits[row], plain(model, torch.tensor(text)), rtol=1e-5, atol=1e-5)
        rows = [row for row in rows if (row + turn) % 3] or rows  # some are left out
        new = torch.tensor(data.draw(st.lists(st.integers(0, 19), min_size=len(rows), max_size=len(rows))))
        logits[rows] = fed(model, cache, rows, new[:, None])
        for row, token in zip(rows, new.tolist(), strict=True):
            texts[row] = texts[row] + [token]
        logits = logits.clone()
        for row in set(range(len(texts))) - set(rows):
            logits[row] = plain(model, torch.tensor(texts[row]))


def test_several_tokens_may_follow_texts_of_different_lengths(modern):
    texts = [torch.tensor([3, 1, 4, 1]), torch.tensor([5, 9])]
    cache = KVCache(modern.config, 2, W)
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    fed(modern, cache, [0, 1], padded, [4, 2])
    new = torch.tensor([[2, 6, 5], [3, 5, 8]])
    logits = fed(modern, cache, [0, 1], new)
    for row, text in enumerate(texts):
        whole = torch.cat((text, new[row]))
        torch.testing.assert_close(logits[row], plain(modern, whole), rtol=1e-5, atol=1e-5)


def test_a_row_begins_anew_beside_others(modern):
    cache = KVCache(modern.config, 2, W)
    fed(modern, cache, [0, 1], torch.tensor([[3, 1, 4], [1, 5, 9]]))
    cache.clear([0])
    text = torch.tensor([7, 7, 2, 8])
    torch.testing.assert_close(
        fed(modern, cache, [0], text[None])[0], plain(modern, text), rtol=1e-5, atol=1e-5
    )
    logits = fed(modern, cache, [0, 1], torch.tensor([[1], [2]]))
    for row, whole in enumerate(([7, 7, 2, 8, 1], [1, 5, 9, 2])):
        torch.testing.assert_close(logits[row], plain(modern, torch.tensor(whole)), rtol=1e-5, atol=1e-5)


def test_in_bfloat16_the_cache_is_bfloat16_and_about_the_same(modern):
    text = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.autocast("cpu", torch.bfloat16):
        cache = KVCache(modern.config, 1, W)
        fed(modern, cache, [0], text[:, :3])
        cached = fed(modern, cache, [0], text[:, 3:])[0]
        without = plain(modern, text[0])
    assert cache.keys_values.dtype == torch.bfloat16
    torch.testing.assert_close(cached.float(), without.float(), rtol=5e-2, atol=5e-2)


# Generating


def continued(model, prompt, **settings_) -> list[int]:
    """The tokens that follow a prompt, (T,)."""
    return [int(token) for token in generate(model, [prompt], **settings_)]


@torch.no_grad()
def by_definition(model, prompt, overlap, num_tokens, seed=None) -> list[int]:
    """Without a cache: a context that is full is left for one of the last `overlap` tokens."""
    text, start, new = prompt.tolist(), max(0, len(prompt) - W), []
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    for _ in range(num_tokens):
        if len(text) - start > W:
            start = len(text) - overlap
        logits = plain(model, torch.tensor(text[start:]))
        if generator:
            token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        text.append(token)
        new.append(token)
    return new


@pytest.mark.parametrize("overlap", [None, 1, 5, W])
@pytest.mark.parametrize("length", [1, W - 1, W, W + 1, 3 * W])
def test_past_the_context_it_goes_on_as_defined(model, overlap, length):
    prompt = torch.randint(20, (length,), generator=torch.Generator().manual_seed(length))
    expected = by_definition(model, prompt, overlap or W // 2, 2 * W + 5)
    found = continued(model, prompt, num_tokens=2 * W + 5, temperature=0, context_overlap=overlap)
    assert found == expected


def test_seeded_tokens_are_those_without_a_cache(model):
    prompt = torch.tensor([3, 1, 4])
    generator = torch.Generator().manual_seed(7)
    found = continued(model, prompt, num_tokens=2 * W, generator=generator)
    assert found == by_definition(model, prompt, W // 2, 2 * W, seed=7)


def test_a_row_depends_on_its_own_seed_alone(model):
    prompts = [torch.randint(20, (length,)) for length in (2, 9, 5, 30)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    together = torch.stack(list(generate(model, prompts, num_tokens=25, generator=generators)), dim=1)
    for row, prompt in enumerate(prompts):
        alone = continued(model, prompt, num_tokens=25, generator=torch.Generator().manual_seed(row))
        assert together[row].tolist() == alone


def test_each_token_is_computed_once(modern):
    widths = []
    watch = modern.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    try:
        continued(modern, torch.tensor([3, 1, 4]), num_tokens=W + 2)
    finally:
        watch.remove()
    assert widths == [3] + [1] * (W - 3) + [W // 2] + [1] * 3


def test_mistakes_are_named_before_the_first_token(modern):
    with pytest.raises(UserError, match=f"--context_overlap 13 is more than the context, {W}"):
        generate(modern, [torch.tensor([1])], num_tokens=1, context_overlap=13)
    with pytest.raises(UserError, match="a prompt has no tokens"):
        generate(modern, [torch.tensor([1]), torch.tensor([], dtype=torch.int64)], num_tokens=1)
