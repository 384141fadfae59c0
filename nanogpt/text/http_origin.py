"""Files on the web: requests for a file or for the rest of one over HTTP and HTTPS, and what servers answer.

Example: with HttpOrigin("https://example.org/a.txt", "https://example.org/a.txt").open(0, "") as answer: ...
The bytes are taken as they come: a compressed transfer (Content-Encoding) makes a compressed file. An error
ends in one line, or, if it may pass (429, 503), in another attempt, after the time that the server asks for.
"""

import email.utils
import http.client
import re
import socket
import ssl
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from nanogpt.errors import UserError, require
from nanogpt.terminal.console import warn
from nanogpt.text.archives import CONTAINERS
from nanogpt.text.compressed import DECOMPRESSORS
from nanogpt.text.download import PATIENCE, Answer, ChangedError, LostConnectionError, Patience
from nanogpt.text.formats import FORMATS
from nanogpt.units import duration

if TYPE_CHECKING:
    from requests import Response, Session

BLOCK_BYTES = 1 << 18
"""Most bytes of a block."""

MAX_REDIRECTS = 5

MAX_RETRY_AFTER = 1e9
"""Most seconds that a server can ask to wait."""

ENCODINGS = {"identity": "", "gzip": ".gz", "x-gzip": ".gz", "zstd": ".zst"}
"""The suffix of a file whose bytes are in this Content-Encoding."""

PAGE_SUFFIXES = FORMATS["html"].suffixes

FILE_SUFFIXES = {*CONTAINERS, *(suffix for row in FORMATS.values() for suffix in row.suffixes)} - {
    *PAGE_SUFFIXES
}
"""Suffixes of files that are no web pages."""

PAGE_BEGINNINGS = (b"<!doctype html", b"<html")

PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Status codes of errors that may pass."""

LOGIN = "it needs a login (https://user:password@...) or a signed address"

ADVICE = {401: LOGIN, 403: LOGIN, 404: "check the address", 410: "check the address"}
"""What to do about a status code."""


class HttpOrigin:
    """A file on the web.

    shown: its address for messages. path: the path in its address, whose suffix says its format. key: the
    address without a user. Raises: ValueError if it is not a valid address.
    """

    def __init__(self, url: str, shown: str, patience: Patience = PATIENCE) -> None:
        self.url, self.shown, self.patience = url, shown, patience
        parts = urlsplit(url)
        self.path = unquote(parts.path)
        self.key = parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()

    @contextmanager
    def open(self, start: int, version: str) -> Generator[Answer]:
        """Ask for the bytes from `start` on if the content is still `version`, else for all of them.

        version: the ETag, or else the Last-Modified date. Without one, nothing tells whether the rest is that
        of the same content, and all is asked for.
        Raises: LostConnectionError, also from the blocks; UserError if another attempt is useless.
        """
        import requests

        headers = {"Accept-Encoding": "identity", "User-Agent": "nanogpt"}
        if start and version:
            headers["Range"] = f"bytes={start}-"
            if not is_weak(version):
                headers["If-Range"] = version
        with requests.Session() as session, self.send(session, headers) as response:
            self.check(response)
            yield self.answer(response, start, version)

    def send(self, session: "Session", headers: Mapping[str, str]) -> "Response":
        """Send a request and follow redirects. Raises: LostConnectionError; UserError for a wrong address."""
        import requests

        session.max_redirects = MAX_REDIRECTS
        waits = (self.patience.connect, self.patience.stall)
        try:
            return session.get(self.url, headers=headers, stream=True, timeout=waits)
        except requests.TooManyRedirects as error:
            raise UserError(
                f"{self} leads from address to address, more than {MAX_REDIRECTS} times"
            ) from error
        except ValueError as error:
            raise UserError(f"{self} is not a valid address, or leads to none") from error
        except requests.RequestException as error:
            cause = innermost(error)
            unknown = isinstance(cause, socket.gaierror) and "Range" not in headers
            require(not unknown, f"{self} cannot be reached: check the name of the host, and the network")
            refused = isinstance(cause, ssl.SSLCertVerificationError)
            require(not refused, f"{self} cannot be trusted: the certificate of the host is not valid")
            why = "no answer in time" if isinstance(error, requests.Timeout) else f"{cause}"
            raise LostConnectionError(f"cannot be reached ({why})") from error

    def __str__(self) -> str:
        return f"--input_file {self.shown}"

    def check(self, response: "Response") -> None:
        """Raise an error unless the answer has a file's bytes.

        Raises: LostConnectionError if it may have them later; ChangedError if the range is not there.
        """
        code = response.status_code
        steps = pairwise([*(earlier.url for earlier in response.history), response.url])
        insecure = any(a.startswith("https:") and b.startswith("http:") for a, b in steps)
        require(not insecure, f"{self} leads from https to http, where anybody can change it: refused")
        if code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise ChangedError("has less than it announced")
        what = f"HTTP {code} ({http.client.responses.get(code, 'unknown')})"
        if code in PASSING:
            raise LostConnectionError(f"got {what}", retry_after(response.headers.get("Retry-After", "")))
        asked = "Range" in response.request.headers
        good = code == HTTPStatus.OK or (code == HTTPStatus.PARTIAL_CONTENT and asked)
        require(good, f"{self} cannot be read, {what}: {ADVICE.get(code, 'the server does not give it')}")

    def answer(self, response: "Response", start: int, version: str) -> Answer:
        """The answer in a response. Raises: ChangedError if it is another range than that asked for."""
        headers, blocks = response.headers, self.blocks(response)
        found = headers.get("ETag") or headers.get("Last-Modified") or ""
        if response.status_code == HTTPStatus.PARTIAL_CONTENT:
            given = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", "").strip())
            if given is None or int(given[1]) != start:
                raise ChangedError
            kept = found or ("" if is_weak(version) else version)  # If-Range was sent
            return Answer(start, int(given[2]) if given[2] != "*" else None, kept, "", blocks)
        length, chunked = headers.get("Content-Length", ""), "Transfer-Encoding" in headers
        size = int(length) if length.isdecimal() and not chunked else None
        if size is None and not chunked:
            warn(f"{self.shown} comes without a length: whether all of it has come cannot be told")
        return Answer(0, size, found, self.suffix(headers), self.reject_page(headers, blocks))

    def suffix(self, headers: Mapping[str, str]) -> str:
        """What the file's name gets at its end. Raises: UserError if it is compressed in an unknown way."""
        encoding = headers.get("Content-Encoding", "").strip().lower() or "identity"
        require(encoding in ENCODINGS, f"{self} comes in the encoding {encoding:.40}, which is not known")
        own, packed = Path(self.path).suffix.lower(), ENCODINGS[encoding]
        if packed and DECOMPRESSORS.get(own) is DECOMPRESSORS[packed]:
            packed = ""  # many servers call the compression of the file itself its encoding
        page = ".html" if is_page(headers) and own not in {*FILE_SUFFIXES, *PAGE_SUFFIXES} else ""
        return page + packed

    def reject_page(self, headers: Mapping[str, str], blocks: Iterator[bytes]) -> Iterator[bytes]:
        """The blocks. Raises: UserError if they are a web page in place of the file."""
        own = Path(self.path).suffix.lower()
        if not is_page(headers) or own not in FILE_SUFFIXES:
            return blocks
        first = next(blocks, b"")
        page = first.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(PAGE_BEGINNINGS)
        advice = "give that of the file itself (on some hosts with raw or resolve in place of blob)"
        require(not page, f"{self} is the address of a web page, not of a {own} file: {advice}")
        return chain([first], blocks)

    def blocks(self, response: "Response") -> Iterator[bytes]:
        """The bytes of the body, as they come. Raises: LostConnectionError."""
        import urllib3

        try:
            while block := response.raw.read1(BLOCK_BYTES, decode_content=False):
                yield block
        except urllib3.exceptions.ReadTimeoutError as error:
            raise LostConnectionError(f"sent nothing for {duration(self.patience.stall)}") from error
        except urllib3.exceptions.HTTPError as error:
            early = isinstance(error.__cause__, http.client.IncompleteRead)
            raise LostConnectionError("ended early" if early else "lost the connection") from error


def is_weak(version: str) -> bool:
    """Whether a version is a weak ETag, which does not promise the same bytes."""
    return version.startswith("W/")


def is_page(headers: Mapping[str, str]) -> bool:
    """Whether a body is said to be a web page."""
    return headers.get("Content-Type", "").strip().lower().startswith(("text/html", "application/xhtml"))


def retry_after(value: str) -> float:
    """The seconds that a Retry-After header asks to wait: a number, or a date. 0 if it is neither."""
    if value.isdecimal():
        return min(float(value), MAX_RETRY_AFTER)
    try:
        return min(
            max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time()), MAX_RETRY_AFTER
        )
    except (TypeError, ValueError, OverflowError):
        return 0.0


def innermost(error: BaseException) -> BaseException:
    """The innermost cause of an error: those around it have the whole address in their text."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return error
