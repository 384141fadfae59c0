"""Generate text from a checkpoint: load, stream, print.

Run:    python sample.py --prompt "ROMEO:" --temperature 0.8
The text goes to standard output as it is made, everything else to standard error. Needs the
checkpoint and nothing else: the tokenizer is inside it.
"""

import io
import secrets
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch

from nanogpt.checkpoint.format import build_model, load_checkpoint
from nanogpt.config import SampleConfig
from nanogpt.console import escape_control_characters, warn
from nanogpt.device import autocast, eager_mode, is_out_of_memory, kind_of, pick_device
from nanogpt.errors import UserError, require
from nanogpt.inference.generate import generate
from nanogpt.model.gpt import GPT
from nanogpt.precision import pick_sampling_dtype
from nanogpt.text.encoding import decode_file
from nanogpt.tokenizer.base import CharTokenizer, Tokenizer

ESCAPES = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
"""What can be typed in a shell, and what it stands for."""

LONGEST_PROMPT = 1 << 24
"""Bytes of a file with a prompt: far more than any model sees."""


def main(config: SampleConfig) -> int:
    """Print config.num_samples texts. Returns the exit code."""
    path = checkpoint_in(Path(config.checkpoint))
    typed = unescape(config.prompt)
    prompt = typed if config.prompt_file is None else read_prompt(config.prompt_file)
    stops = [unescape(stop) for stop in config.stop]
    seed = secrets.randbits(32) if config.seed is None else config.seed
    with enough_memory():
        device = pick_device(config.device)
        saved = load_checkpoint(path)
        model, tokens = build_model(saved, device)
        dtype = pick_sampling_dtype(config.dtype, device, str(saved.precision["dtype"]))
        flag = "--prompt" if config.prompt_file is None else "--prompt_file"
        ids = encode_prompt(tokens, prompt, skip=config.unknown == "skip", flag=flag)
        with eager_mode(), autocast(device, dtype):
            for number in range(config.num_samples):
                if number:
                    show("\n" + "-" * 40 + "\n")
                show(prompt)
                pieces = stream(model, tokens, ids, config, seed + number)
                for piece in until(pieces, stops):
                    show(piece)
                show("\n")
    return 0


def show(text: str) -> None:
    """Print a part of the product: as it is, but that no terminal obeys what a model has written."""
    if sys.stdout.isatty():
        text = "\r".join(map(escape_control_characters, text.split("\r")))
    print(text, end="", flush=True)


@contextmanager
def enough_memory() -> Generator[None]:
    """Errors: UserError if the block takes more memory than there is."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is the former
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory: give --device cpu if it was another, or end other programs that use the memory"
        ) from error


def checkpoint_in(path: Path) -> Path:
    """The checkpoint that is meant: the file itself, or the best one of a run's folder, else its newest.

    Errors: UserError if the folder has none.
    """
    if not path.is_dir():
        return path
    for name in ("ckpt.pt", "last.pt"):
        if (path / name).is_file():
            warn(f"Sampling from {path / name}")
            return path / name
    raise UserError(
        f"--checkpoint {path} is a folder without a checkpoint (ckpt.pt, last.pt): give a run's --out_dir"
    )


def read_prompt(name: str) -> str:
    """The text of a file, or of standard input for "-". A line break at its very end is not part of it.

    Errors: UserError if it cannot be read, is empty, not text, or larger than any prompt.
    """
    if name == "-" and sys.stdin.isatty():
        warn("Type the prompt, then Ctrl-D on a line of its own")
    try:
        with nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as file:
            raw = file.read(LONGEST_PROMPT + 1)
    except OSError as error:
        raise UserError(f"--prompt_file {name} cannot be read: {error.strerror}") from error
    require(bool(raw), f"--prompt_file {name} is empty: give at least one character")
    require(len(raw) <= LONGEST_PROMPT, f"--prompt_file {name} is larger than {LONGEST_PROMPT >> 20} MiB")
    try:
        blocks, notes = decode_file(io.BytesIO(raw))
        text = b"".join(blocks).decode("utf-8")
    except UserError as error:
        raise UserError(f"--prompt_file {name} {error}") from error
    for note in notes:
        warn(f"{name}: {note}")
    return text.removesuffix("\n").removesuffix("\r") or text


def unescape(text: str) -> str:
    """Turn each pair of characters in ESCAPES, as typed in a shell, into the one it stands for."""
    result, i = "", 0
    while i < len(text):
        pair = text[i : i + 2]
        result += ESCAPES.get(pair, text[i])
        i += 2 if pair in ESCAPES else 1
    return result


def encode_prompt(
    tokens: Tokenizer, prompt: str, *, skip: bool = False, flag: str = "--prompt"
) -> torch.Tensor:
    """The ids of a prompt, (1, T) int64. skip: leave out characters that the model never saw.

    flag: how it was given.
    Errors: UserError naming them, unless they are skipped; or if nothing is left.
    """
    asked = prompt != unescape(SampleConfig.prompt)
    if skip and isinstance(tokens, CharTokenizer):
        unknown = set(tokens.unknown_characters(prompt))
        prompt = "".join(char for char in prompt if char not in unknown)
        require(bool(prompt) or not asked, f"{flag}: the model has seen none of its characters: give another")
    try:
        ids = tokens.encode(prompt)
        require(len(ids) > 0, f"this tokenizer makes no token of {prompt!r}: give another one")
    except UserError as error:
        if not asked:  # a vocabulary without line feeds: begin as a document does
            return torch.tensor([[tokens.end_of_text or 0]])
        advice = ", or give --unknown skip" if isinstance(tokens, CharTokenizer) else ""
        raise UserError(f"{flag}: {error}{advice}") from error
    return torch.from_numpy(ids.astype(np.int64))[None]


def stream(
    model: GPT, tokens: Tokenizer, ids: torch.Tensor, config: SampleConfig, seed: int
) -> Iterator[str]:
    """The generated text, as it is made, up to where the model ends it."""
    device = next(model.parameters()).device
    generated = generate(
        model,
        ids.to(device),
        num_tokens=config.num_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        generator=kind_of(device).generator(device, seed),
    )
    yield from tokens.stream(takewhile(lambda token: token != tokens.end_of_text, map(int, generated)))


def until(pieces: Iterable[str], stops: list[str]) -> Iterator[str]:
    """Pass text on up to the first of `stops`, which is left out.

    The end of the text is held back as long as it may be the beginning of a stop string.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [position for stop in stops if (position := held.find(stop)) >= 0]
        if found:
            yield held[: min(found)]
            return
        keep = max((overlap(held, stop) for stop in stops), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    yield held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
