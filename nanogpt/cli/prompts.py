"""Prompts from a file, and the output of texts.

Example: prompt = read_prompt("prompt.txt"); print_text(prompt)
"""

import io
import sys
from contextlib import nullcontext

from nanogpt.errors import UserError, require
from nanogpt.inference.tokens import SHORT_MEMORY
from nanogpt.terminal.console import escape_control_characters, warn
from nanogpt.text.encoding import decode_file

MAX_PROMPT_BYTES = 1 << 24
"""Maximum size of a prompt file, in bytes: far more than any model sees."""


def read_prompt(name: str) -> str:
    """Read the prompt from a file (standard input for "-"), without one line break at its end.

    Raises: UserError if the file cannot be read, is empty, is not text, or is too large.
    """
    text = read_text(name, "--prompt_file", MAX_PROMPT_BYTES)
    return text.removesuffix("\n").removesuffix("\r") or text


def read_text(name: str, flag: str, most: int) -> str:
    """Read a text from a file (standard input for "-") of at most `most` bytes, in any encoding.

    flag: the flag that named the file, for messages.
    Raises: UserError if the file cannot be read, is empty, is not text, or is too large.
    """
    if name == "-" and sys.stdin.isatty():
        warn("Type the text, then press Ctrl-D on a new line")
    try:
        with nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{flag} {name} cannot be read: {error.strerror}") from error
    require(bool(raw), f"{flag} {name} is empty: give at least one character")
    require(len(raw) <= most, f"{flag} {name} is larger than {most >> 20} MiB")
    try:
        blocks, notes = decode_file(io.BytesIO(raw))
        text = b"".join(blocks).decode("utf-8")
    except UserError as error:
        raise UserError(f"{flag} {name} {error}") from error
    for note in notes:
        warn(f"{name}: {note}")
    return text


def print_text(text: str) -> None:
    """Print generated text: unchanged, except that on a terminal its control characters are escaped."""
    if sys.stdout.isatty():
        text = "\r".join(map(escape_control_characters, text.split("\r")))
    print(text, end="", flush=True)


def one_after_the_other() -> None:
    """Say that a batch does not fit into memory."""
    warn(SHORT_MEMORY)
