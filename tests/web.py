"""A web server on this machine that answers as a test says: it drops, stalls, lies, and changes its mind."""

import http.server
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from nanogpt.text.download import Answer, Patience

BODY = random.Random(6).randbytes(50_000)

HASTY = Patience(attempts=5, pause=0, sleep=lambda seconds: None)
"""Waits long for what comes, and never between attempts."""


@dataclass
class Reply:
    """An answer to a request.

    sends: bytes of the body after which the connection is dropped, or stalls; None: all. ranges: Range is
    honoured, and If-Range if `conditions`. length: what Content-Length says; None: the truth; -1: none.
    total: what Content-Range says.
    """

    body: bytes = b""
    status: int = 200
    etag: str | None = '"1"'
    headers: dict[str, str] = field(default_factory=dict)
    sends: int | None = None
    stalls: bool = False
    ranges: bool = True
    conditions: bool = True
    length: int | None = None
    total: str | None = None
    chunked: bool = False


@dataclass
class Web:
    """A server: its address, its answers in turn (the last for ever), the requests so far (path, headers)."""

    url: str
    replies: list[Reply] = field(default_factory=list)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def ranges(self) -> list[str | None]:
        """The Range headers of the requests."""
        return [headers.get("Range") for _, headers in self.requests]


def headers_of(reply: Reply, start: int) -> dict[str, str]:
    """The headers of an answer that begins at `start`."""
    headers = {"Connection": "close"}
    if start:
        total = reply.total or len(reply.body)
        headers["Content-Range"] = f"bytes {start}-{len(reply.body) - 1}/{total}"
    if reply.etag is not None:
        headers["ETag"] = reply.etag
    if reply.chunked:
        headers["Transfer-Encoding"] = "chunked"
    elif reply.length != -1:
        headers["Content-Length"] = str(len(reply.body) - start if reply.length is None else reply.length)
    return headers


def handler_of(web: Web) -> type[http.server.BaseHTTPRequestHandler]:
    """The class that answers for a server."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            web.requests.append((self.path, dict(self.headers)))
            reply = web.replies.pop(0) if len(web.replies) > 1 else web.replies[0]
            start = self.start_of(reply)
            self.send_response(206 if start else reply.status)
            for name, value in (headers_of(reply, start) | reply.headers).items():
                self.send_header(name, value)
            self.end_headers()
            sent = reply.body[start:][: reply.sends]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(sent), sent) if reply.chunked and sent else sent)
            if reply.chunked and reply.sends is None:
                self.wfile.write(b"0\r\n\r\n")
            if reply.stalls:
                web.closing.wait()

        def start_of(self, reply: Reply) -> int:
            """Where the answer begins."""
            found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            same = self.headers.get("If-Range") in (None, reply.etag) or not reply.conditions
            return int(found[1]) if found and reply.ranges and same and reply.status == 200 else 0

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def serving() -> Iterator[Web]:
    """A server while the block runs."""
    web = Web("")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler_of(web)) as server:
        web.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield web
        finally:
            web.closing.set()
            server.shutdown()
            thread.join()


class Canned:
    """An origin in memory. at: called before each block, with its position. starts: of each attempt."""

    shown = path = key = "memory/a.txt"

    def __init__(self, at: Callable[[int], object], size: int | None = len(BODY)) -> None:
        self.at, self.size, self.starts = at, size, list[int]()

    @contextmanager
    def open(self, start: int, version: str) -> Iterator[Answer]:
        start = start if version == "1" else 0
        self.starts.append(start)
        yield Answer(start, self.size, "1", "", self.blocks(start))

    def blocks(self, start: int) -> Iterator[bytes]:
        for position in range(start, len(BODY), 10_000):
            self.at(position)
            yield BODY[position : position + 10_000]
