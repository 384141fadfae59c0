"""The `serve` command: serve a checkpoint over HTTP.

Run:    nanogpt serve --checkpoint out
The server is in nanogpt/server; it needs pip install nanogpt[serve].
"""

from nanogpt.errors import UserError
from nanogpt.server.config import ServeConfig


def main(config: ServeConfig) -> int:
    """Serve until a signal comes. Returns the exit code. Raises: UserError if a package is missing."""
    try:
        from nanogpt.server.run import serve
    except ModuleNotFoundError as error:
        if (error.name or "nanogpt").startswith("nanogpt"):
            raise
        raise UserError(f"{error.name} is not installed: pip install nanogpt[serve]") from error
    serve(config)
    return 0
