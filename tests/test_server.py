"""The server: OpenAI's API over a checkpoint, with the texts of `generate`; what it refuses; how it ends."""

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
from conftest import tiny_run
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from serving import connect, post, serving, text_of
from waiting import HANGS, wait_until

from nanogpt import TextModel, generate, inspect_text, load_model
from nanogpt.checkpoint.format import load_checkpoint, save_checkpoint
from nanogpt.errors import UserError
from nanogpt.scoring import score
from nanogpt.server import inspection as server_inspection
from nanogpt.server import run as server_run
from nanogpt.server.app import Service
from nanogpt.server.config import ServeConfig
from nanogpt.server.metrics import BUCKETS, Seconds
from nanogpt.server.openapi import document

TEXT = "Süß, 日本 and 🙂: from fairest creatures we desire increase.\n" * 30
PROMPT = "from fairest"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder."""
    return tiny_run(tmp_path_factory.mktemp("run"), TEXT, block_size=64, max_iters=150)


@pytest.fixture(scope="module")
def model(out: Path) -> TextModel:
    return load_model(out, "cpu")


@pytest.fixture(scope="module")
def config(out: Path) -> ServeConfig:
    return ServeConfig(checkpoint=str(out), port=0, device="cpu", rows=4, grace=5.0)


@pytest.fixture(scope="module")
def url(config: ServeConfig) -> Iterator[str]:
    """The address of a server that all tests share."""
    with serving(config) as url:
        yield url


# --- clients ---


def test_the_client_of_openai_gets_the_texts_of_generate(url: str, model: TextModel):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    name = client.models.list().data[0].id
    assert name == "out"
    answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=40, seed=3, n=2, temperature=0.8)
    expected = generate(model, PROMPT, num_tokens=40, num_samples=2, seed=3, temperature=0.8)
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens <= 80
    stream = client.completions.create(
        model=name, prompt=PROMPT, max_tokens=40, seed=3, n=2, temperature=0.8, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    streamed, usage = ["", ""], None
    for chunk in stream:
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
        usage = chunk.usage or usage
    assert streamed == expected
    assert usage == answer.usage


def test_the_asynchronous_client_streams_many_texts_at_once(url: str, model: TextModel):
    async def one(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.completions.create(
            model="out", prompt=PROMPT, max_tokens=30, seed=seed, stream=True
        )
        return "".join([choice.text async for chunk in stream for choice in chunk.choices])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(12)))

    assert asyncio.run(all_of_them()) == [generate(model, PROMPT, num_tokens=30, seed=i) for i in range(12)]


def test_a_chat_says_that_the_model_only_continues_texts(url: str, model: TextModel):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    given = {"model": "out", "messages": messages, "max_tokens": 12, "seed": 2}
    answer = client.chat.completions.create(**given, logprobs=True, top_logprobs=2)
    expected = generate(
        model, "System: Be kind.\nUser: Hi\nAssistant:", num_tokens=12, seed=2, stop=["\nUser:"]
    )
    assert answer.choices[0].message.content == expected
    assert "base model" in answer.model_extra["warning"]
    content = answer.choices[0].logprobs.content
    spelled = b"".join(bytes(token.bytes) for token in content).decode("utf-8", "replace")
    assert spelled.removesuffix("\ufffd") == expected.removesuffix("\ufffd")
    assert all(len(token.top_logprobs) == 2 for token in content)
    chunks = list(client.chat.completions.create(**given, stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == expected
    assert chunks[0].choices[0].delta.role == "assistant"


# --- log-probabilities ---


def test_an_echo_has_the_losses_of_eval_and_one_entry_a_token(url: str, model: TextModel):
    """As lm-eval reads it: prompts as ids, one new token, whatever that is."""
    for end in (TEXT[:60], "Süß, 日本"):
        ids = model.tokenizer.encode(end).tolist()[:63]
        answer = post(url, prompt=[ids], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1).json()
        logprobs = answer["choices"][0]["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(logprobs["tokens"]) == len(ids) + 1
        assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
        losses = score(model.model, np.array(ids))
        assert np.allclose(losses, [-value for value in logprobs["token_logprobs"][1:-1]], atol=1e-5)
        for value, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
            assert value <= max(top.values())
            assert value in top.values()
        assert logprobs["token_logprobs"][-1] == max(logprobs["top_logprobs"][-1].values())  # greedy


def test_an_end_of_text_has_an_entry_too(url: str):
    body = {"prompt": "a", "max_tokens": 1, "logprobs": 1, "logit_bias": {"255": 100}}
    choice = post(url, **body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]["tokens"]) == (
        "",
        "stop",
        ["<|endoftext|>"],
    )
    choice = post(url, **body, ignore_eos=True).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("<|endoftext|>", "length")
    choice = post(url, **body | {"max_tokens": 5}, min_tokens=3).json()["choices"][0]
    assert len(choice["logprobs"]["tokens"]) == 4
    assert choice["finish_reason"] == "stop"


def test_offsets_and_texts_belong_together(url: str):
    for body in ({"echo": True}, {}, {"echo": True, "stop": ["e"]}):
        choice = post(url, prompt="Süß", max_tokens=25, seed=4, logprobs=0, **body).json()["choices"][0]
        offsets = choice["logprobs"]["text_offset"]
        assert offsets == sorted(offsets)
        assert offsets[0] == 0
        assert offsets[-1] <= len(choice["text"])
        assert choice["text"].startswith("Süß" if body else "")


def test_keys_of_alternatives_are_distinct_where_tokens_are_no_text(url: str):
    logprobs = post(url, prompt="日", max_tokens=3, seed=1, logprobs=100).json()["choices"][0]["logprobs"]
    assert all(len(top) >= 100 for top in logprobs["top_logprobs"])
    assert any(key.startswith("bytes:\\x") for key in logprobs["top_logprobs"][0])


def test_the_additions_of_vllm(url: str, model: TextModel):
    body = {"prompt": PROMPT, "max_tokens": 6, "seed": 1, "return_token_ids": True, "prompt_logprobs": 2}
    choice = post(url, **body, unknown_field=5).json()["choices"][0]
    assert choice["prompt_token_ids"] == list(PROMPT.encode())
    assert model.tokenizer.decode(choice["token_ids"]) == choice["text"]
    assert choice["prompt_logprobs"][0] is None
    second = choice["prompt_logprobs"][1]
    assert 2 <= len(second) <= 3
    assert second[str(ord("r"))]["decoded_token"] == "r"
    first_rank = [entry for entry in second.values() if entry["rank"] == 1]
    assert first_rank[0]["logprob"] == max(entry["logprob"] for entry in second.values())
    stopped = post(url, **body | {"max_tokens": 40}, stop_token_ids=choice["token_ids"][2:3]).json()[
        "choices"
    ][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["token_ids"][-1] == choice["token_ids"][2]


def test_the_best_of_many_texts(url: str, model: TextModel):
    body = {"prompt": PROMPT, "max_tokens": 8, "seed": 5}
    best = post(url, **body, best_of=4, n=2).json()
    assert best["usage"]["completion_tokens"] == 32
    every = post(url, **body, n=4, logprobs=0).json()["choices"]
    means = {choice["text"]: np.mean(choice["logprobs"]["token_logprobs"]) for choice in every}
    assert [choice["text"] for choice in best["choices"]] == sorted(means, key=means.get, reverse=True)[:2]
    assert [choice["logprobs"] for choice in best["choices"]] == [None, None]


# --- prompts ---


def test_every_kind_of_prompt(url: str, model: TextModel):
    expected = generate(model, ["from", "fair"], num_tokens=5, seed=1)
    ids = [list(b"from"), list(b"fair")]
    for prompt in (["from", "fair"], ids):
        choices = post(url, prompt=prompt, max_tokens=5, seed=1).json()["choices"]
        assert [choice["text"] for choice in choices] == expected
    assert text_of(url, prompt=ids[0], max_tokens=5, seed=1) == expected[0]
    assert text_of(url, max_tokens=5, seed=1) == generate(model, "\n", num_tokens=5, seed=1)
    assert len(post(url, prompt="a", seed=-5).json()["choices"][0]["text"]) > 0
    assert text_of(url, prompt="abc", max_tokens=0, echo=True) == "abc"


def test_a_text_goes_on_beyond_the_context(url: str, model: TextModel):
    assert text_of(url, prompt=PROMPT, max_tokens=150, seed=8) == generate(
        model, PROMPT, num_tokens=150, seed=8
    )


def test_tokens_and_texts(url: str):
    assert post(url, "/tokenize", prompt="Süß").json() == {
        "count": 5, "max_model_len": 64, "tokens": list("Süß".encode()),
    }  # fmt: skip
    assert post(url, "/tokenize", content="ab").json()["tokens"] == [97, 98]
    assert post(url, "/tokenize", prompt="<|endoftext|>").json()["tokens"] == [255]
    assert post(url, "/tokenize", prompt="").json()["tokens"] == []
    assert post(url, "/detokenize", tokens=[97, 98]).json() == {"prompt": "ab", "content": "ab"}
    info = httpx.get(f"{url}/tokenizer_info").json()
    assert (info["eos_token"], info["tokenizer_class"]) == ("<|endoftext|>", "byte")
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


BAD = [
    ({"prompt": ""}, 400, "prompt", "empty"),
    ({"prompt": []}, 400, "prompt", "empty"),
    ({"prompt": [[]]}, 400, "prompt", "empty"),
    ({"prompt": "a" * 65}, 400, "prompt", "65 tokens, but this model's context is 64"),
    ({"prompt": [256]}, 400, "prompt", "below 256"),
    ({"prompt": [-1]}, 400, "prompt", "prompt"),
    ({"prompt": 5}, 400, "prompt", "prompt"),
    ({"prompt": ["a", [1]]}, 400, "prompt", "prompt"),
    ({"prompt": "a", "max_tokens": "5"}, 400, "max_tokens", "integer"),
    ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens", "greater"),
    ({"prompt": "a", "max_tokens": 5000}, 400, "max_tokens", "limit, 4096"),
    ({"prompt": "a", "n": 65}, 400, "n", "limit, 64"),
    ({"prompt": "a", "n": 0}, 400, "n", "greater"),
    ({"prompt": "a", "n": 2, "best_of": 1}, 400, "best_of", "less than n"),
    ({"prompt": "a", "best_of": 2, "stream": True}, 400, "best_of", "streamed"),
    ({"prompt": "a", "suffix": "b"}, 400, "suffix", "not supported"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature", "greater"),
    ({"prompt": "a", "top_p": 0}, 400, "top_p", "greater"),
    ({"prompt": "a", "logprobs": 101}, 400, "logprobs", "less"),
    ({"prompt": "a", "logit_bias": {"300": 1}}, 400, "logit_bias", "from 0 to 255"),
    ({"prompt": "a", "logit_bias": {"a": 1}}, 400, "logit_bias", "ids"),
    ({"prompt": "a", "logit_bias": {"1": 101}}, 400, "logit_bias", "100"),
    ({"prompt": "a", "stop": [""]}, 400, "stop", "character"),
    ({"prompt": "a", "stop_token_ids": [999]}, 400, "stop_token_ids", "vocabulary"),
    ({"prompt": "a", "model": "gpt-5"}, 404, "model", "'gpt-5' is not served"),
]


@pytest.mark.parametrize(("body", "status", "param", "message"), BAD)
def test_an_impossible_request_is_refused_by_name(url: str, body, status: int, param: str, message: str):
    answer = post(url, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "raw",
    [b"", b"x", b"[]", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"prompt": NaN}', b'{"temperature": 1e999}'],
)
def test_a_body_that_is_no_request_is_refused(url: str, raw: bytes):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/inspect"):
        answer = httpx.post(url + path, content=raw, timeout=HANGS)
        assert answer.status_code == 400, (path, answer.text)
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_the_field_that_is_wrong_is_named(url: str):
    for path, body, field in (
        ("/tokenize", {"prompt": "\ud800"}, None),
        ("/detokenize", {"tokens": [256]}, "tokens"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 65}]}, "messages"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
        ),
    ):
        raw = json.dumps(body).encode()
        answer = httpx.post(url + path, content=raw, timeout=HANGS)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), path


def test_the_content_of_a_message_may_have_parts_or_be_missing(url: str):
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]

    def answer(*contents: object) -> str:
        messages = [{"role": "user", "content": content} for content in contents]
        given = post(url, "/v1/chat/completions", messages=messages, max_tokens=8, seed=1)
        return given.raise_for_status().json()["choices"][0]["message"]["content"]

    assert answer(parts, None) == answer("Hi\nthere", "")


def test_a_model_is_found_by_its_name(url: str):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    assert client.models.retrieve("out") == client.models.list().data[0]
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.models.retrieve("other")


def test_unknown_paths_and_methods(url: str):
    assert httpx.get(f"{url}/v2/completions").json()["error"]["type"] == "not_found_error"
    answer = httpx.get(f"{url}/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


# --- inspect ---


def test_an_inspection_is_that_of_python(url: str, model: TextModel):
    text = "Süß, 日本"
    expected = inspect_text(model, text, top=3, attention=(0, 1), lens=True)
    body = {"text": text, "top": 3, "attention": {"layer": 0, "head": 1}, "lens": True, "distribution": True}
    found = post(url, "/inspect", **body).raise_for_status().json()
    assert (found["layers"], found["heads"], found["context"]) == (1, 2, 64)
    assert "".join(token["text"] for token in found["tokens"]) == text
    assert [token["id"] for token in found["tokens"]] == list(text.encode())
    assert [token["token"] for token in found["tokens"][:3]] == ["S", "bytes:\\xc3", "bytes:\\xbc"]
    first = found["tokens"][0]
    assert (first["logprob"], first["entropy"], first["rank"], first["top"]) == (None, None, None, [])
    for token, other in zip(found["tokens"][1:], expected.tokens[1:], strict=True):
        assert token["logprob"] == pytest.approx(other.logprob, abs=1e-5)
        assert token["entropy"] == pytest.approx(other.entropy, abs=1e-5)
        assert token["rank"] == other.rank
        assert [best["id"] for best in token["top"]] == [best.id for best in other.top]
    assert found["next"]["entropy"] == pytest.approx(expected.next.entropy, abs=1e-5)
    assert found["next"]["logprobs"] == pytest.approx(expected.next.logprobs.tolist(), abs=1e-5)
    assert [best["id"] for best in found["next"]["top"]] == [best.id for best in expected.next.top]
    assert found["attention"] == [[round(weight, 4) for weight in row] for row in found["attention"]]
    assert np.allclose(found["attention"], expected.attention, atol=6e-5)
    assert [[[best["id"] for best in top] for top in layer] for layer in found["lens"]] == [
        [[best.id for best in top] for top in layer] for layer in expected.lens
    ]
    same = post(url, "/inspect", tokens=list(text.encode()), model="out").json()
    assert [token["id"] for token in same["tokens"]] == [token["id"] for token in found["tokens"]]
    assert (same["attention"], same["lens"], len(same["next"]["top"])) == (None, None, 10)
    assert "logprobs" not in same["next"]


def test_bytes_that_are_no_text_are_spelled(url: str):
    found = post(url, "/inspect", tokens=[0xE6], top=100).json()
    assert [token["text"] for token in found["tokens"]] == ["\ufffd"]
    spelled = [best["text"] for best in found["next"]["top"]]
    assert len(set(spelled)) == 100
    assert any(text.startswith("bytes:\\x") for text in spelled)


HEAD = {"layer": 0, "head": 0}


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({}, 400, "text", "give text or tokens"),
        ({"text": "a", "tokens": [1]}, 400, "text", "one of the two"),
        ({"text": ""}, 400, "text", "empty"),
        ({"tokens": []}, 400, "tokens", "empty"),
        ({"tokens": [256]}, 400, "tokens", "below 256"),
        ({"text": "a" * 65}, 400, "text", "65 tokens, but this model's context is 64"),
        ({"text": "a", "top": 101}, 400, "top", "less"),
        ({"text": "a", "attention": {"layer": 1, "head": 0}}, 400, "attention", "layer 1: those"),
        ({"text": "a", "attention": {"layer": 0, "head": 2}}, 400, "attention", "head 2: those"),
        ({"text": "a" * 9, "attention": HEAD}, 400, "attention", "at most 8 tokens, not of 9"),
        ({"text": "a", "attention": {"layer": 0}}, 400, "attention", "required"),
        ({"text": "a", "model": "gpt-5"}, 404, "model", "'gpt-5' is not served"),
    ],
)
def test_an_impossible_inspection_is_refused_by_name(
    url: str, body, status: int, param: str, *, message: str, monkeypatch
):
    monkeypatch.setattr(server_inspection, "MAX_ATTENTION_TOKENS", 8)
    answer = post(url, "/inspect", **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert message in error["message"]


def test_an_inspection_waits_for_no_text_and_ends_with_the_server(config: ServeConfig, monkeypatch):
    services: list[Service] = []
    with (
        serving(replace(config, rows=1, max_tokens=10**6), services.append) as url,
        ThreadPoolExecutor(1) as pool,
    ):
        engine = services[0].served.engine
        endless = pool.submit(post, url, prompt="a", max_tokens=10**6, ignore_eos=True)
        wait_until(lambda: engine.scheduler.rows)
        assert post(url, "/inspect", text="abc").status_code == 200
        assert not endless.done()
        closing = map(engine.close, ["the end"])
        monkeypatch.setattr(server_inspection, "inspect_in_parts", lambda *_, **__: closing)
        assert_error(post(url, "/inspect", text="abc"), 503, "the end")
        assert_error(endless.result(), 503, "the end")
        assert_error(post(url, "/inspect", text="abc"), 503, "the end")


def test_an_inspection_that_nobody_awaits_is_given_up(config: ServeConfig, monkeypatch):
    started, given_up = threading.Event(), threading.Event()

    def endless(*_, **__) -> Iterator[None]:
        try:
            while True:
                started.set()
                yield None
        finally:
            given_up.set()

    monkeypatch.setattr(server_inspection, "inspect_in_parts", endless)
    with serving(config) as url:
        client = connect(url, "/inspect", text="abc")
        assert started.wait(HANGS)
        client.close()
        assert given_up.wait(HANGS)
    given_up.clear()
    with serving(replace(config, deadline=0.2)) as url:
        assert post(url, "/inspect", text="abc").status_code == 504
        assert given_up.wait(HANGS)


def test_an_inspection_that_fails_says_so(config: ServeConfig, monkeypatch):
    monkeypatch.setattr(
        server_inspection, "inspect_in_parts", lambda *_, **__: map(raising, [MemoryError("much")])
    )
    with serving(config) as url:
        assert_error(post(url, "/inspect", text="abc"), 500, "out of memory")


def raising(error: Exception) -> None:
    raise error


def assert_error(answer: httpx.Response, status: int, message: str) -> None:
    assert (answer.status_code, answer.json()["error"]["message"]) == (status, message)


# --- the guard ---


def test_other_hosts_and_origins_are_refused(url: str):
    port = url.rpartition(":")[2]
    for host, status in ((f"localhost:{port}", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.com", 403),
                         ("[", 403), ("localhost.evil.com", 403), ("", 403)):  # fmt: skip
        assert httpx.get(f"{url}/health", headers={"Host": host}).status_code == status, host
    assert httpx.get(f"{url}/health", headers={"Origin": "http://evil.com"}).status_code == 403
    assert httpx.get(f"{url}/health", headers={"Origin": "null"}).status_code == 403
    assert httpx.get(f"{url}/health", headers={"Origin": url}).status_code == 200


def test_a_key_is_needed_and_compared_whole(config: ServeConfig, monkeypatch):
    monkeypatch.setenv("NANOGPT_API_KEY", "sécret")
    origin = "https://example.org"
    with serving(replace(config, cors=(origin,), allowed_hosts=("my.box",))) as url:
        for sent, status in ((None, 401), ("Bearer s", 401), ("Basic sécret", 401), ("Bearer sécret", 200)):
            headers = {} if sent is None else {"Authorization": sent.encode()}
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status
        assert httpx.get(f"{url}/health").status_code == 200
        allowed = {"Authorization": "Bearer sécret".encode(), "Host": "my.box", "Origin": origin}
        assert httpx.get(f"{url}/v1/models", headers=allowed).headers["access-control-allow-origin"] == origin
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        assert httpx.options(f"{url}/v1/completions", headers=asked).status_code == 200


# --- limits ---


def test_only_who_serves_others_without_a_key_is_warned(config: ServeConfig, monkeypatch, capsys):
    everywhere = replace(config, host="0.0.0.0")
    for key, warned in ((None, True), ("secret", False)):
        if key:
            monkeypatch.setenv("NANOGPT_API_KEY", f" {key} ")  # a header has no spaces at its ends
        with serving(everywhere) as url:
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200
        assert ("Whoever reaches this address" in capsys.readouterr().err) == warned


def test_too_long_and_too_many_and_too_slow(config: ServeConfig):
    services: list[Service] = []
    small = replace(config, rows=1, max_queue=2, max_texts=2, max_body=400, max_tokens=10**6, deadline=0.5)
    with serving(small, services.append) as url:
        assert post(url, prompt="a" * 400).status_code == 413
        chunked = httpx.post(f"{url}/tokenize", content=iter([b"a" * 300, b"a" * 300]))
        assert chunked.status_code == 413
        waiting = services[0].served.engine.waiting
        body = {"prompt": "a", "max_tokens": 10**6, "ignore_eos": True}
        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(post, url, **body)]
            wait_until(lambda: services[0].served.engine.scheduler.rows)
            running += [pool.submit(post, url, **body) for _ in range(2)]
            wait_until(lambda: len(waiting) == 2)
            refused = post(url, **body)
            answers = [future.result() for future in running]
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert [answer.status_code for answer in answers] == [504] * 3
        wait_until(lambda: not waiting and not services[0].served.engine.scheduler.rows)
        assert post(url, prompt="a", max_tokens=3).status_code == 200


def test_a_client_that_leaves_frees_its_row(config: ServeConfig):
    services: list[Service] = []
    with serving(replace(config, rows=2, max_tokens=10**6), services.append) as url:
        rows = services[0].served.engine.scheduler.rows
        for stream in (True, False):
            body = {"prompt": "a", "max_tokens": 10**6, "stream": stream, "ignore_eos": True}
            client = connect(url, "/v1/completions", **body)
            wait_until(lambda: len(rows) == 1)
            client.close()
            wait_until(lambda: not rows)
        ended = httpx.get(f"{url}/metrics").text
        assert 'vllm:request_success_total{finished_reason="abort",model_name="out"} 2.0' in ended


def test_metrics_count_what_was_made(config: ServeConfig):
    with serving(config) as url:
        for _ in range(2):
            post(url, prompt="a" * 20, max_tokens=7, seed=1, ignore_eos=True)
        lines = dict(
            line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if line[0] != "#"
        )
        expected = {
            "prompt_tokens_total": 40, "generation_tokens_total": 14, "prefix_cache_hits_total": 20,
            "num_requests_running": 0, "num_requests_waiting": 0, "time_to_first_token_seconds_count": 2,
            "inter_token_latency_seconds_count": 12, "e2e_request_latency_seconds_count": 2,
        }  # fmt: skip
        for name, value in expected.items():
            assert float(lines[f'vllm:{name}{{model_name="out"}}']) == value, name


@given(st.lists(st.lists(st.floats(0, 200) | st.sampled_from(BUCKETS), max_size=5), min_size=1, max_size=3))
def test_a_histogram_is_that_of_prometheus(times: list[list[float]]):
    own, theirs = CollectorRegistry(), CollectorRegistry()
    seconds, histogram = (
        Seconds("a", "b"),
        Histogram("a", "b", ["model_name"], buckets=BUCKETS, registry=theirs),
    )
    own.register(seconds)
    for some in times:
        seconds.observe("out", some)
        for value in some:
            histogram.labels("out").observe(value)
    histogram.labels("out")
    for found, wanted in zip(
        generate_latest(own).decode().splitlines(),
        [line for line in generate_latest(theirs).decode().splitlines() if "a_created" not in line],
        strict=True,
    ):
        name, value = found.rsplit(" ", 1)
        assert name == wanted.rsplit(" ", 1)[0]
        assert found[0] == "#" or float(value) == pytest.approx(float(wanted.rsplit(" ", 1)[1]))


def test_metrics_count_inspections(config: ServeConfig, monkeypatch):
    started, goes_on = threading.Event(), threading.Event()

    def slow(*_, **__) -> Iterator[None]:
        started.set()
        assert goes_on.wait(HANGS)
        yield from map(raising, [MemoryError("much")])

    def metric(name: str) -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(f"nanogpt:{name}{{")).split()[-1])

    with serving(config) as url, ThreadPoolExecutor(1) as pool:
        post(url, "/inspect", text="abc")
        post(url, "/inspect", text="")  # is refused at once
        assert metric("inspection_seconds_count") == 1
        assert metric("inspection_seconds_sum") > 0
        with monkeypatch.context() as patch:
            patch.setattr(server_inspection, "inspect_in_parts", slow)
            answer = pool.submit(post, url, "/inspect", text="abc")
            assert started.wait(HANGS)
            assert metric("num_inspections_running") == 1
            goes_on.set()
            assert answer.result().status_code == 500
        assert metric("inspection_seconds_count") == 2
        assert metric("num_inspections_running") == 0


# --- the end, and other checkpoints ---


def test_a_new_checkpoint_is_served_and_a_damaged_one_passed_over(
    config: ServeConfig, out: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr(server_run, "WATCH_SECONDS", 0.02)
    path = tmp_path / "ckpt.pt"
    saved = load_checkpoint(out / "ckpt.pt")
    save_checkpoint(path, saved)
    services: list[Service] = []
    with serving(replace(config, checkpoint=str(path), watch=True), services.append) as url:
        body = {"prompt": PROMPT, "max_tokens": 20, "seed": 1}
        earlier, first = text_of(url, **body), services[0].served
        path.write_bytes(b"damaged")
        wait_until(lambda: "Still serving the earlier checkpoint" in capsys.readouterr().err)
        assert text_of(url, **body) == earlier
        torch.manual_seed(0)
        weights = {name: torch.randn_like(weight) for name, weight in saved.model.items()}
        save_checkpoint(path, replace(saved, model=weights, average={}))
        wait_until(lambda: services[0].served is not first)
        assert (
            text_of(url, **body)
            == generate(load_model(path, "cpu"), PROMPT, num_tokens=20, seed=1)
            != earlier
        )
        first.engine.thread.join(HANGS)
        assert not first.engine.thread.is_alive()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_signal_ends_the_server_once_its_answers_are_given(out: Path, number: signal.Signals, code: int):
    grace = "0" if number == signal.SIGINT else "20"
    flags = {"checkpoint": out, "port": 0, "device": "cpu", "grace": grace, "max_tokens": 10**6}
    command = [sys.executable, "-m", "nanogpt", "serve"]
    process = subprocess.Popen(
        [*command, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    url = lines[1].split()[2]
    length = 10**6 if grace == "0" else 3000
    body = {"prompt": "a", "max_tokens": length, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=HANGS) as answer:
        events = answer.iter_lines()
        next(events)
        process.send_signal(number)
        rest = [line for line in events if line]
    assert rest[-1] == "data: [DONE]"
    last = json.loads(rest[-2].removeprefix("data: "))
    if grace == "0":
        assert last["error"]["message"] == "the server is shutting down"
    else:
        assert last["choices"][0]["finish_reason"] == "length"
    _, err = process.communicate(timeout=HANGS)
    assert process.returncode == code
    assert "Traceback" not in err


def test_a_client_may_connect_as_soon_as_the_address_is_known(config: ServeConfig):
    with server_run.listen(config) as listener, socket.create_connection(listener.getsockname()[:2]):
        pass


def test_a_port_that_is_taken(config: ServeConfig):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: .*: give another --port, or 0"):
            server_run.listen(replace(config, port=port))


def test_the_description_names_every_path_and_field(url: str):
    described = httpx.get(f"{url}/openapi.json").json()
    assert described == document()
    fields = described["components"]["schemas"]["CompletionRequest"]["properties"]
    assert {"prompt", "max_tokens", "echo", "min_tokens"} <= set(fields)
    for path, methods in described["paths"].items():
        for method in methods:
            answer = httpx.request(method, url + path, json={})
            assert str(answer.status_code) in methods[method]["responses"], path


def test_numbers_stay_finite(url: str):
    logprobs = post(url, prompt="a", max_tokens=20, logprobs=3, temperature=0).json()["choices"][0][
        "logprobs"
    ]
    assert all(math.isfinite(value) for value in logprobs["token_logprobs"])
