"""UserError, for mistakes that the user can fix, and require, which raises it.

Example: require(n > 0, f"--n {n} is too small: it must be at least 1")
Knows nothing of commands or files.
"""


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
