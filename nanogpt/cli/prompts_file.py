"""Many prompts from a file: JSON Lines in, JSON Lines out, in the same order (`sample --prompts_file`).

Example line: {"prompt": "ROMEO:", "id": 7, "temperature": 0.8, "num_tokens": 100, "stop": ["JULIET:"]}
Prompts whose settings agree are computed in batches. All lines are checked before the first is computed.
"""

import json
import secrets
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from torch import Tensor

from nanogpt.cli.prompts import one_after_the_other, print_text, read_text
from nanogpt.errors import UserError, require
from nanogpt.inference.config import SampleConfig, SamplingParams
from nanogpt.inference.prompts import MAX_ROWS, device_of, encode_prompt, generators_for
from nanogpt.inference.speculation import NgramGuesses
from nanogpt.inference.text import TextStream, resolve_logit_bias
from nanogpt.inference.tokens import generate_rows
from nanogpt.model.gpt import GPT
from nanogpt.terminal.console import progress_bar
from nanogpt.tokenizer.base import Tokenizer
from nanogpt.units import plural

MAX_BYTES = 1 << 28
"""Maximum size of a file of prompts, in bytes."""

BATCHED = (*(field.name for field in fields(SamplingParams)), "num_tokens")
"""Settings that all rows of a batch share."""

OVERRIDES = (*BATCHED, "seed", "stop")
"""Settings that a line may give for its prompt; the flags hold for the others."""


@dataclass(frozen=True)
class Request:
    """A line of the file."""

    id: str | int
    prompt: str
    ids: Tensor
    """(T,) int64."""
    config: SampleConfig
    seed: int

    @property
    def batch_key(self) -> tuple[object, ...]:
        """Requests with equal keys can share a batch."""
        return tuple(getattr(self.config, name) for name in BATCHED)


def run(model: GPT, tokenizer: Tokenizer, config: SampleConfig, guesses: NgramGuesses | None = None) -> None:
    """Print a JSON object for each prompt of config.prompts_file. guesses: not for texts in batches."""
    requests = read_requests(tokenizer, config)
    done: dict[int, str] = {}
    batch_of = {number: batch for batch in plan_batches(requests) for number in batch}
    lines_show_progress = sys.stdout.isatty()
    with nullcontext() if lines_show_progress else progress_bar("Prompts", on_stderr=True) as bar:
        task = bar.add_task("", total=len(requests), detail="") if bar else None
        for number in range(len(requests)):
            if number not in done:
                batch = batch_of[number]
                done |= zip(batch, complete(model, tokenizer, [requests[i] for i in batch]), strict=True)
                if bar and task is not None:
                    bar.advance(task, len(batch))
            print_text(f"{done.pop(number)}\n")


def plan_batches(requests: list[Request]) -> Iterator[list[int]]:
    """Numbers of requests that are computed together, at most MAX_ROWS each."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(request.batch_key, []).append(number)
    for group in groups.values():
        for start in range(0, len(group), MAX_ROWS):
            yield group[start : start + MAX_ROWS]


def complete(model: GPT, tokenizer: Tokenizer, batch: list[Request]) -> Iterator[str]:
    """Compute requests in one batch: a line of JSON for each."""
    rows = generate_rows(
        model,
        [request.ids.to(device_of(model)) for request in batch],
        batch[0].config,
        num_tokens=batch[0].config.num_tokens,
        generators=generators_for(model, [request.seed for request in batch]),
        on_short_memory=one_after_the_other,
    )
    for request, row in zip(batch, rows, strict=True):
        stream = TextStream(tokenizer, row, request.config.stop)
        result = {"id": request.id, "prompt": request.prompt, "text": "".join(stream)}
        result |= {"finish_reason": stream.finish_reason, "seed": request.seed}
        yield json.dumps(result, ensure_ascii=False)


def read_requests(tokenizer: Tokenizer, config: SampleConfig) -> list[Request]:
    """Read and check all lines. Raises: UserError that names the first bad one."""
    name = cast(str, config.prompts_file)
    lines = read_text(name, "--prompts_file", MAX_BYTES).split("\n")
    seed = secrets.randbits(32) if config.seed is None else config.seed
    requests: list[Request] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            requests.append(read_request(line, number, tokenizer, config, seed + len(requests)))
        except UserError as error:
            problems.append(f"line {number}: {error}")
    more = f" (and {plural(len(problems) - 1, 'more bad line')})" if problems[1:] else ""
    require(not problems, f"--prompts_file {name}, {''.join(problems[:1])}{more}")
    require(
        bool(requests), f'--prompts_file {name} has no prompts: give lines such as {{"prompt": "ROMEO:"}}'
    )
    return requests


def read_request(line: str, number: int, tokenizer: Tokenizer, config: SampleConfig, seed: int) -> Request:
    """Read one line. seed: for a line that gives none. Raises: UserError."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'this is not JSON ({error}): write {{"prompt": "ROMEO:"}}') from error
    require(isinstance(record, dict), 'this is not an object: write {"prompt": "ROMEO:"}')
    given = cast(dict[str, Any], record)
    unknown = [repr(key) for key in given if key not in ("prompt", "id", *OVERRIDES)]
    known = ", ".join(("prompt", "id", *OVERRIDES))
    require(not unknown, f"{', '.join(unknown)} is unknown: use {known}")
    prompt, own_id = given.get("prompt"), given.get("id")
    require(
        isinstance(prompt, str) and prompt != "",
        '"prompt" is missing or not a text: write "prompt": "ROMEO:"',
    )
    is_plain = own_id is None or (isinstance(own_id, str | int) and not isinstance(own_id, bool))
    require(is_plain, f'"id" {own_id!r} is neither a text nor a whole number')
    overrides = {key: given[key] for key in OVERRIDES if key in given}
    if isinstance(overrides.get("stop"), str):
        overrides["stop"] = [overrides["stop"]]
    own = resolve_logit_bias(replace(config, **overrides), tokenizer)
    ids = encode_prompt(tokenizer, cast(str, prompt), skip_unknown=own.unknown == "skip", flag='"prompt"')
    return Request(
        id=number if own_id is None else own_id,
        prompt=cast(str, prompt),
        ids=ids[0],
        config=own,
        seed=seed if overrides.get("seed") is None else cast(int, own.seed),
    )
