"""The `sample` command: load a checkpoint, continue prompts, print the text as it is generated.

Run:    python sample.py --prompt "ROMEO:" --temperature 0.8
The text goes to standard output, everything else to standard error. The checkpoint is the only file that is
needed, since it contains the tokenizer.
"""

import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import repeat
from pathlib import Path

import torch

from nanogpt.checkpoint.format import Checkpoint, build_model, checkpoint_at, load_checkpoint
from nanogpt.cli import interactive, prompts_file
from nanogpt.cli.prompts import one_after_the_other, print_text, read_prompt
from nanogpt.data.dataset import Dataset, load_dataset
from nanogpt.errors import UserError
from nanogpt.inference.config import SampleConfig
from nanogpt.inference.prompts import device_of, encode_prompt, generate_in_batches
from nanogpt.inference.speculation import MAX_LEARNED, NgramGuesses
from nanogpt.inference.text import TextStream, resolve_logit_bias, token_texts
from nanogpt.inference.tokens import Token
from nanogpt.machine.device import autocast, eager_mode, explain_out_of_memory, pick_device
from nanogpt.machine.precision import pick_sampling_dtype
from nanogpt.model.gpt import GPT
from nanogpt.model.quantize import prepare_for_sampling
from nanogpt.native.step import native_problem, switched_off
from nanogpt.settings import unescape
from nanogpt.terminal.console import warn
from nanogpt.tokenizer.base import Tokenizer

SEPARATOR = "\n" + "-" * 40 + "\n"
"""Printed between two samples."""

DIGITS = 6
"""Decimal places of a log-probability."""


def main(config: SampleConfig) -> int:
    """Generate and print texts, in the mode that the flags choose. Returns the exit code."""
    path = find_checkpoint(Path(config.checkpoint))
    if config.interactive:
        interactive.check()
    typed = {name: tuple(map(unescape, getattr(config, name))) for name in ("stop", "logit_bias")}
    given = {field.name for field in fields(config) if getattr(config, field.name) != field.default}
    run = next((run for flag, run in MODES.items() if flag in given), print_texts)
    with explain_out_of_memory():
        device = pick_device(config.device)
        saved = load_checkpoint(path)
        model, tokenizer = build_model(saved, device)
        dtype = pick_sampling_dtype(config.dtype, device, str(saved.precision["dtype"]))
        problem = native_problem() if device.type == "cpu" else ""
        prepare_for_sampling(model, dtype, config.quantize, by_columns=bool(problem))
        if problem and not switched_off():
            warn(f"Sampling takes several times as long as it could: {problem} (docs/sampling.md, Speed)")
        config = resolve_logit_bias(replace(config, **typed), tokenizer)
        alone = config.num_samples == 1 and config.prompts_file is None
        guesses = learn_guesses(saved) if config.speculate and alone else None
        with eager_mode(), autocast(device, dtype):
            run(model, tokenizer, config, guesses)
    return 0


def print_texts(model: GPT, tokenizer: Tokenizer, config: SampleConfig, guesses: NgramGuesses | None) -> None:
    """Print config.num_samples texts, one after the other; the first of a batch while it is generated."""
    prompt, ids = read_and_encode(model, tokenizer, config)
    for number, row in enumerate(sampled_rows(model, ids, config, guesses)):
        print_text(SEPARATOR if number else "")
        print_text(prompt)
        for chunk in TextStream(tokenizer, row, config.stop):
            print_text(chunk)
        print_text("\n")


def print_tokens(
    model: GPT, tokenizer: Tokenizer, config: SampleConfig, guesses: NgramGuesses | None
) -> None:
    """Print a JSON object for each token of config.num_samples texts, with its log-probability."""
    _, ids = read_and_encode(model, tokenizer, config)
    for number, row in enumerate(sampled_rows(model, ids, config, guesses)):
        for token, text in token_texts(tokenizer, row, config.stop):
            line = json.dumps(describe_token(tokenizer, token, text, number), ensure_ascii=False)
            print_text(f"{line}\n")


def describe_token(tokenizer: Tokenizer, token: Token, text: str, sample: int) -> dict[str, object]:
    """A token as a JSON object. Log-probabilities are rounded to DIGITS."""
    top = [[tokenizer.decode([i]), i, round(logprob, DIGITS)] for i, logprob in token.top]
    logprob = round(token.logprob or 0.0, DIGITS)
    return {"sample": sample, "text": text, "token": token.id, "logprob": logprob, "top": top}


MODES: dict[str, Callable[[GPT, Tokenizer, SampleConfig, NgramGuesses | None], None]] = {
    "interactive": interactive.run,
    "prompts_file": prompts_file.run,
    "logprobs": print_tokens,
}
"""Flag -> what the command does instead of print_texts if the flag is given."""


def read_and_encode(model: GPT, tokenizer: Tokenizer, config: SampleConfig) -> tuple[str, torch.Tensor]:
    """The prompt that the flags give, and its ids, (T,)."""
    if config.prompt_file is None:
        prompt, flag = unescape(config.prompt), "--prompt"
    else:
        prompt, flag = read_prompt(config.prompt_file), "--prompt_file"
    ids = encode_prompt(tokenizer, prompt, skip_unknown=config.unknown == "skip", flag=flag)
    return prompt, ids[0].to(device_of(model))


def learn_guesses(saved: Checkpoint) -> NgramGuesses:
    """Guesses learned from the text of the training, if its data folder still has it."""
    dataset = training_data(saved)
    if dataset is None:
        return NgramGuesses()
    warn(f"Guesses are learned from {Path(saved.train_config.data_dir)}")
    return NgramGuesses(dataset.train[:MAX_LEARNED])


def training_data(saved: Checkpoint) -> Dataset | None:
    """The data that a checkpoint was trained on; None if its data folder does not have them any more."""
    try:
        found = load_dataset(Path(saved.train_config.data_dir), verify_bytes=0)
    except UserError:
        return None
    return found if found.fingerprint == saved.fingerprint else None


def sampled_rows(
    model: GPT, ids: torch.Tensor, config: SampleConfig, guesses: NgramGuesses | None
) -> Iterator[Iterator[Token]]:
    """The tokens of each sample, generated in batches with the seeds seed, seed + 1, ... ids: (T,)."""
    return generate_in_batches(
        model,
        repeat(ids, config.num_samples),
        config,
        num_tokens=config.num_tokens,
        seed=secrets.randbits(32) if config.seed is None else config.seed,
        logprobs=config.logprobs,
        guesses=guesses,
        on_short_memory=one_after_the_other,
    )


def find_checkpoint(path: Path, flag: str = "--checkpoint", action: str = "Sampling from") -> Path:
    """Find the checkpoint at a path, and print which one it is if the path is a run folder.

    flag, action: the flag that gave the path, and what is done with the checkpoint, for messages.
    Raises: UserError if the folder has none.
    """
    found = checkpoint_at(path, flag)
    if found != path:
        warn(f"{action} {found}")
    return found
