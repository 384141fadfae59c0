"""UserError, for mistakes that the user can fix; require, which raises it; the first line of other errors.

Example: require(n > 0, f"--n {n} is too small: it must be at least 1")
Knows nothing of commands or files.
"""

MAX_LINE_CHARS = 160
"""Longest line of another program's that stands in a message of ours."""


class UserError(Exception):
    """A mistake that the user can fix: one line with the problem, the value and the fix.

    Commands print it without a traceback and exit with code 2; so do IPython and notebooks, without the exit.
    """

    def _render_traceback_(self) -> list[str]:
        """The lines that IPython shows in place of a traceback."""
        return [f"error: {self}"]


def require(holds: bool, message: str) -> None:
    """Raise UserError(message) unless `holds`."""
    if not holds:
        raise UserError(message)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, shortened."""
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    return (reason.splitlines() or [type(error).__name__])[0][:MAX_LINE_CHARS]
