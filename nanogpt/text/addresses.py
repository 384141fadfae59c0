"""Addresses of texts, such as https://example.org/novel.txt, and what of them may be shown.

Example: is_address("s3://bucket/a.txt"); without_secrets("https://me:password@host/a.txt?token=1")
Knows no network: remote.py downloads.
"""

import re
from urllib.request import url2pathname

from nanogpt.errors import require

ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#]*)([^?#]*)(.*)", re.IGNORECASE | re.DOTALL)
"""Protocol, user and host, path, and the rest of an address."""

HOST = re.compile(r"(\[[0-9a-f:.]*\]|[^:@]*)(:[0-9]*)?", re.IGNORECASE)
"""A host, by name or number, and its port."""

WEB = ("http", "https")
"""Protocols of the web."""


def protocol_of(name: str) -> str | None:
    """The protocol of an address, in lower case; None if a name is no address."""
    found = ADDRESS.fullmatch(name)
    return found[1].lower() if found else None


def is_address(name: str) -> bool:
    """Whether a name is the address of something to download."""
    return protocol_of(name) not in (None, "file")


def local_name(name: str) -> str:
    """The path in an address such as file:///home/me/novel.txt; any other name as it is.

    Raises: UserError if it names another machine.
    """
    found = ADDRESS.fullmatch(name)
    if found is None or protocol_of(name) != "file":
        return name
    require(found[2] in ("", "localhost"), f"--input_file {name} names another machine: write file:///...")
    return url2pathname(found[3] + found[4])


def without_secrets(name: str) -> str:
    """An address for messages: no user, no password and, for the web, no query, which may hold a token.

    Any other name stays as it is.
    """
    found = ADDRESS.fullmatch(name)
    if found is None:
        return name
    protocol, host, path, rest = found[1].lower(), found[2].rpartition("@")[2], found[3], found[4]
    if HOST.fullmatch(host) is None:  # perhaps a password with a slash in it
        return f"{protocol}://..."
    if protocol in WEB:
        rest = "?..." if rest.startswith("?") else ""
    return f"{protocol}://{host}{path}{rest}"
