"""Sampling follows the model's probabilities; temperature, top-k and top-p do what they say, exactly."""

import itertools
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.config import GPTConfig
from nanogpt.errors import UserError
from nanogpt.inference import sampling
from nanogpt.inference.config import SamplingParams
from nanogpt.inference.generate import generate
from nanogpt.inference.processors import keep_top_k, keep_top_p
from nanogpt.inference.text import TextStream, generate_text
from nanogpt.inference.tokens import Token
from nanogpt.model.gpt import GPT
from nanogpt.tokenizer.base import ByteTokenizer, CharTokenizer

quick = settings(deadline=None, derandomize=True, max_examples=100)
TINY = GPTConfig(block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.0, vocab_size=20)
logit_rows = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=30)
different_logits = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=30, unique=True)
INF = float("inf")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads, and lose much where other programs want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = GPT(TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def sample(logits, generator=None, **params):
    return sampling.sample(logits, SamplingParams(**params), generator)


def frequencies(logits, count=40_000, **settings):
    """How often each token is drawn, as fractions."""
    drawn = sample(torch.tensor([logits]).expand(count, -1), generator=seeded(), **settings)
    return torch.bincount(drawn, minlength=len(logits)) / count


def kept(logits):
    return [i for i, value in enumerate(logits[0].tolist()) if value > -INF]


PROMPT = torch.tensor([[3, 1, 4], [1, 5, 9]])

# Choosing one token


def test_temperature_0_takes_the_likeliest():
    logits = torch.randn(50, 20, generator=seeded())
    assert torch.equal(sample(logits, temperature=0), logits.argmax(-1))
    assert torch.equal(sample(logits, temperature=0, top_k=3, top_p=0.5), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38])
def test_a_tiny_temperature_is_almost_0(temperature):
    logits = torch.tensor([[1.0, 5.0, -3.0], [-2.0, -9.0, -1.0]])
    assert sample(logits, temperature=temperature, generator=seeded()).tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_top_k_1_takes_the_likeliest(temperature):
    logits = torch.randn(200, 20, generator=seeded())
    assert torch.equal(
        sample(logits, temperature=temperature, top_k=1, generator=seeded()), logits.argmax(-1)
    )


def test_a_tiny_top_p_takes_the_likeliest():
    logits = torch.randn(200, 20, generator=seeded())
    assert torch.equal(sample(logits, top_p=1e-6, generator=seeded()), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature):
    logits = [2.0, 1.0, 0.0, -1.0, 0.5]
    expected = (torch.tensor(logits) / temperature).softmax(-1)
    chi2 = (40_000 * (frequencies(logits, temperature=temperature) - expected) ** 2 / expected).sum()
    assert chi2 < 25  # 4 degrees of freedom: exceeded once in 20,000 by chance, and the seed is fixed


def test_frequencies_after_top_k_and_top_p_are_the_softmax_of_what_is_left():
    logits = [2.0, 1.0, 0.0, -1.0, 0.5]
    for cut, left in (
        ({"top_k": 3}, [0, 1, 4]),
        ({"top_p": 0.75}, [0, 1]),
        ({"top_k": 3, "top_p": 0.9}, [0, 1, 4]),
    ):
        expected = torch.zeros(5)
        expected[left] = torch.tensor(logits)[left].softmax(-1)
        torch.testing.assert_close(frequencies(logits, **cut), expected, atol=0.01, rtol=0)


def test_temperature_comes_before_top_p():
    logits = torch.tensor([[2.0, 1.0, 0.0]])  # hot, the likeliest alone no longer reaches 0.6
    assert set(sample(logits.expand(2000, -1), temperature=1.0, top_p=0.6, generator=seeded()).tolist()) == {
        0
    }
    assert set(sample(logits.expand(2000, -1), temperature=10.0, top_p=0.6, generator=seeded()).tolist()) == {
        0,
        1,
    }


def test_rows_are_drawn_each_by_its_own_logits():
    logits = torch.full((20, 20), -INF).fill_diagonal_(0.0)
    for settings_ in ({}, {"top_k": 5}, {"top_p": 0.9}, {"temperature": 0}):
        assert torch.equal(sample(logits, generator=seeded(), **settings_), torch.arange(20))


def test_bfloat16_logits():
    logits = torch.randn(30, 20, generator=seeded()).bfloat16()
    assert torch.equal(sample(logits, top_k=5, top_p=1e-6, generator=seeded()), logits.argmax(-1))


# top-k


@quick
@given(different_logits, st.integers(1, 40))
def test_top_k_keeps_the_k_likeliest(row, k):
    logits = torch.tensor([row])
    result = keep_top_k(logits, k)
    left = kept(result)
    assert sorted(row[i] for i in left) == sorted(row)[-k:]
    assert torch.equal(result[0, left], logits[0, left])  # what stays is untouched


@quick
@given(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=12), st.integers(1, 15))
def test_top_k_keeps_no_more_than_k_among_equals(row, k):
    """Equal logits are common in bfloat16."""
    left = kept(keep_top_k(torch.tensor([row]), k))
    assert len(left) == min(k, len(row))
    assert sorted(row[i] for i in left) == sorted(row)[-k:]


@pytest.mark.parametrize("k", [5, 6, 1000])
def test_top_k_of_the_vocabulary_or_more_changes_nothing(k):
    logits = torch.randn(3, 5, generator=seeded())
    assert torch.equal(keep_top_k(logits, k), logits)
    assert torch.equal(sample(logits, top_k=k, generator=seeded()), sample(logits, generator=seeded()))


# top-p


def smallest_set(row, p):
    """Add tokens from the likeliest on until they reach p. The slow way."""
    probabilities = torch.tensor(row, dtype=torch.float64).softmax(-1).tolist()
    chosen, total = [], 0.0
    for i in sorted(range(len(row)), key=lambda i: -probabilities[i]):
        if total >= p:
            break
        chosen.append(i)
        total += probabilities[i]
    return chosen, probabilities


@quick
@given(logit_rows, st.floats(1e-3, 1))
def test_top_p_keeps_the_fewest_that_reach_p(row, p):
    logits = torch.tensor([row])
    result = keep_top_p(logits, p)
    left = kept(result)
    expected, probabilities = smallest_set(row, p)
    reached = sum(probabilities[i] for i in left)
    assert reached >= p - 1e-5
    assert reached - min(probabilities[i] for i in left) < p + 1e-5  # without the last it would not do
    assert min(row[i] for i in left) >= max([row[i] for i in range(len(row)) if i not in left], default=-INF)
    if abs(reached - p) > 1e-4:  # rounding does not decide
        assert len(left) == len(expected)
    assert torch.equal(result[0, left], logits[0, left])


def test_top_p_of_a_worked_example():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    for p, expected in ((0.35, [1]), (0.45, [1, 3]), (0.65, [1, 3]), (0.75, [1, 2, 3]), (0.95, [0, 1, 2, 3])):
        assert kept(keep_top_p(logits, p)) == expected


def test_top_p_1_changes_nothing():
    for size in (5, 65, 50257):
        logits = torch.zeros(1, size)
        assert torch.equal(keep_top_p(logits, 1.0), logits)


def test_top_p_works_row_by_row():
    logits = torch.randn(6, 20, generator=seeded())
    alone = torch.cat([keep_top_p(row[None], 0.7) for row in logits])
    assert torch.equal(keep_top_p(logits, 0.7), alone)


# Generating


def run(model, prompt=PROMPT, num_tokens=30, **settings_):
    return torch.stack(list(generate(model, prompt, num_tokens=num_tokens, **settings_)), dim=1)


def test_greedy_generation_equals_the_plain_loop(model):
    idx = PROMPT
    for _ in range(30):  # well past block_size
        logits, _ = model(idx[:, -TINY.block_size :])
        idx = torch.cat((idx, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(run(model, temperature=0), idx[:, PROMPT.shape[1] :])


@pytest.mark.parametrize("length", [1, 7, 8, 9, 50])
def test_a_prompt_of_any_length(model, length):
    prompt = torch.randint(20, (2, length), generator=seeded())
    tokens = run(model, prompt, temperature=0, num_tokens=12)
    seen = prompt[:, -TINY.block_size :]  # what the model can see
    assert torch.equal(tokens, run(model, seen, temperature=0, num_tokens=12))


def test_a_seed_fixes_the_tokens(model):
    one = run(model, generator=seeded(1))
    assert torch.equal(one, run(model, generator=seeded(1)))
    assert not torch.equal(one, run(model, generator=seeded(2)))


def test_the_global_generator_is_left_alone(model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(model, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)
    run(model)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_tokens", [0, 1, 17])
def test_yields_as_many_as_asked(model, num_tokens):
    tokens = list(generate(model, PROMPT, num_tokens=num_tokens))
    assert len(tokens) == num_tokens
    assert all(token.shape == (2,) and token.dtype == torch.int64 for token in tokens)
    assert all(token.min() >= 0 and token.max() < 20 for token in tokens)


def test_a_token_is_yielded_before_the_next_is_computed(model):
    calls = []
    with_count = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        stream = generate(model, PROMPT, num_tokens=10**9)
        assert calls == []
        for number, _ in enumerate(itertools.islice(stream, 5), 1):
            assert len(calls) == number
    finally:
        with_count.remove()


def test_gradients_are_off_inside_and_as_they_were_outside(model):
    inside = []
    watch = model.register_forward_hook(lambda *_: inside.append(torch.is_grad_enabled()))
    try:
        for _ in generate(model, PROMPT, num_tokens=2):
            assert torch.is_grad_enabled()  # while the caller has the token
    finally:
        watch.remove()
    assert inside == [False, False]
    assert torch.is_grad_enabled()


def test_the_prompt_is_not_changed(model):
    prompt = PROMPT.clone()
    run(model, prompt)
    assert torch.equal(prompt, PROMPT)


def test_parameters_and_keywords_are_the_same(model):
    keywords = run(model, generator=seeded(), temperature=0.7, top_k=9, top_p=0.8)
    params = SamplingParams(temperature=0.7, top_k=9, top_p=0.8)
    assert torch.equal(run(model, generator=seeded(), params=params), keywords)
    changed = run(model, generator=seeded(), params=SamplingParams(top_k=9, top_p=0.8), temperature=0.7)
    assert torch.equal(changed, keywords)


def test_wrong_parameters_are_refused_before_the_first_token(model):
    with pytest.raises(UserError, match="--top_k 0 is too small"):
        generate(model, PROMPT, num_tokens=1, top_k=0)
    with pytest.raises(TypeError, match="top_q"):
        generate(model, PROMPT, num_tokens=1, top_q=0.5)


# Text

TOKENIZER = CharTokenizer.train(
    "abcdefghijklmnopqrs", end_of_text=True
)  # 19 characters, and the end of a document
GREEDY = SamplingParams(temperature=0)


def test_text_is_that_of_the_tokens(model):
    prompt = PROMPT[:1]
    tokens = run(model, prompt, temperature=0)[0].tolist()
    end = tokens.index(TOKENIZER.end_of_text) if TOKENIZER.end_of_text in tokens else len(tokens)
    text = "".join(generate_text(model, TOKENIZER, prompt, GREEDY, num_tokens=30))
    assert text == TOKENIZER.decode(tokens[:end])
    assert len(text) > 4
    stopped = "".join(generate_text(model, TOKENIZER, prompt, GREEDY, num_tokens=30, stop=[text[3:5]]))
    assert stopped == text[: text.index(text[3:5])]


@pytest.mark.parametrize(("stop", "message"), [("abc", "stop='abc' is a text"), (["a", ""], "an empty text")])
def test_stop_strings_are_a_list_of_texts(model, stop, message):
    with pytest.raises(UserError, match=message):
        generate_text(model, TOKENIZER, PROMPT[:1], num_tokens=3, stop=stop)


class Words(ByteTokenizer):
    """A tokenizer whose tokens are these texts, by number."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self.texts = texts

    def decoder(self):
        return self.texts.__getitem__


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=5), max_size=3), st.data())
def test_a_text_ends_before_the_stop_string_that_begins_first(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    """However the text is cut into tokens, and whichever stop string is complete first."""
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
    places = [text.index(stop) for stop in stops if stop in text]
    stream = TextStream(Words(pieces), map(Token, range(len(pieces))), stops)
    assert "".join(stream) == text[: min(places, default=len(text))]
    assert stream.finish_reason == ("stop" if places else "length")
