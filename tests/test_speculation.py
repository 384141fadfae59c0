"""Speculation changes when tokens are computed, not what they are; guesses follow counts."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kv_cache import SHAPES, SMALL, W, make

from nanogpt.config import GPTConfig
from nanogpt.inference.config import SamplingParams
from nanogpt.inference.generate import decode, generate
from nanogpt.inference.speculation import ORDERS, NgramGuesses, Speculator, most_frequent
from nanogpt.model.gpt import GPT

quick = settings(deadline=None, derandomize=True, max_examples=30)


class Oracle(NgramGuesses):
    """Guesses a text that is known, with mistakes where it is told to make some."""

    def __init__(self, text: list[int], mistakes: set[int]) -> None:
        super().__init__()
        self.text, self.mistakes = text, mistakes

    def next(self, count: int) -> list[int]:
        """The true tokens, but for the mistakes."""
        done = len(self.tokens)
        places = range(done, min(done + count, len(self.text)))
        return [(self.text[place] + (place in self.mistakes)) % 20 for place in places]


@pytest.fixture(scope="module", params=["gpt2", "modern", "qwen3"])
def model(request: pytest.FixtureRequest) -> GPT:
    return make(GPTConfig(vocab_size=20, **SMALL | SHAPES[request.param]))


def text_of(model, prompt, **more) -> list[int]:
    """The tokens after a prompt."""
    return [int(token) for token in generate(model, torch.tensor([prompt]), **more)]


@pytest.mark.parametrize("steps", ["native", "PyTorch"])
@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("count", [1, 3, 64])
def test_the_text_is_the_same_whatever_is_guessed(model, request, steps, temperature, count):
    if steps == "PyTorch":
        request.getfixturevalue("pytorch_steps")
    prompt, tokens = [3, 1, 4], 3 * W

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    plain = text_of(model, prompt, num_tokens=tokens, temperature=temperature, generator=seeded())
    for mistakes in (set(), {5, 6, 9, 20}, set(range(100))):
        guesses = Oracle(prompt + plain, mistakes)
        found = text_of(
            model, prompt, num_tokens=tokens, temperature=temperature, generator=seeded(),
            speculate=count, guesses=guesses,
        )  # fmt: skip
        assert found == plain
    assert plain == text_of(
        model, prompt, num_tokens=tokens, temperature=temperature, generator=seeded(), speculate=count
    )


@torch.no_grad()
def test_true_guesses_are_computed_together(model):
    plain = text_of(model, [3], num_tokens=W - 1, temperature=0)
    guesses = Oracle([3, *plain], {8})
    speculator = Speculator(model, guesses, count=4)
    made = decode(speculator, [torch.tensor([3])], SamplingParams(temperature=0), W - 1, None, observe=None)
    assert [int(token) for token in made] == plain
    # The first token is of the prompt. Then 1 + 4 tokens a pass, up to the mistake at place 8, and the rest.
    assert speculator.passes == 3


def test_the_same_random_numbers_give_the_same_distribution():
    """A chi-square test of the second token, against the probabilities of the model itself."""
    model, runs = make(GPTConfig(vocab_size=6, **SMALL)), 3000
    generator = torch.Generator().manual_seed(1)
    drawn = Counter(
        tuple(text_of(model, [3, 3, 3], num_tokens=2, generator=generator, speculate=3)) for _ in range(runs)
    )
    with torch.no_grad():
        first = model(torch.tensor([[3, 3, 3]]))[0][0, -1].softmax(-1)
        both = {
            (a, b): float(first[a] * model(torch.tensor([[3, 3, 3, a]]))[0][0, -1].softmax(-1)[b])
            for a in range(6)
            for b in range(6)
        }
    likely = {pair: p for pair, p in both.items() if p * runs >= 5}
    statistic = sum((drawn[pair] - p * runs) ** 2 / (p * runs) for pair, p in likely.items())
    freedom = len(likely)
    assert freedom > 5
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


def test_several_texts_are_computed_as_ever(model):
    prompts = [torch.tensor([3, 1]), torch.tensor([4])]
    plain = torch.stack(list(generate(model, prompts, num_tokens=2 * W, temperature=0)))
    assert plain.equal(
        torch.stack(list(generate(model, prompts, num_tokens=2 * W, temperature=0, speculate=3)))
    )


@quick
@given(st.lists(st.integers(0, 3), max_size=60), st.sampled_from(ORDERS))
def test_the_most_frequent_followers_are_counted(text, order):
    hashes, followers = most_frequent(np.array(text, np.int64), order)
    counts: dict[tuple[int, ...], Counter[int]] = {}
    for place in range(order, len(text)):
        counts.setdefault(tuple(text[place - order : place]), Counter())[text[place]] += 1
    assert len(hashes) == len(counts)
    guesses = NgramGuesses(np.array(text))
    for context, counted in counts.items():
        guess = guesses.after(list(context))
        assert guess is not None
        assert counted[guess] == max(counted.values())
    assert (np.diff(hashes.astype(object)) > 0).all()
    assert len(followers) == len(hashes)


def test_the_text_so_far_comes_before_what_was_learned():
    guesses = NgramGuesses(np.array([1, 2, 3, 1, 2, 3]))
    guesses.add([1, 2])
    assert guesses.next(4) == [3, 1, 2, 3]
    guesses.add([7, 1, 2])
    assert guesses.next(1) == [7]
    guesses.begin()
    guesses.add([1, 2])
    assert guesses.next(1) == [3]
    assert NgramGuesses().next(3) == []
