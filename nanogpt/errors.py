"""The error of a user's mistake, and the check that raises it.

Use:    require(n > 0, f"--n {n} is too small: it must be at least 1")
Knows nothing of commands or files.
"""


class UserError(Exception):
    """A mistake the user can mend: one line saying what is wrong, the value, and the fix.

    Commands print it without a traceback and exit with code 2.
    """


def require(holds: bool, message: str) -> None:
    """Raise UserError(message) unless `holds`."""
    if not holds:
        raise UserError(message)
