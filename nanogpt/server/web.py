"""The page at /: the files of nanogpt/page in one answer, with a strict Content Security Policy.

Example: Route("/", page_at_root)
It holds nothing of the model, so it needs no key: it asks the paths of the service, with the key that the
person gives.
"""

import functools

from starlette.requests import Request
from starlette.responses import Response

from nanogpt.page.assemble import assemble

START = """
document.addEventListener("DOMContentLoaded", () => startPage(NanoGPTServer.backend()));
"""

POLICY = (
    "default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Only our code runs, it reaches only this server, and no other page can frame it."""

CONTENTS = {
    "comment": "The page of nanogpt serve. It asks nothing but the server that it came from.",
    "head": '<link rel="icon" href="data:,">\n',
    "title": "NanoGPT",
    "about": "",
    "promise": "What you write goes to this server and nowhere else.",
    "data": "",
}


@functools.cache
def page() -> Response:
    """The answer, which is the same for all."""
    content, policy = assemble(
        ("training.js", "server.js"),
        START,
        CONTENTS,
        lambda script, style: POLICY.format(script=script, style=style),
    )
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(content, headers=headers, media_type="text/html; charset=utf-8")


async def page_at_root(request: Request) -> Response:
    """GET /."""
    return page()
