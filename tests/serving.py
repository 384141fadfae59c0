"""A server in a thread of the test, and requests to it.

Use:    with serving(ServeConfig(checkpoint=str(out), port=0)) as url: text_of(url, prompt="a", max_tokens=5)
"""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator

import httpx
import pytest
from waiting import HANGS

from nanogpt.server import run as server_run
from nanogpt.server.app import Service
from nanogpt.server.config import ServeConfig


@contextlib.contextmanager
def serving(config: ServeConfig, prepare: Callable[[Service], None] = lambda service: None) -> Iterator[str]:
    """A server in a thread, at the address that is yielded. prepare: is called with its service first."""
    listener = server_run.listen(config)
    ready, stop = threading.Event(), threading.Event()

    class Told(server_run.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready.set()

        async def on_tick(self, counter: int) -> bool:
            if stop.is_set():
                self.stopping.set()
                return True
            return await super().on_tick(counter)

    def create(service: Service):
        prepare(service)
        return plain(service)

    plain = server_run.create_app
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_run, "Server", Told)
        patch.setattr(server_run, "create_app", create)
        thread = threading.Thread(target=lambda: asyncio.run(server_run.run(config, listener)))
        thread.start()
        try:
            assert ready.wait(HANGS)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            stop.set()
            thread.join(HANGS)
            listener.close()
            assert not thread.is_alive()


def post(url: str, path: str = "/v1/completions", **body) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=HANGS)


def connect(url: str, path: str, **body) -> socket.socket:
    """A client that has sent a request, and may leave before the answer."""
    raw = json.dumps(body).encode()
    client = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
    client.sendall(head.encode() + raw)
    return client


def text_of(url: str, **body) -> str:
    return post(url, **body).raise_for_status().json()["choices"][0]["text"]
