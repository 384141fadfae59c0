"""Continuous batching: each text is the one that it would be alone, whatever joins, leaves or fails."""

import threading
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.config import GPTConfig
from nanogpt.inference import scheduler as scheduler_module
from nanogpt.inference.config import SamplingParams
from nanogpt.inference.engine import Engine
from nanogpt.inference.generate import generate
from nanogpt.inference.prompts import generators_for
from nanogpt.inference.scheduler import MIN_PREFIX, Request, Scheduler
from nanogpt.inference.tokens import Token, generate_tokens
from nanogpt.model.gpt import GPT

VOCAB = 23

SHAPE = {"block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": VOCAB, "dropout": 0.0}
SHAPES = {
    "learned": GPTConfig(**SHAPE),
    "rope": GPTConfig(
        **SHAPE, positions="rope", norm="rmsnorm", mlp="swiglu", n_kv_head=2, qk_norm=True, bias=False
    ),
    "ngrams": GPTConfig(**SHAPE, ngram_vocab=64, mlp="relu2", logit_cap=15.0),
}


class Hearer:
    """Notes what it hears; ends its text at an id, or is gone after some tokens."""

    def __init__(self, end: int | None = None, leaves_after: int | None = None):
        self.end, self.leaves_after = end, leaves_after
        self.cancelled = leaves_after == 0
        self.prompt: list[Token] = []
        self.tokens: list[Token] = []
        self.ended: list[str] = []
        self.done = threading.Event()

    def on_prompt(self, tokens: list[Token]) -> None:
        self.prompt = tokens

    def on_token(self, token: Token) -> bool:
        assert not self.ended
        self.tokens.append(token)
        self.cancelled = len(self.tokens) == self.leaves_after
        return token.id != self.end

    def on_end(self, error: str) -> None:
        self.ended.append(error)
        self.done.set()

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


@pytest.fixture(scope="module", params=SHAPES)
def model(request) -> GPT:
    torch.manual_seed(3)
    model = GPT(SHAPES[request.param]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that the next token is not anyone's guess
    return model


def alone(model: GPT, request: Request) -> list[int]:
    """What generate makes of a request."""
    generators = generators_for(model, [request.seed])
    steps = generate(
        model, [request.prompt], request.params, num_tokens=request.num_tokens, generator=generators
    )
    return [int(step) for step in steps]


def run(scheduler: Scheduler, requests: list[Request], arrivals: list[int] | None = None) -> None:
    """Steps until all requests have ended; request i arrives before step arrivals[i]."""
    waiting: deque[Request] = deque()
    late = sorted(zip(arrivals or [0] * len(requests), requests, strict=True), key=lambda pair: pair[0])
    step = 0
    while late or waiting or scheduler.rows:
        while late and late[0][0] <= step:
            waiting.append(late.pop(0)[1])
        scheduler.step(waiting)
        step += 1


PARAMS = st.sampled_from(
    [
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(top_p=0.8, context_overlap=7),
        SamplingParams(frequency_penalty=0.5, repetition_penalty=1.2),
        SamplingParams(logit_bias=("id:3=-100", "id:5=2")),
    ]
)


@settings(deadline=None, derandomize=True, max_examples=12)
@given(data=st.data())
def test_a_text_is_the_one_that_it_would_be_alone(model: GPT, data: st.DataObject):
    common = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=20, max_size=20))
    requests = []
    for seed in range(data.draw(st.integers(1, 9))):
        own = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=18))
        prompt = own if data.draw(st.booleans()) else common + own[: data.draw(st.integers(0, 18))]
        requests.append(
            Request(
                torch.tensor(prompt),
                data.draw(PARAMS),
                num_tokens=data.draw(st.integers(1, 50)),
                seed=seed,
                listener=Hearer(leaves_after=data.draw(st.sampled_from([None, None, None, 0, 3]))),
            )
        )
    arrivals = [data.draw(st.integers(0, 12)) for _ in requests]
    scheduler = Scheduler(model, rows=3)
    run(scheduler, requests, arrivals)
    for request in requests:
        hearer = request.listener
        expected = alone(model, request)
        if hearer.leaves_after is None:
            assert hearer.ids == expected
            assert hearer.ended == [""]
        else:
            assert hearer.ids == expected[: hearer.leaves_after]
            assert hearer.ended in (["cancelled"], [""])
    assert sorted(scheduler.free) == [0, 1, 2]
    assert scheduler.counts.new_tokens == sum(len(request.listener.ids) for request in requests)


def request_of(prompt: list[int], **changes) -> Request:
    given = {"params": SamplingParams(), "num_tokens": 6, "seed": 1, "listener": Hearer()} | changes
    return Request(torch.tensor(prompt), **given)


def test_a_prompt_is_computed_once_for_many_texts(model: GPT):
    prompt = [i % VOCAB for i in range(20)]
    requests = [request_of(prompt, seed=seed) for seed in range(5)]
    scheduler = Scheduler(model, rows=8)
    run(scheduler, requests)
    assert scheduler.counts.prompt_tokens == 100
    assert scheduler.counts.reused_tokens == 80
    assert [request.listener.ids for request in requests] == [alone(model, request) for request in requests]


def test_a_step_computes_so_many_prompts_and_copies_more(model: GPT, monkeypatch):
    monkeypatch.setattr(scheduler_module, "PREFILL_TOKENS", 30)
    different = [[i] * 20 for i in range(4)]
    for prompts, admitted in ((different, [2, 4]), ([different[0]] * 4, [4, 4])):
        scheduler, waiting = Scheduler(model, rows=4), deque(map(request_of, prompts))
        found = []
        for _ in range(2):
            scheduler.step(waiting)
            found.append(len(scheduler.rows))
        assert found == admitted


def test_a_request_that_nobody_wants_leaves_the_queue_while_others_run(model: GPT):
    engine = Engine(Scheduler(model, rows=1))
    running, unwanted = request_of([1], num_tokens=10**6), request_of([2])
    engine.submit([running, unwanted])
    unwanted.listener.cancelled = True
    assert unwanted.listener.done.wait(60)
    assert unwanted.listener.ended == ["cancelled"]
    assert not running.listener.ended
    engine.close("over")
    engine.thread.join(60)


def test_the_beginning_of_a_prompt_is_copied_where_that_is_exact(model: GPT):
    first, second = [1] * 20 + [2, 3], [1] * 20 + [4, 5, 6]
    for dtype, copied in ((torch.float32, 20), (torch.bfloat16, 0)):
        scheduler = Scheduler(model, rows=2, dtype=dtype)
        run(scheduler, [request_of(first, num_tokens=1)])
        later = request_of(second)
        run(scheduler, [later])
        assert scheduler.counts.reused_tokens == copied
        assert later.listener.ids == alone(model, later)
    scheduler = Scheduler(model, rows=2)
    run(scheduler, [request_of([1] * (MIN_PREFIX - 1) + [2]), request_of([1] * (MIN_PREFIX - 1) + [3])])
    assert scheduler.counts.reused_tokens == 0


def test_log_probabilities_are_those_of_generate_tokens(model: GPT):
    request = request_of([4, 5, 6, 7], logprobs=3, prompt_logprobs=2, params=SamplingParams(temperature=0.5))
    run(Scheduler(model, rows=2), [request, request_of([9])])
    steps = generate_tokens(
        model,
        [request.prompt],
        request.params,
        num_tokens=6,
        generator=generators_for(model, [1]),
        logprobs=3,
    )
    for token, (expected,) in zip(request.listener.tokens, steps, strict=True):
        assert token.id == expected.id
        assert token.logprob == pytest.approx(expected.logprob, abs=1e-5)
        assert [i for i, _ in token.top] == [i for i, _ in expected.top]
    with torch.no_grad():
        logits, _ = model(request.prompt[None])
    logprobs = logits[0].log_softmax(-1)
    heard = request.listener.prompt
    assert [token.id for token in heard] == [5, 6, 7]
    for place, token in enumerate(heard):
        assert token.logprob == pytest.approx(float(logprobs[place, token.id]), abs=1e-5)
        assert token.top[0][1] == pytest.approx(float(logprobs[place].max()), abs=1e-5)


def test_a_prompt_alone_can_be_scored(model: GPT):
    request = request_of([4, 5, 6], num_tokens=0, prompt_logprobs=0)
    scheduler = Scheduler(model, rows=1)
    run(scheduler, [request])
    assert (request.listener.ids, len(request.listener.prompt), request.listener.ended) == ([], 2, [""])
    assert list(scheduler.free) == [0]


def test_an_end_is_not_drawn_before_its_time(model: GPT):
    forced = SamplingParams(temperature=0, logit_bias=("id:7=1000",))
    request = request_of([1], params=forced, num_tokens=9, min_tokens=4, ends=(7,), listener=Hearer(end=7))
    other = request_of([2], params=forced, listener=Hearer(end=7))
    run(Scheduler(model, rows=2), [request, other])
    assert 7 not in request.listener.ids[:4]
    assert request.listener.ids[4:] == [7]
    assert other.listener.ids == [7]


def test_a_request_that_fails_leaves_the_others_alone(model: GPT, monkeypatch):
    good, bad = [request_of([1, 2, 3], seed=5), request_of([1, 2], seed=6)], request_of([3] * 4)
    scheduler = Scheduler(model, rows=2)
    plain = scheduler.fill

    def fill(slot, prompt, filled=0):
        if len(prompt) == 4:
            raise torch.OutOfMemoryError("out of memory, by 20 GiB\nmore")
        return plain(slot, prompt, filled)

    monkeypatch.setattr(scheduler, "fill", fill)
    run(scheduler, [good[0], bad, good[1]])
    assert bad.listener.ended == ["out of memory"]
    assert [request.listener.ids for request in good] == [alone(model, request) for request in good]
    assert sorted(scheduler.free) == [0, 1]


# --- the thread ---


def test_requests_from_many_threads_get_their_own_texts(model: GPT):
    engine = Engine(Scheduler(model, rows=4))
    requests = [request_of([seed % VOCAB] * (1 + seed % 5), seed=seed, num_tokens=20) for seed in range(12)]
    threads = [threading.Thread(target=engine.submit, args=([request],)) for request in requests]
    for thread in threads:
        thread.start()
    for request in requests:
        assert request.listener.done.wait(60)
    engine.close("over")
    engine.thread.join(60)
    assert not engine.thread.is_alive()
    assert [request.listener.ids for request in requests] == [alone(model, request) for request in requests]


@pytest.mark.parametrize("finish", [False, True])
def test_closing_finishes_or_ends_every_request(model: GPT, finish: bool):
    started = threading.Event()

    class Slow(Hearer):
        def on_token(self, token: Token) -> bool:
            started.set()
            closed.wait(60)
            return super().on_token(token)

    closed = threading.Event()
    engine = Engine(Scheduler(model, rows=1))
    requests = [request_of([1], listener=Slow()), request_of([2])]
    assert engine.submit(requests)
    assert started.wait(60)
    engine.close("the server stops", finish=finish)
    closed.set()
    engine.thread.join(60)
    assert not engine.submit([request_of([3])])
    for request in requests:
        if finish:
            assert (request.listener.ids, request.listener.ended) == (alone(model, request), [""])
        else:
            assert len(request.listener.ids) < 6
            assert request.listener.ended == ["the server stops"]


def test_too_many_waiting_requests_are_refused(model: GPT):
    engine = Engine(Scheduler(model, rows=1), max_waiting=2)
    engine.close("over")
    engine.thread.join(60)
    engine.closing = ""  # open, with nobody who computes
    assert engine.submit([request_of([1])])
    assert not engine.submit([request_of([1]), request_of([2])])
    assert engine.submit([request_of([1])])
    assert len(engine.waiting) == 2


def test_a_bug_ends_the_texts_and_not_the_engine(model: GPT):
    heard: list[Exception] = []
    engine = Engine(Scheduler(model, rows=2), on_bug=heard.append)

    class Broken(Hearer):
        def on_token(self, token: Token) -> bool:
            raise ValueError("a bug of the listener")

    broken, later = request_of([1], listener=Broken()), request_of([2])
    engine.submit([broken])
    assert broken.listener.done.wait(60)
    engine.submit([later])
    assert later.listener.done.wait(60)
    engine.close("over")
    assert broken.listener.ended == ["a bug of the listener"]
    assert [str(error) for error in heard] == ["a bug of the listener"]
    assert later.listener.ids == alone(model, later)


# --- calls ---


class Gate(Hearer):
    """Stops the engine's thread at its first token until it is opened; notes each token."""

    def __init__(self, noted: list[str]):
        super().__init__()
        self.noted, self.reached, self.opened = noted, threading.Event(), threading.Event()

    def on_token(self, token: Token) -> bool:
        self.noted.append("token")
        self.reached.set()
        self.opened.wait(60)
        return super().on_token(token)


def parts_of(noted: list[str], name: str, count: int):
    """Work in parts, each of which notes its name and where it is done; the result is the name."""
    for number in range(count):
        assert threading.current_thread().name == "engine"
        assert not torch.is_grad_enabled()
        noted.append(name)
        yield name if number == count - 1 else None


def test_calls_are_done_on_the_thread_of_the_engine_a_part_between_two_steps(model: GPT):
    noted: list[str] = []
    engine, gate = Engine(Scheduler(model, rows=1)), Gate(noted)
    request = request_of([1, 2], listener=gate)
    engine.submit([request])
    assert gate.reached.wait(60)
    one, two = engine.call(parts_of(noted, "one", 2)), engine.call(parts_of(noted, "two", 3))
    gate.opened.set()
    assert (one.result(60), two.result(60)) == ("one", "two")
    assert gate.done.wait(60)
    assert noted == ["token", "one", "token", "two", "token", "one", "token", "two", "token", "two", "token"]
    assert engine.call(parts_of(noted, "alone", 1)).result(60) == "alone"
    engine.close("over")
    assert gate.ids == alone(model, request)
    assert engine.scheduler.counts.steps == 6


def test_a_cancelled_call_is_not_gone_on_with(model: GPT):
    noted: list[str] = []
    engine, gate = Engine(Scheduler(model, rows=1), max_waiting=2), Gate(noted)
    engine.submit([request_of([1], listener=gate)])
    assert gate.reached.wait(60)
    cancelled, kept = engine.call(parts_of(noted, "cancelled", 9)), engine.call(parts_of(noted, "kept", 2))
    assert engine.call(parts_of(noted, "too many", 1)) is None
    assert cancelled.cancel()
    gate.opened.set()
    assert kept.result(60) == "kept"
    assert engine.call(parts_of(noted, "later", 1)).result(60) == "later"
    engine.close("over")
    assert "cancelled" not in noted
    assert engine.call(parts_of(noted, "late", 1)) is None


def test_a_call_that_is_cancelled_in_its_last_part_harms_nobody(model: GPT):
    engine = Engine(Scheduler(model, rows=1))
    started, go_on = threading.Event(), threading.Event()

    def waiting():
        started.set()
        go_on.wait(60)
        yield "nobody wants this"

    future = engine.call(waiting())
    assert started.wait(60)
    assert future.cancel()
    go_on.set()
    assert engine.call(iter(["still there"])).result(60) == "still there"
    engine.close("over")


@pytest.mark.parametrize(
    ("error", "reported"), [(ValueError("a bug"), True), (torch.OutOfMemoryError("out of memory"), False)]
)
def test_a_call_that_fails_harms_no_text(model: GPT, error: Exception, reported: bool):
    heard: list[Exception] = []
    noted: list[str] = []
    engine, gate = Engine(Scheduler(model, rows=1), on_bug=heard.append), Gate(noted)
    request = request_of([1], listener=gate)
    engine.submit([request])
    assert gate.reached.wait(60)

    def broken():
        yield None
        raise error

    future = engine.call(broken())
    gate.opened.set()
    assert future.exception(60) is error
    assert gate.done.wait(60)
    engine.close("over")
    assert gate.ids == alone(model, request)
    assert heard == [error] * reported


@pytest.mark.parametrize("finish", [False, True])
def test_closing_finishes_or_ends_every_call(model: GPT, finish: bool):
    noted: list[str] = []
    engine, gate = Engine(Scheduler(model, rows=1)), Gate(noted)
    engine.submit([request_of([1], num_tokens=1, listener=gate)])
    assert gate.reached.wait(60)
    future = engine.call(parts_of(noted, "parts", 3))
    engine.close("the server stops", finish=finish)
    gate.opened.set()
    if finish:
        assert future.result(60) == "parts"
    else:
        assert str(future.exception(60)) == "the server stops"
    engine.thread.join(60)
    assert not engine.thread.is_alive()
