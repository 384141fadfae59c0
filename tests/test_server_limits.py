"""The server's limits: memory, queue, connections, slow clients, and what is no request."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from test_server import PROMPT, config, model, out, post, serving, url
from uvicorn.server import ServerState
from waiting import HANGS, wait_until

from nanogpt import TextModel, generate
from nanogpt.server import connection, jobs, protocol
from nanogpt.server.app import Service
from nanogpt.server.chat import Chat, chat_prompt
from nanogpt.server.completions import Completion
from nanogpt.server.config import ServeConfig
from nanogpt.server.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Message,
    json_bytes,
    json_in_parts,
)
from nanogpt.server.served import load

__all__ = ["config", "model", "out", "url"]  # fixtures


def test_no_end_of_a_text_is_lost_whenever_it_is_heard(config: ServeConfig, model: TextModel):
    """The engine may have ended a text before anyone asks for it, or while someone reads its beginning."""
    given = CompletionRequest(prompt=PROMPT, max_tokens=100, seed=1)

    async def asked(first: int, ends: bool) -> list[str]:
        """The chunks of an answer: the first ones read at once, and the rest when the text is over."""
        served = await asyncio.to_thread(load, config, asyncio.get_running_loop())
        answer = Completion(served, given, config)
        if ends:
            served.engine.close("the end")
        chunks = answer.chunks()
        found = [await anext(chunks) for _ in range(first)]
        while answer.job.texts[0].finish_reason is None:
            await asyncio.sleep(0.001)
        try:
            found += [chunk async for chunk in chunks]
        finally:
            served.engine.close("over")
        return [json.loads(chunk)["choices"][0]["text"] for chunk in found]

    expected = generate(model, PROMPT, num_tokens=100, seed=1)
    for first in (0, 1):
        assert "".join(asyncio.run(asked(first, ends=False))) == expected
    with pytest.raises(ApiError, match="the end"):
        asyncio.run(asked(0, ends=True))


def test_a_chat_that_is_read_slowly_loses_nothing(config: ServeConfig, model: TextModel):
    """While a chunk is on its way the text grows, and ends."""
    messages = [Message(role="user", content="Hi")]

    async def asked() -> list[dict]:
        """The choices of all chunks: the first one read at once, and the rest when the text is over."""
        served = await asyncio.to_thread(load, config, asyncio.get_running_loop())
        answer = Chat(served, ChatRequest(messages=messages, max_tokens=100, seed=1), config)
        chunks = answer.chunks()
        found = [await anext(chunks)]
        while answer.job.texts[0].finish_reason is None:
            await asyncio.sleep(0.001)
        found += [chunk async for chunk in chunks]
        served.engine.close("over")
        return [json.loads(chunk)["choices"][0] for chunk in found]

    choices = asyncio.run(asked())
    expected = generate(model, chat_prompt(messages), num_tokens=100, seed=1, stop=["\nUser:"])
    assert "".join(choice["delta"]["content"] for choice in choices) == expected
    assert choices[-1]["finish_reason"] is not None
    assert [choice["delta"].get("role") for choice in choices] == ["assistant", *[None] * (len(choices) - 1)]


def test_a_request_that_nobody_waits_for_leaves_the_queue(config: ServeConfig):
    services: list[Service] = []
    with serving(replace(config, rows=1, max_queue=1, max_texts=1, max_tokens=10**6), services.append) as url:
        engine = services[0].served.engine
        body = {"prompt": "a", "max_tokens": 10**6, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=HANGS):
            wait_until(lambda: engine.scheduler.rows)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/completions", json=body | {"stream": False}, timeout=0.3)
            wait_until(lambda: not engine.waiting)
            assert engine.scheduler.rows
        wait_until(lambda: not engine.scheduler.rows)
        assert services[0].served.load.entries == 0


def test_a_request_with_more_tokens_and_alternatives_than_memory_for_them(config: ServeConfig, monkeypatch):
    services: list[Service] = []
    monkeypatch.setattr(jobs, "MAX_ENTRIES", 1000)
    monkeypatch.setattr(jobs, "ALL_ENTRIES", 1000)
    with serving(config, services.append) as url:
        body = {"prompt": "a", "max_tokens": 10}
        refused = post(url, **body, n=10, logprobs=9)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")
        services[0].served.load.entries = 995  # what others hold
        assert post(url, **body).status_code == 429
        services[0].served.load.entries = 0
        assert post(url, **body, n=9, logprobs=9).status_code == 200
        assert services[0].served.load.entries == 0


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_nobody_waits_while_a_large_answer_is_encoded(
    chat: bool, stream: bool, config: ServeConfig, monkeypatch
):
    encoding, goes_on = threading.Event(), threading.Event()

    def slow(value: object) -> bytes:
        encoding.set()
        assert goes_on.wait(HANGS)
        return json_bytes(value)

    body: dict[str, Any] = {"max_tokens": 3, "seed": 1, "stream": stream}
    if chat:
        path = "/v1/chat/completions"
        body |= {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 5}
    else:
        path = "/v1/completions"
        body |= {"prompt": "Süß", "logprobs": 5, "prompt_logprobs": 3, "echo": True, "n": 2, "best_of": 2}
    with serving(config) as url, ThreadPoolExecutor(1) as pool:
        expected = post(url, path, **body)
        monkeypatch.setattr(protocol, "MANY_ENTRIES", 1)
        monkeypatch.setattr(protocol, "json_in_parts", slow)
        answer = pool.submit(post, url, path, **body)
        assert encoding.wait(HANGS)
        assert httpx.get(f"{url}/health", timeout=HANGS).status_code == 200
        assert not answer.done()
        goes_on.set()
        assert told(answer.result()) == told(expected)


def told(answer: httpx.Response) -> dict[int, list[Any]]:
    """Texts, log-probabilities and ends of the choices of an answer, whole or streamed in whatever chunks."""
    assert answer.status_code == 200
    found: dict[int, list[Any]] = {}
    for line in answer.text.splitlines():
        if not line.startswith(("{", "data: {")):
            continue
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            text, scored, entries = found.setdefault(choice["index"], ["", [], {}])
            message = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
            tokens = choice["logprobs"].get("content") or list(
                zip(*(choice["logprobs"].get(key, []) for key in ("tokens", "top_logprobs")), strict=True)
            )
            entries |= {key: choice[key] for key in ("prompt_logprobs", "finish_reason") if choice.get(key)}
            found[choice["index"]] = [text + message["content"], scored + tokens, entries]
    return found


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(json_values, st.integers(0, 3))
def test_json_in_parts_is_json(value: object, levels: int):
    assert json_in_parts(value, levels) == json_bytes(value)
    assert json_in_parts(iter([value, value]), levels) == json_bytes([value, value])


# --- connections ---


def opened(url: str, *, raw: bytes = b"", room: int = 0) -> socket.socket:
    """A connection over which some bytes have been sent. room: bytes that the client has for answers."""
    client = socket.socket()
    if room:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
    client.settimeout(HANGS)
    client.sendall(raw)
    return client


def all_of(client: socket.socket) -> bytes:
    """What comes until the connection ends, however it does."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := client.recv(65536):
            found += piece
    return found


def raw_request(**body) -> bytes:
    raw = json.dumps(body).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (
        len(raw),
        raw,
    )


def test_a_client_that_takes_too_long_loses_its_connection(config: ServeConfig, monkeypatch):
    """It asks for nothing, for half of something, or does not read what it asked for."""
    monkeypatch.setattr(connection, "CLIENT_SECONDS", 0.3)
    services: list[Service] = []
    with serving(replace(config, max_tokens=10**6), services.append) as url:
        for raw in (b"", b"GET /health HTTP/1.1\r\nHo", raw_request(prompt="a", max_tokens=2)):
            with opened(url, raw=raw) as client:
                answer = all_of(client)
                assert answer.startswith(b"HTTP/1.1 200") == (b"POST" in raw)
        much = raw_request(prompt="a", max_tokens=15_000, n=4, stream=True, logprobs=20, ignore_eos=True)
        with opened(url, raw=much, room=4096):
            wait_until(lambda: services[0].served.load.entries)
            wait_until(lambda: not services[0].served.load.entries)
        wait_until(lambda: not services[0].served.engine.scheduler.rows)
        assert post(url, prompt="a", max_tokens=3).status_code == 200


def test_a_client_that_reads_slowly_keeps_its_connection():
    """Timers are set off by hand."""
    timers: list[Callable[[], None]] = []
    transport, loop = Mock(), Mock()
    loop.call_later = lambda seconds, action: timers.append(action) or Mock()
    transport.is_closing = lambda: False
    settings = uvicorn.Config(Mock(), ws="none", log_config=None)
    reader = connection.Connection(settings, ServerState(), {}, _loop=loop)
    reader.connection_made(transport)
    timers.clear()
    reader.stop_timer()
    transport.get_write_buffer_size = lambda: 200_000
    reader.pause_writing()
    for left in (200_000 - connection.LEAST_BYTES, 100_000):
        transport.get_write_buffer_size = lambda left=left: left
        timers.pop()()
        assert not transport.abort.called
    timers.pop()()
    assert transport.abort.called


def test_too_many_connections(config: ServeConfig):
    with serving(replace(config, max_connections=2)) as url:
        with opened(url), opened(url), opened(url) as third:
            assert b"503 Service Unavailable" in all_of(third)
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 200)


def test_bytes_that_are_no_request(url: str):
    for raw in (b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET / HTTP/1.1\r\nno header\r\n\r\n", b"a" * 100_000):
        with opened(url, raw=raw) as client:
            answer = all_of(client)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request")
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{url}/health").status_code == 200
