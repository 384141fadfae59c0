"""The `sample` command: load a checkpoint, continue a prompt, print the text as it is generated.

Run:    python sample.py --prompt "ROMEO:" --temperature 0.8
The text goes to standard output, everything else to standard error. The checkpoint is the only file that is
needed, since it contains the tokenizer.
"""

import io
import secrets
import sys
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch

from nanogpt.checkpoint.format import build_model, load_checkpoint
from nanogpt.console import escape_control_characters, warn
from nanogpt.device import autocast, eager_mode, is_out_of_memory, kind_of, pick_device
from nanogpt.errors import UserError, require
from nanogpt.inference.config import SampleConfig
from nanogpt.inference.text import generate_text
from nanogpt.precision import pick_sampling_dtype
from nanogpt.text.encoding import decode_file
from nanogpt.tokenizer.base import CharTokenizer, Tokenizer

ESCAPES = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
"""Escape sequence, as typed in a shell -> the character that it stands for."""

MAX_PROMPT_BYTES = 1 << 24
"""Maximum size of a prompt file, in bytes: far more than any model sees."""

SEPARATOR = "\n" + "-" * 40 + "\n"
"""Printed between two samples."""


def main(config: SampleConfig) -> int:
    """Generate and print config.num_samples texts. Returns the exit code."""
    path = find_checkpoint(Path(config.checkpoint))
    prompt = unescape(config.prompt) if config.prompt_file is None else read_prompt(config.prompt_file)
    flag = "--prompt" if config.prompt_file is None else "--prompt_file"
    stop = [unescape(string) for string in config.stop]
    seed = secrets.randbits(32) if config.seed is None else config.seed
    with explain_out_of_memory():
        device = pick_device(config.device)
        saved = load_checkpoint(path)
        model, tokenizer = build_model(saved, device)
        dtype = pick_sampling_dtype(config.dtype, device, str(saved.precision["dtype"]))
        ids = encode_prompt(tokenizer, prompt, skip_unknown=config.unknown == "skip", flag=flag).to(device)
        with eager_mode(), autocast(device, dtype):
            for number in range(config.num_samples):
                if number:
                    print_text(SEPARATOR)
                print_text(prompt)
                generator = kind_of(device).generator(ids.device, seed + number)
                for text in generate_text(
                    model,
                    tokenizer,
                    ids,
                    config,
                    num_tokens=config.num_tokens,
                    stop=stop,
                    generator=generator,
                ):
                    print_text(text)
                print_text("\n")
    return 0


def print_text(text: str) -> None:
    """Print generated text: unchanged, except that on a terminal its control characters are escaped."""
    if sys.stdout.isatty():
        text = "\r".join(map(escape_control_characters, text.split("\r")))
    print(text, end="", flush=True)


@contextmanager
def explain_out_of_memory() -> Generator[None]:
    """Turn an out-of-memory error in the block into a UserError with advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory: give --device cpu if this is a GPU, or end other programs that use its memory"
        ) from error


def find_checkpoint(path: Path, flag: str = "--checkpoint", action: str = "Sampling from") -> Path:
    """Find the checkpoint at a path: the file itself; in a run folder ckpt.pt (the best), else last.pt.

    flag, action: the flag that gave the path, and what is done with the checkpoint, for messages.
    Raises: UserError if the folder has none.
    """
    if not path.is_dir():
        return path
    for name in ("ckpt.pt", "last.pt"):
        if (path / name).is_file():
            warn(f"{action} {path / name}")
            return path / name
    raise UserError(
        f"{flag} {path} is a folder without a checkpoint (ckpt.pt, last.pt): give a run's --out_dir"
    )


def read_prompt(name: str) -> str:
    """Read the prompt from a file (standard input for "-"), without one line break at its end.

    Raises: UserError if the file cannot be read, is empty, is not text, or is too large.
    """
    if name == "-" and sys.stdin.isatty():
        warn("Type the prompt, then press Ctrl-D on a new line")
    try:
        with nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as file:
            raw = file.read(MAX_PROMPT_BYTES + 1)
    except OSError as error:
        raise UserError(f"--prompt_file {name} cannot be read: {error.strerror}") from error
    require(bool(raw), f"--prompt_file {name} is empty: give at least one character")
    require(len(raw) <= MAX_PROMPT_BYTES, f"--prompt_file {name} is larger than {MAX_PROMPT_BYTES >> 20} MiB")
    try:
        blocks, notes = decode_file(io.BytesIO(raw))
        text = b"".join(blocks).decode("utf-8")
    except UserError as error:
        raise UserError(f"--prompt_file {name} {error}") from error
    for note in notes:
        warn(f"{name}: {note}")
    return text.removesuffix("\n").removesuffix("\r") or text


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
