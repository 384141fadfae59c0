"""Connection: HTTP/1.1 by uvicorn and h11, with an end for clients that take too long, or are too many.

Run by uvicorn.Config(app, http=Connection, limit_concurrency=...).
uvicorn waits for ever for the head of a request, and for a client that does not read its answer: each such
client would keep a file descriptor (slowloris), and what was made for it in memory. Here it has
CLIENT_SECONDS for a head, and for each LEAST_BYTES of an answer. What comes and is no HTTP gets an error in
OpenAI's shape. The time for the body of a request is app.py's.
"""

import asyncio
import socket
from http import HTTPStatus
from typing import cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from nanogpt.server.protocol import ApiError, json_bytes

CLIENT_SECONDS = 30.0
"""Seconds that a client has for the head of a request, and for each LEAST_BYTES of an answer."""

LEAST_BYTES = 16384

KERNEL_BYTES = 65536
"""Bytes that the kernel keeps of an answer, about. It would take megabytes, behind which nobody sees whether
a client reads."""


class Connection(H11Protocol):
    """A connection, which is aborted while it waits for its client for too long."""

    timer: asyncio.TimerHandle | None = None
    """Runs while the connection waits for its client."""
    unread: int = 0
    """Bytes of answers that the client had not taken when the timer began."""

    # --- what uvicorn and asyncio call ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take a client, unless there are too many."""
        super().connection_made(transport)
        plain = cast(socket.socket, transport.get_extra_info("socket"))
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            self.refuse(ApiError(503, "too many connections: try again in a moment"))
        self.update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self.stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if not self.transport.is_closing():
            super().data_received(data)
            self.update_timer()

    def on_response_complete(self) -> None:
        """See H11Protocol."""
        super().on_response_complete()
        self.update_timer()

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        self.update_timer()

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        super().resume_writing()
        self.update_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request."""
        if self.is_answering and self.cycle.response_started:
            self.transport.abort()  # an answer is on its way, after which nothing else can be said
        else:
            self.refuse(ApiError(400, "this is no HTTP request"))

    # --- what they do not do ---

    def refuse(self, error: ApiError) -> None:
        """Answer with an error before there is a request, and close the connection."""
        body = json_bytes(error.body)
        lines = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
            "\r\n",
        )
        self.transport.write("\r\n".join(lines).encode() + body)
        self.transport.close()

    @property
    def waits_for_client(self) -> bool:
        """Whether the client is to do something: to ask, or to read."""
        return self.flow.write_paused or self.transport.is_closing() or not self.is_answering

    @property
    def is_answering(self) -> bool:
        """Whether there is a request without a whole answer."""
        return bool(self.cycle) and not self.cycle.response_complete

    def update_timer(self) -> None:
        """Start or stop the timer."""
        if not self.waits_for_client:
            self.stop_timer()
        elif self.timer is None:
            self.unread = self.transport.get_write_buffer_size()
            self.timer = self.loop.call_later(CLIENT_SECONDS, self.on_timeout)

    def stop_timer(self) -> None:
        """Stop the timer, if it runs."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def on_timeout(self) -> None:
        """Abort the connection, unless the client has read enough of its answer in the meantime."""
        self.timer = None
        if self.unread - self.transport.get_write_buffer_size() >= LEAST_BYTES:
            self.update_timer()
        else:
            self.transport.abort()
