"""Clients of the server, good and bad, over plain sockets: the bad ones do what a library would not.

Use:    await Clients(port, table, chance).live(seconds=10)
A behaviour is a coroutine that opens one connection, misbehaves or not, and checks what came back. The table
has the texts that `generate` makes: a text that differs was made wrong, or is another client's.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from nanogpt.server.protocol import CompletionRequest

Body = dict[str, Any]

CUT = "cut"
"""What came is not a whole answer: the connection ended before."""


@dataclass(frozen=True)
class Answer:
    """What a server answered."""

    status: int
    body: bytes
    times: list[float]
    """When it was asked for, and when each of its events came."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[str]:
        """The events of a stream."""
        return [line[6:] for line in self.body.decode().split("\n\n") if line]


def dechunked(raw: bytes) -> bytes | None:
    """The body of a chunked answer; None if its end is missing."""
    body = b""
    while raw:
        size, _, raw = raw.partition(b"\r\n")
        length = int(size or b"0", 16)
        if length == 0:
            return body
        if len(raw) < length + 2:
            return None
        body, raw = body + raw[:length], raw[length + 2 :]
    return None


def answer_of(raw: bytes, times: list[float]) -> Answer | None:
    """An answer as it came over the wire; None if it is not whole."""
    head, end, body = raw.partition(b"\r\n\r\n")
    if not end:
        return None
    lines = head.decode("latin-1").lower().split("\r\n")
    status = int(lines[0].split()[1])
    headers = dict(line.split(": ", 1) for line in lines[1:])
    if "transfer-encoding" in headers:
        whole = dechunked(body)
    else:
        whole = body if len(body) == int(headers["content-length"]) else None
    return None if whole is None else Answer(status, whole, times)


def request(body: bytes, path: str = "/v1/completions", *, length: int | None = None) -> bytes:
    """A request as it goes over the wire. length: what it says of its length, if not the truth."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


@dataclass
class Clients:
    """Clients of a server, and what they have seen."""

    port: int
    table: Sequence[tuple[Body, str]]
    """Requests with the texts that answer them."""
    chance: random.Random
    seen: Counter[str] = field(default_factory=Counter[str])
    """How often what happened."""
    first: list[float] = field(default_factory=list[float])
    """Seconds to the first token of each stream that was read at once."""
    between: list[float] = field(default_factory=list[float])
    """Seconds between its pieces."""

    async def live(self, count: int, seconds: float) -> None:
        """Let so many clients do something random, again and again, for a time."""
        end = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < end:
                behaviour = self.chance.choice(BEHAVIOURS)
                try:
                    await behaviour(self)
                    self.seen[behaviour.__name__] += 1
                except (ConnectionError, TimeoutError):
                    self.seen["broken connection"] += 1
                    await asyncio.sleep(0.02)

        await asyncio.gather(*(client() for _ in range(count)))

    # --- the wire ---

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A new connection."""
        return await asyncio.open_connection("127.0.0.1", self.port, limit=4096)

    async def ask(self, raw: bytes, *, pause: float = 0.0) -> Answer | None:
        """Send bytes, and read until the end, slowly with a pause. None: the answer is not whole."""
        reader, writer = await self.connect()
        try:
            writer.write(raw)
            received, times = b"", [time.perf_counter()]
            while piece := await reader.read(256 if pause else 65536):
                received += piece
                if b"data: " in piece:
                    times.append(time.perf_counter())
                if pause:
                    await asyncio.sleep(pause)
            return answer_of(received, times)
        finally:
            writer.close()

    async def leave(self, raw: bytes, pieces: int, seconds: float = 0.0) -> None:
        """Send bytes, read some pieces of what comes, wait, and tear the connection down."""
        reader, writer = await self.connect()
        writer.write(raw)
        for _ in range(pieces):
            await reader.read(256)
        await asyncio.sleep(seconds)
        writer.transport.abort()

    # --- good ones ---

    def check(self, answer: Answer | None, text: str, expected: str) -> None:
        """A whole answer is right."""
        assert answer is not None
        assert text == expected, f"another text came: {text!r}, not {expected!r}"
        self.seen["right"] += 1

    def came(self, answer: Answer | None) -> bool:
        """Whether it is an answer with a text; one that is busy says so."""
        if answer is None:
            self.seen[CUT] += 1
            return False
        assert answer.status in {200, 429, 503}, (answer.status, answer.body[:500])
        self.seen[str(answer.status)] += 1
        return answer.status == 200

    async def whole(self) -> None:
        """Ask for a text at once."""
        body, expected = self.chance.choice(self.table)
        answer = await self.ask(request(json.dumps(body).encode()))
        if self.came(answer):
            self.check(answer, answer.json["choices"][0]["text"], expected)

    async def several(self) -> None:
        """Ask for several texts at once."""
        body, _ = self.chance.choice(self.table)
        same = [row for row in self.table if {**row[0], "prompt": 0} == {**body, "prompt": 0}]
        prompts = [given["prompt"] for given, _ in same]
        answer = await self.ask(request(json.dumps({**body, "prompt": prompts}).encode()))
        if self.came(answer):  # only the first has the seed that the table knows
            self.check(answer, answer.json["choices"][0]["text"], same[0][1])
            assert len(answer.json["choices"]) == len(same)

    async def stream(self, pause: float = 0.0) -> None:
        """Ask for a text as a stream."""
        body, expected = self.chance.choice(self.table)
        answer = await self.ask(request(json.dumps({**body, "stream": True}).encode()), pause=pause)
        if self.came(answer):
            *chunks, done = answer.events
            assert done == "[DONE]"
            self.check(answer, "".join(json.loads(c)["choices"][0]["text"] for c in chunks), expected)
            if not pause:
                self.first.append(answer.times[1] - answer.times[0])
                self.between += [b - a for a, b in pairwise(answer.times[1:])]

    async def slow_reader(self) -> None:
        """Read a stream in small pieces, with pauses."""
        await self.stream(pause=self.chance.uniform(0.001, 0.05))

    async def look(self) -> None:
        """Look at what the server says of itself."""
        path = self.chance.choice(["/metrics", "/health", "/v1/models", "/openapi.json", "/nowhere"])
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        answer = await self.ask(head.encode())
        assert answer is None or answer.status in {404 if path == "/nowhere" else 200, 503}

    # --- bad ones ---

    async def leaver(self) -> None:
        """Leave in the middle of an answer, or before it."""
        body, _ = self.chance.choice(self.table)
        chance = self.chance
        body = {**body, "stream": chance.random() < 0.7, "max_tokens": 500, "n": chance.randint(1, 4)}
        await self.leave(request(json.dumps(body).encode()), chance.randint(0, 5), chance.uniform(0, 0.1))

    async def non_reader(self) -> None:
        """Ask for much, and read nothing of it."""
        body = {"prompt": "a", "n": 8, "max_tokens": 400, "stream": True, "logprobs": 20, "ignore_eos": True}
        await self.leave(request(json.dumps(body).encode()), 0, self.chance.uniform(0, 3))

    async def garbage(self) -> None:
        """Send what is no HTTP."""
        raw = self.chance.randbytes(self.chance.randint(1, 3000))
        if self.chance.random() < 0.3:
            raw = b"GET / HTTP/1.1\r\n" + raw
        answer = await self.ask(raw + b"\r\n\r\n\r\n\r\n")
        assert answer is None or answer.status in {400, 403, 404, 405, 503}, answer

    async def half(self) -> None:
        """Send a part of a request, wait, and leave."""
        body, _ = self.chance.choice(self.table)
        raw = request(json.dumps(body).encode())
        await self.leave(raw[: self.chance.randint(0, len(raw) - 1)], 0, self.chance.uniform(0, 0.5))

    async def oversized(self) -> None:
        """Send a body that is too long, or say so."""
        raw = request(b"x" * 30_000) if self.chance.random() < 0.5 else request(b"x", length=10**12)
        answer = await self.ask(raw)
        assert answer is None or answer.status in {413, 503}, answer

    async def chunk_breaker(self) -> None:
        """Send a chunked body with a size that is none."""
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        answer = await self.ask(head + b"5\r\nabcde\r\n" + self.chance.randbytes(40) + b"\r\n\r\n")
        assert answer is None or answer.status in {400, 408, 503}, answer

    async def flood(self) -> None:
        """Ask for as many texts as one may."""
        body, _ = self.chance.choice(self.table)
        answer = await self.ask(request(json.dumps({**body, "n": 64, "max_tokens": 5}).encode()))
        self.came(answer)

    async def any_parameters(self) -> None:
        """Ask with parameters that may be anything. The echo tells whose answer it is."""
        prompt, pick = f"{self.chance.randrange(10**6)}", self.chance.choice
        wild: list[Any] = [None, 0, 1, -1, 0.5, 1e9, True, "a", [], {}, [1, 2], {"3": 5}, 10**30]
        named = {"prompt", "echo", "max_tokens", "stream", "model", "prompt_logprobs"}
        fields = sorted(CompletionRequest.model_fields.keys() - named)
        body = {"prompt": prompt, "echo": True, "max_tokens": self.chance.randint(0, 30)}
        body |= {pick(fields): pick(wild) for _ in range(self.chance.randint(0, 3))}
        answer = await self.ask(request(json.dumps(body).encode()))
        if answer is None:
            self.seen[CUT] += 1
        elif answer.status == 200:
            assert all(choice["text"].startswith(prompt) for choice in answer.json["choices"])
            self.seen["right"] += 1
        else:
            assert answer.status in {400, 429, 503}, (body, answer)


BEHAVIOURS = (
    *(Clients.whole, Clients.stream, Clients.stream, Clients.several, Clients.slow_reader, Clients.look),
    *(Clients.leaver, Clients.leaver, Clients.non_reader, Clients.garbage, Clients.half, Clients.oversized),
    *(Clients.chunk_breaker, Clients.flood, Clients.any_parameters),
)
"""What a client may do."""
