"""One page out of the files of this folder, with nothing to fetch.

Example: assemble(SCRIPTS, START, {"title": "out", ...})
page.js knows of no model, only of a backend. `nanogpt export --format html` gives it local.js, which runs the
model in the page; `nanogpt serve` gives it server.js, which asks the server.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

PAGE = Path(__file__).parent

PARTS = (
    "sampling.js",
    "dom.js",
    "tree.js",
    "text.js",
    "alternatives.js",
    "reading.js",
    "insight.js",
    "shell.js",
    "page.js",
)
"""The scripts that every page has."""


def assemble(
    backend: Iterable[str], start: str, contents: dict[str, str], policy: Callable[[str, str], str]
) -> tuple[str, str]:
    """The page, and its Content Security Policy.

    backend: the scripts of a backend. start: the JavaScript that begins. contents: what page.html names in
    double braces; in `head` {policy} is the policy. policy: is called with the hashes of script and style.
    """
    style = read("page.css")
    script = "".join(map(read, (*PARTS, *backend))) + start
    found = policy(digest(script), digest(style))
    head = contents["head"].replace("{policy}", found)
    given = contents | {"head": head, "style": style, "script": script}
    return re.sub(r"\{\{(\w+)\}\}", lambda name: given[name[1]], read("page.html")), found


def read(name: str) -> str:
    """A file of this folder."""
    return (PAGE / name).read_text("utf-8")


def digest(text: str) -> str:
    """The SHA-256 of a script or a style, as a policy names it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
