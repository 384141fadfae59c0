r"""Prompts, from the command line or a file to token ids, and the output of texts.

Example: ids = encode_prompt(tokenizer, unescape("ROMEO:\n")); print_text(...)
"""

import io
import sys
from collections.abc import Iterable
from contextlib import nullcontext

import numpy as np
import torch

from nanogpt.console import escape_control_characters, warn
from nanogpt.device import kind_of
from nanogpt.errors import UserError, require
from nanogpt.inference.config import SampleConfig
from nanogpt.text.encoding import decode_file
from nanogpt.tokenizer.base import CharTokenizer, Tokenizer

ESCAPES = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
"""Escape sequence, as typed in a shell -> the character that it stands for."""

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


def device_of(model: torch.nn.Module) -> torch.device:
    """The device that a model is on."""
    return next(model.parameters()).device


def generators_for(model: torch.nn.Module, seeds: Iterable[int]) -> list[torch.Generator]:
    """A generator of random numbers for each seed, on the device of the model."""
    device = device_of(model)
    return [kind_of(device).generator(device, seed) for seed in seeds]


def one_after_the_other() -> None:
    """Say that a batch does not fit into memory."""
    warn("Too little memory for all texts at once: they are made one after the other")


def unescape(text: str) -> str:
    """Replace the escape sequences in ESCAPES, as typed in a shell, with the characters they stand for."""
    result, i = "", 0
    while i < len(text):
        pair = text[i : i + 2]
        result += ESCAPES.get(pair, text[i])
        i += 2 if pair in ESCAPES else 1
    return result


def encode_prompt(
    tokenizer: Tokenizer, prompt: str, *, skip_unknown: bool = False, flag: str = "--prompt"
) -> torch.Tensor:
    """Encode a prompt as token ids, (1, T) int64.

    skip_unknown: leave out characters that the model has never seen.
    flag: the flag that gave the prompt, for messages.
    The default prompt, a line feed, always works: if the vocabulary has none, end-of-text replaces it.
    Raises: UserError naming unknown characters, unless they are skipped; or if no token is left.
    """
    is_default = prompt == unescape(SampleConfig.prompt)
    if skip_unknown and isinstance(tokenizer, CharTokenizer):
        unknown = set(tokenizer.unknown_characters(prompt))
        prompt = "".join(char for char in prompt if char not in unknown)
        if not prompt and not is_default:
            raise UserError(f"{flag}: the model has seen none of its characters: give another")
    try:
        ids = tokenizer.encode(prompt)
        problem = "" if len(ids) else f"this tokenizer makes no token of {prompt!r}: give another one"
    except UserError as error:
        ids, problem = np.zeros(0), str(error)
    if not problem:
        return torch.from_numpy(ids.astype(np.int64))[None]
    if is_default:
        return torch.tensor([[tokenizer.end_of_text or 0]])
    advice = ", or give --unknown skip" if isinstance(tokenizer, CharTokenizer) else ""
    raise UserError(f"{flag}: {problem}{advice}")
