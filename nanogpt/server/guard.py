"""Guard: what a request has to pass before anything else looks at it.

A web page anywhere can let a browser send requests to a server on this machine. So the name in the Host
header must be one of this machine's (else a page can make its own name point here: DNS rebinding), and a page
of another origin is refused unless the user has allowed it (--cors). With a key, every request must carry it,
but for GET / and GET /health.
"""

import ipaddress
import os
import secrets
import socket
from collections.abc import Iterable
from typing import cast
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nanogpt.server.config import ServeConfig
from nanogpt.server.protocol import ApiError

KEY_VARIABLE = "NANOGPT_API_KEY"
"""Environment variable that holds the key, which a command line would show to other users."""

OPEN_PATHS = frozenset({"/health", "/"})
"""Paths that need no key: the page asks for it, and sends it with what it asks."""


class Guard:
    """ASGI middleware that lets through what `check` does."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app = app
        self.key = key_of(config)
        self.hosts = known_hosts(config)
        self.origins = frozenset(config.cors)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with an error, or pass the request on."""
        if scope["type"] == "http":
            try:
                self.check(Headers(scope=scope), cast(str, scope["path"]))
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def check(self, headers: Headers, path: str) -> None:
        """Raise ApiError if a request may not pass."""
        host = headers.get("host", "")
        name = host_name(host)
        if not (name in self.hosts or is_address(name)):
            raise ApiError(403, f"this server does not answer to the name {name!r}: see --allowed_hosts")
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins and urlsplit(origin).netloc != host:
            raise ApiError(403, f"pages of {origin} may not call this server: see --cors")
        if self.key and path not in OPEN_PATHS:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            given = given.strip() if scheme.lower() == "bearer" else headers.get("api-key", "")
            if not secrets.compare_digest(given.encode("latin-1"), self.key.encode()):
                raise ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY")


def key_of(config: ServeConfig) -> str:
    """The key that clients must send; "": none. A header has no spaces at its ends."""
    return (config.api_key or os.environ.get(KEY_VARIABLE) or "").strip()


def known_hosts(config: ServeConfig) -> frozenset[str]:
    """The names of this machine by which a client may call the server."""
    own: Iterable[str] = (config.host, "localhost", socket.gethostname(), *config.allowed_hosts)
    return frozenset(name.lower() for name in own)


def host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # a bracket that does not close
        return ""


def is_address(name: str) -> bool:
    """Whether a name is an IP address, which nobody can point elsewhere."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
