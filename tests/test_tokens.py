"""Log-probabilities are the model's; a row of a batch is what it is alone, also when memory runs out."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.config import GPTConfig
from nanogpt.errors import UserError
from nanogpt.inference.config import SamplingParams
from nanogpt.inference.generate import generate
from nanogpt.inference.text import TextStream, generate_text, generate_texts, resolve_logit_bias, token_texts
from nanogpt.inference.tokens import Token, generate_rows, generate_tokens
from nanogpt.model.gpt import GPT
from nanogpt.tokenizer.base import ByteTokenizer, CharTokenizer
from nanogpt.tokenizer.bpe import BPETokenizer, byte_level_json

quick = settings(deadline=None, derandomize=True, max_examples=100)
V = 20
TINY = GPTConfig(block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.0, vocab_size=V)
PROMPTS = [torch.tensor([3, 1, 4]), torch.tensor([1]), torch.tensor([5, 9, 2, 6, 5, 3, 5, 8, 9, 7])]
LETTERS = CharTokenizer.train("abcdefghijklmnopqrst")


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(1)
    model = GPT(TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- log-probabilities ---


def test_log_probabilities_are_the_models_own(model: GPT) -> None:
    """Before the processors: teacher forcing gives the same numbers."""
    prompt = PROMPTS[0][None]
    steps = list(generate_tokens(model, prompt, num_tokens=5, logprobs=3, temperature=0.5, top_k=2,
                                 generator=seeded(1), logit_bias={2: 3.0}))  # fmt: skip
    ids = [step[0].id for step in steps]
    same = generate(
        model, prompt, num_tokens=5, temperature=0.5, top_k=2, generator=seeded(1), logit_bias={2: 3}
    )
    assert ids == [int(token) for token in same]
    text = torch.cat((prompt, torch.tensor([ids])), dim=1)
    logits, _ = model(text[:, :-1], text[:, 1:])
    expected = logits[0].detach().log_softmax(-1)[prompt.shape[1] - 1 :]
    for step, row in zip(steps, expected, strict=True):
        token = step[0]
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        values, best = row.topk(3)
        assert [i for i, _ in token.top] == best.tolist()
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("count", [0, 1, V, V + 5])
def test_as_many_alternatives_as_asked_or_all(model: GPT, count: int) -> None:
    (step,) = generate_tokens(model, PROMPTS, num_tokens=1, logprobs=count)
    assert [len(token.top) for token in step] == [min(count, V)] * len(PROMPTS)
    assert all(token.logprob is not None for token in step)


def test_without_log_probabilities_there_are_none(model: GPT) -> None:
    (step,) = generate_tokens(model, PROMPTS, num_tokens=1)
    assert all(token.logprob is None and token.top == () for token in step)


def test_wrong_values_are_refused_at_the_call(model: GPT) -> None:
    with pytest.raises(UserError, match="--top_k 0"):
        generate_tokens(model, PROMPTS, num_tokens=1, logprobs=1, top_k=0)


# --- penalties while generating ---


def test_a_penalty_sees_the_prompt_and_the_text_of_its_own_row(model: GPT) -> None:
    """A huge penalty lets no token occur twice, in a batch as alone."""
    rows = generate_rows(
        model, PROMPTS, SamplingParams(presence_penalty=1e4), num_tokens=12, generators=seeded(1, 2, 3)
    )
    for row, prompt in zip(rows, PROMPTS, strict=True):
        ids = [token.id for token in row]
        assert len(set(ids)) == 12
        assert set(ids) & set(prompt.tolist())  # the prompt's tokens do not count for this penalty
    both = SamplingParams(presence_penalty=1e4, repetition_penalty=1e4, logit_bias={0: -1e6})
    (row,) = generate_rows(model, PROMPTS[:1], both, num_tokens=12, generators=seeded(1))
    ids = [token.id for token in row]
    assert len(set(ids)) == 12
    assert 0 not in ids


# --- rows of a batch ---

CHOICES = [{}, {"temperature": 0.0}, {"top_p": 0.8, "repetition_penalty": 1.5}]


def alone(model: GPT, prompt: torch.Tensor, seed: int, **params: Any) -> list[int]:
    steps = generate(model, prompt[None], num_tokens=20, generator=seeded(seed)[0], **params)
    return [int(token) for token in steps]


@pytest.mark.parametrize("params", CHOICES)
def test_a_row_is_what_it_is_alone(model: GPT, params: dict[str, Any]) -> None:
    rows = generate_rows(model, PROMPTS, SamplingParams(**params), num_tokens=20, generators=seeded(7, 8, 9))
    for number in (1, 0, 2):  # in any order
        expected = alone(model, PROMPTS[number], 7 + number, **params)
        assert [token.id for token in rows[number]] == expected


@pytest.mark.parametrize("params", CHOICES)
@pytest.mark.parametrize("good_steps", [0, 1, 7])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried ...")])
def test_if_memory_runs_out_rows_are_made_one_after_the_other(
    model: GPT, params: dict[str, Any], good_steps: int, error: Exception
) -> None:
    sizes: list[int] = []

    def fail(_: GPT, inputs: tuple[torch.Tensor, ...]) -> None:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 1 and len(sizes) > good_steps:
            raise error

    said: list[str] = []
    hook = model.register_forward_pre_hook(fail)
    try:
        rows = generate_rows(
            model,
            PROMPTS,
            SamplingParams(**params),
            num_tokens=20,
            generators=seeded(7, 8, 9),
            on_short_memory=lambda: said.append("short"),
        )
        made = [[token.id for token in row] for row in rows]
    finally:
        hook.remove()
    assert made == [alone(model, prompt, 7 + row, **params) for row, prompt in enumerate(PROMPTS)]
    assert said == ["short"]


def test_one_row_has_nothing_to_fall_back_to(model: GPT) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    hook = model.register_forward_pre_hook(fail)
    try:
        (row,) = generate_rows(model, PROMPTS[:1], SamplingParams(), num_tokens=3, generators=seeded(1))
        with pytest.raises(MemoryError):
            next(row)
    finally:
        hook.remove()


def test_the_first_row_comes_while_it_is_made_and_the_rest_costs_nothing(model: GPT) -> None:
    calls: list[int] = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        rows = generate_rows(model, PROMPTS[:2], SamplingParams(), num_tokens=6, generators=seeded(1, 2))
        assert calls == []
        for number, _ in enumerate(rows[0], 1):
            assert len(calls) == number
        count = len(calls)
        assert len(list(rows[1])) == 6
        assert len(calls) == count
    finally:
        hook.remove()


def test_a_stop_string_ends_its_own_text_and_then_the_batch(model: GPT) -> None:
    def texts(stop: list[str]) -> tuple[list[str], list[str], int]:
        calls: list[int] = []
        hook = model.register_forward_hook(lambda *_: calls.append(1))
        streams = generate_texts(
            model, LETTERS, PROMPTS[:2], num_tokens=30, generators=seeded(1, 2), stop=stop
        )
        made = ["".join(stream) for stream in streams]
        hook.remove()
        return made, [stream.finish_reason for stream in streams], len(calls)

    whole, reasons, _ = texts([])
    assert reasons == ["length", "length"]
    first, second = whole[0][4:6], whole[1][9:11]
    made, reasons, steps = texts([first, second])
    assert made == [
        text[: min(text.index(stop) for stop in (first, second) if stop in text)] for text in whole
    ]
    assert reasons == ["stop", "stop"]
    ends = max(len(text) + 2 for text in made)
    assert steps < 30
    assert steps >= ends - 1


# --- text ---

EMOJI = "aé中😀e\u0301👩‍👩‍👧"


def tokenizers() -> list[Any]:
    bpe = BPETokenizer(byte_level_json([(b"\xf0", b"\x9f"), (b"\x98", b"\x80"), (b"a", b"\xc3")]))
    return [ByteTokenizer(), bpe, CharTokenizer.train(EMOJI)]


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=lambda tokenizer: tokenizer.kind)
def test_a_chunk_never_ends_within_a_character(tokenizer: Any) -> None:
    """Wherever num_tokens cuts the text."""
    ids = tokenizer.encode(EMOJI).tolist()
    for end in range(len(ids) + 1):
        stream = TextStream(tokenizer, [Token(i) for i in ids[:end]])
        chunks = list(stream)
        assert not any("\ufffd" in chunk for chunk in chunks)
        text = "".join(chunks)
        assert EMOJI.startswith(text)
        assert len(text.encode()) + 4 > len(b"".join(tokenizer.tokens[i] for i in ids[:end]))
        assert stream.finish_reason == "length"
        parts = list(token_texts(tokenizer, [Token(i) for i in ids[:end]]))
        assert [token.id for token, _ in parts] == ids[:end]
        assert "".join(part for _, part in parts) == text


def test_what_is_no_character_is_shown_as_such() -> None:
    tokens = [Token(byte) for byte in b"a\xfe\xf0\x9fb"]
    assert "".join(TextStream(ByteTokenizer(), tokens)) == "a\ufffd\ufffdb"


def test_the_end_of_a_text() -> None:
    tokenizer = CharTokenizer.train("ab", end_of_text=True)
    stream = TextStream(tokenizer, [Token(0), Token(2), Token(1)])
    assert "".join(stream) == "a"
    assert stream.finish_reason == "end_of_text"


@quick
@given(st.text("abé😀", max_size=20), st.lists(st.text("abé😀", min_size=1, max_size=3), max_size=2))
def test_tokens_with_their_texts_make_the_text(text: str, stop: list[str]) -> None:
    tokenizer = ByteTokenizer()
    tokens = [Token(byte) for byte in text.encode()]
    expected = text[: min((text.index(string) for string in stop if string in text), default=len(text))]
    assert "".join(TextStream(tokenizer, tokens, stop)) == expected
    parts = list(token_texts(tokenizer, tokens, stop))
    assert "".join(part for _, part in parts) == expected
    assert [token for token, _ in parts] == tokens[: len(parts)]
    if expected == text:
        assert len(parts) == len(tokens)
    else:
        assert len(parts) == len(expected.encode())


# --- a bias by its text ---


def test_a_text_of_one_token_has_a_bias(model: GPT) -> None:
    params = resolve_logit_bias(SamplingParams(logit_bias={"c": -100, 5: 1.5}), LETTERS)
    assert params.logit_bias == ("id:2=-100.0", "id:5=1.5")
    text = "".join(generate_text(model, LETTERS, PROMPTS[:1][0][None], num_tokens=5, logit_bias={"e": 1000}))
    assert text == "eeeee"


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({"ab": 1}, r"'ab' is 2 tokens, not one: id:0 \('a'\) id:1 \('b'\)"),
        ({"é": 1}, "'é' .*is not in the vocabulary"),
        ({99: 1}, "the vocabulary has 20 tokens"),
    ],
)
def test_a_bias_of_no_token_is_refused(bias: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        resolve_logit_bias(SamplingParams(logit_bias=bias), LETTERS)
    assert "\n" not in json.dumps(str(raised.value))
