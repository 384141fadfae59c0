"""Every logit processor, and their order, equals a plain NumPy loop; rows of a batch equal rows alone."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.errors import UserError
from nanogpt.inference.config import SamplingParams
from nanogpt.inference.processors import PENALTIES, PROCESSORS, History, check_logit_bias, process
from nanogpt.inference.sampling import draw, sample

quick = settings(deadline=None, derandomize=True, max_examples=200)
V = 9

rows = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=V, max_size=V, unique=True)
texts = st.lists(st.integers(0, V - 1), max_size=12)
parameters = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.5, 1.25, 2.0]),
        "frequency_penalty": st.sampled_from([-0.75, 0.5, 2.0]),
        "presence_penalty": st.sampled_from([-0.375, 0.25, 1.5]),
        "logit_bias": st.dictionaries(st.integers(0, V - 1), st.sampled_from([-100.0, 0.125, 100.0])),
        "temperature": st.sampled_from([0.0, 0.5, 2.0]),
        "top_k": st.integers(1, V + 2),
        "top_p": st.sampled_from([0.1, 0.53, 0.91, 1.0]),
        "min_p": st.sampled_from([0.013, 0.21, 1.0]),
    },
)


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max())
    return odds / odds.sum()


def oracle(logits: list[float], prompt: list[int], made: list[int], given: dict[str, Any]) -> np.ndarray:
    """The probabilities of the next token, step by step in the documented order, in float64."""
    scores = np.array(logits, dtype=np.float64)
    for token in set(prompt) | set(made):
        penalty = given.get("repetition_penalty", 1.0)
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in made:
        scores[token] -= given.get("frequency_penalty", 0.0)
    for token in set(made):
        scores[token] -= given.get("presence_penalty", 0.0)
    for token, bias in given.get("logit_bias", {}).items():
        scores[token] += bias
    if given.get("temperature", 1.0) == 0:
        return np.eye(V)[scores.argmax()]
    scores /= given.get("temperature", 1.0)
    order = list(np.argsort(-scores, kind="stable"))
    kept = order[: given.get("top_k", V)]
    chances = softmax(scores[kept])
    if "top_p" in given:
        before = np.cumsum(chances) - chances
        kept = [token for token, sum_ in zip(kept, before, strict=True) if sum_ < given["top_p"] - 1e-9]
    likeliest = scores[order[0]]
    if "min_p" in given:
        kept = [t for t in kept if np.exp(scores[t] - likeliest) >= given["min_p"] - 1e-9]
    result = np.zeros(V)
    result[kept] = softmax(scores[kept])
    return result


def is_close_call(logits: list[float], prompt: list[int], made: list[int], given: dict[str, Any]) -> bool:
    """Whether equal scores leave it open which token is kept, or rounding decides a limit."""
    plain = {name: value for name, value in given.items() if name in PENALTIES or name == "logit_bias"}
    chances = oracle(logits, prompt, made, plain)
    hot = oracle(logits, prompt, made, plain | {"temperature": given.get("temperature", 1.0)})
    return len(set(chances.round(12))) < V or len(set(hot[hot > 0].round(9))) < (hot > 0).sum()


def history(prompts: list[list[int]], made: list[list[int]]) -> History:
    """As `generate` makes it: prompts of any lengths, then a token of each row at a time."""
    result = History.of([torch.tensor(prompt, dtype=torch.int64) for prompt in prompts], V)
    for tokens in zip(*made, strict=True):
        result.add(torch.tensor(tokens))
    return result


def probabilities(logits: list[list[float]], params: SamplingParams, past: History) -> torch.Tensor:
    return process(torch.tensor(logits), params, past).softmax(-1)


@quick
@given(rows, texts, texts, parameters)
def test_the_processors_equal_a_plain_loop(logits, prompt, made, given_) -> None:
    result = probabilities([logits], SamplingParams(**given_), history([prompt], [made]))
    expected = oracle(logits, prompt, made, given_)
    if not is_close_call(logits, prompt, made, given_):
        np.testing.assert_allclose(result[0].numpy(), expected, rtol=1e-4, atol=1e-6)
    if given_.get("temperature") == 0:
        token = sample(torch.tensor([logits]), SamplingParams(**given_), None, history([prompt], [made]))
        assert token.tolist() == [expected.argmax()]


@pytest.mark.parametrize("name", [*PENALTIES, *PROCESSORS])
@quick
@given(logits=rows, prompt=texts, made=texts, given_=parameters)
def test_each_processor_equals_a_plain_loop(name, logits, prompt, made, given_) -> None:
    one = {key: value for key, value in given_.items() if key == name}
    result = probabilities([logits], SamplingParams(**one), history([prompt], [made]))
    if not is_close_call(logits, prompt, made, one):
        np.testing.assert_allclose(result[0].numpy(), oracle(logits, prompt, made, one), rtol=1e-4, atol=1e-6)


def test_every_processor_is_a_field_in_the_documented_order() -> None:
    assert [*PENALTIES, *PROCESSORS] == [
        "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias",
        "temperature", "top_k", "top_p", "min_p",
    ]  # fmt: skip


@quick
@given(st.lists(st.tuples(rows, texts), min_size=2, max_size=4), st.data(), parameters)
def test_rows_of_a_batch_equal_rows_alone(batch, data, given_) -> None:
    steps = data.draw(st.integers(0, 5))
    made = [data.draw(st.lists(st.integers(0, V - 1), min_size=steps, max_size=steps)) for _ in batch]
    params = SamplingParams(**given_)
    logits, prompts = [row for row, _ in batch], [prompt for _, prompt in batch]
    together = process(torch.tensor(logits), params, history(prompts, made))
    for row in range(len(batch)):
        alone = process(torch.tensor([logits[row]]), params, history([prompts[row]], [made[row]]))
        assert torch.equal(together[row], alone[0])


@quick
@given(rows, texts, parameters)
def test_logits_are_left_as_they_were(logits, made, given_) -> None:
    before = torch.tensor([logits])
    after = before.clone()
    process(after, SamplingParams(**given_), history([made], [made]))
    assert torch.equal(before, after)


@pytest.mark.parametrize("size", [1, 2, 65, 5000])
def test_rows_are_drawn_as_multinomial_draws_them(size: int) -> None:
    """The same tokens, and the same states of the generators afterwards; some tokens are ruled out."""
    probabilities = (3 * torch.randn(6, size, generator=torch.Generator().manual_seed(size))).softmax(dim=-1)
    probabilities[:3, 1::2] = 0
    ours, theirs = ([torch.Generator().manual_seed(seed) for seed in range(6)] for _ in range(2))
    for _ in range(20):
        rows = zip(probabilities, theirs, strict=True)
        expected = torch.cat([torch.multinomial(row, 1, generator=own) for row, own in rows])
        assert torch.equal(draw(probabilities, ours), expected)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(RuntimeError, match="not numbers"):
        draw(probabilities * float("nan"), ours)


def test_defaults_do_nothing() -> None:
    logits = torch.randn(3, V)
    assert process(logits, SamplingParams(), history([[1]] * 3, [[2]] * 3)) is logits


def test_as_transformers_defines_the_repetition_penalty() -> None:
    transformers = pytest.importorskip("transformers")
    logits, ids = torch.randn(2, V), torch.tensor([[1, 2, 2], [7, 7, 3]])
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    past = history(ids[:, :2].tolist(), ids[:, 2:].tolist())
    assert torch.equal(process(logits, SamplingParams(repetition_penalty=1.3), past), theirs)


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_as_transformers_cuts(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = {
        "top_k": transformers.TopKLogitsWarper(3),
        "top_p": transformers.TopPLogitsWarper(0.7),
        "min_p": transformers.MinPLogitsWarper(0.2),
    }
    logits = torch.randn(50, V, generator=torch.Generator().manual_seed(1))
    ours = process(logits, SamplingParams(**{name: {"top_k": 3, "top_p": 0.7, "min_p": 0.2}[name]}))
    assert torch.equal(ours, theirs[name](torch.zeros(50, 1, dtype=torch.int64), logits.clone()))


# --- values ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_p": 0.0}, r"--min_p 0.0 is outside \(0, 1\]: try 0.05"),
        ({"min_p": 1.1}, r"--min_p 1.1 is outside"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty 0.0 is not a positive number"),
        ({"repetition_penalty": float("inf")}, "--repetition_penalty inf is not a finite number"),
        ({"frequency_penalty": float("nan")}, "--frequency_penalty nan is not a finite number"),
        ({"presence_penalty": "x"}, "--presence_penalty x is of type str"),
        ({"logit_bias": ("e",)}, "--logit_bias 'e' is not TEXT=BIAS"),
        ({"logit_bias": ("=1",)}, "--logit_bias '=1' is not TEXT=BIAS"),
        ({"logit_bias": ("e=inf",)}, "--logit_bias 'e=inf' is not TEXT=BIAS"),
        ({"logit_bias": {3: "x"}}, "--logit_bias 'id:3=x' is not TEXT=BIAS"),
        ({"logit_bias": "e=1"}, "--logit_bias 'e=1' is of type str"),
    ],
)
def test_nonsense_is_refused(values, message) -> None:
    with pytest.raises(UserError, match=message) as raised:
        SamplingParams(**values)
    assert "\n" not in str(raised.value)


def test_the_ways_to_write_a_bias() -> None:
    assert SamplingParams(logit_bias={3: -1, "=": 2.5, np.int64(4): 1}).logit_bias == (
        "id:3=-1",
        "==2.5",
        "id:4=1",
    )


@pytest.mark.parametrize(
    ("entry", "message"), [("id:9=1", "ids of this vocabulary are below 9"), ("e=1", "names a text")]
)
def test_a_bias_of_no_id_is_refused(entry: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_logit_bias(SamplingParams(logit_bias=(entry,)), 9)
