"""A storm over the server: many clients, most of them bad; no answer is wrong, and nothing is left behind.

Run:    python -m pytest tests/storm/test_server_storm.py
        NANOGPT_STORM_CLIENTS=200 NANOGPT_STORM_SECONDS=60 python -m pytest tests/storm/test_server_storm.py
It prints how long good clients waited for tokens among the others.
"""

import asyncio
import os
import random
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

import httpx
import pytest
from clients import CUT, Body, Clients
from conftest import tiny_run
from test_storm import SEEDS
from waiting import HANGS, wait_until

from nanogpt import generate, load_model

CLIENTS = int(os.environ.get("NANOGPT_STORM_CLIENTS", "100"))
SECONDS = float(os.environ.get("NANOGPT_STORM_SECONDS", "6"))

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc tells of memory and files"),
]

TEXT = "Süß, 日本 and 🙂: from fairest creatures we desire increase.\n" * 30
EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Settings with which glibc gives back at once what is freed."""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder."""
    return tiny_run(tmp_path_factory.mktemp("run"), TEXT, block_size=64, max_iters=100)


@pytest.fixture(scope="module")
def table(out: Path) -> list[tuple[Body, str]]:
    """Requests, and the texts that `nanogpt sample` makes of them."""
    model = load_model(out, "cpu")
    prompts = ["from fairest", "Süß", "日本 and", "we desire increase.\nSüß, 日本 and 🙂: fr", "a"]
    found: list[tuple[Body, str]] = []
    for settings in ({}, {"temperature": 0.7, "top_k": 20}, {"frequency_penalty": 0.5, "stop": ["e"]}):
        for seed in range(4):
            for prompt in prompts:  # one by one, each with this very seed
                text = generate(model, prompt, num_tokens=100, seed=seed, **settings)
                body = {"prompt": prompt, "max_tokens": 100, "seed": seed, **settings}
                found.append((body, text))
    return found


@dataclass
class Life:
    """A server in a process of its own."""

    process: "subprocess.Popen[bytes]"
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def memory(self) -> float:
        """Resident memory in MB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    @property
    def files(self) -> int:
        """Open file descriptors."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def metric(self, name: str) -> float:
        """A number of /metrics."""
        lines = httpx.get(f"{self.url}/metrics", timeout=HANGS).text.splitlines()
        return float(next(line for line in lines if line.startswith(f"vllm:{name}{{")).split()[-1])

    def answers(self) -> bool:
        """Whether the server answers."""
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(f"{self.url}/health", timeout=HANGS).status_code == 200
        except httpx.TransportError:
            return False

    def is_idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return self.metric("num_requests_running") == self.metric("num_requests_waiting") == 0


@contextmanager
def server(out: Path, log: Path, port: int = 0) -> Generator[Life]:
    """A server, once it answers."""
    if not port:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
    flags = {
        "checkpoint": out,
        "port": port,
        "device": "cpu",
        "rows": 16,
        "max_queue": 128,
        "max_body": 20_000,
    }
    command = [sys.executable, "-m", "nanogpt", "serve"]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | EXACT_MALLOC)
    life = Life(process, port, log)
    try:
        wait_until(life.answers)
        yield life
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text(), log.read_text()[-3000:]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_storm_of_clients(out: Path, table, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with server(out, tmp_path / "log") as life:
        clients = Clients(life.port, table, random.Random(seed))
        asyncio.run(clients.live(CLIENTS, SECONDS / 2))  # after which everything has been allocated once
        wait_until(life.is_idle)
        memory, files = life.memory, life.files
        clients.seen.clear()
        asyncio.run(clients.live(CLIENTS, SECONDS))
        wait_until(life.is_idle)
        wait_until(lambda: life.files <= files)
        grown = life.memory - memory
        with capsys.disabled():
            print(f"\n{dict(clients.seen)}\nmemory: {memory:.0f} MB, and {grown:+.1f} MB after the storm")
            for name, times in (("first token", clients.first), ("between pieces", clients.between)):
                cuts = quantiles(times, n=100)
                print(f"{name}: p50 {1000 * cuts[49]:.1f} ms, p99 {1000 * cuts[98]:.1f} ms")
        assert grown < 0.05 * memory + 5
        assert clients.seen["right"] > 0
        assert not clients.seen[CUT], "an answer was lost"
        body, text = table[0]
        answer = httpx.post(f"{life.url}/v1/completions", json=body, timeout=HANGS)
        assert answer.json()["choices"][0]["text"] == text


def test_a_server_that_is_killed_and_started_again_under_load(out: Path, table, tmp_path: Path):
    async def clients(port: int, enough: int, dies: bool, process: "subprocess.Popen[bytes]") -> Clients:
        """Good clients, until they have enough right answers, and have seen the server die if it is to."""
        found = Clients(port, table, random.Random(dies))

        async def client() -> None:
            while found.seen["right"] < enough or (dies and not found.seen["broken connection"]):
                try:
                    await found.chance.choice((found.whole, found.stream))()
                except ConnectionError:
                    found.seen["broken connection"] += 1
                    await asyncio.sleep(0.01)
                if dies and found.seen["right"] >= enough:
                    process.kill()

        await asyncio.gather(*(client() for _ in range(24)))
        return found

    with server(out, tmp_path / "log") as life:
        killed = asyncio.run(clients(life.port, 100, True, life.process))
        assert killed.seen["broken connection"] > 0
    with server(out, tmp_path / "log", life.port) as again:
        served = asyncio.run(clients(again.port, 100, False, again.process))
    assert served.seen["right"] >= 100
    assert not served.seen["broken connection"]
    assert not served.seen[CUT]
