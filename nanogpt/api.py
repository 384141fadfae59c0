"""The Python interface, texts in and texts out: prepare, generate, score, inspect_text, load_metrics.

Example: from nanogpt import TrainConfig, fit, generate, load_model, prepare, score
         prepare("my.txt", "data")
         fit(TrainConfig(data_dir="data", out_dir="out", minutes=2))
         model = load_model("out")
         print(generate(model, "ROMEO:", num_tokens=200, seed=1))
         print(score(model, "To be, or not to be").loss)
They do what the commands data, train (fit), sample (generate) and eval (score) do, with the same numbers;
inspect_text does what the server does at /inspect. quiet=True prints and shows nothing. They are built on
data/prepare.py, sampler.py, scoring.py and inference/inspection.py.

Shapes: N tokens of a text
"""

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np
import torch
from torch import Tensor

from nanogpt import scoring
from nanogpt.checkpoint.format import TextModel
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.config import Dtype
from nanogpt.data.config import PrepareConfig
from nanogpt.data.prepare import main as prepare_data
from nanogpt.errors import require
from nanogpt.inference.config import SampleConfig, SamplingParams
from nanogpt.inference.generate import DEFAULT_PARAMS, Observer
from nanogpt.inference.generate import generate as generate_ids
from nanogpt.inference.inspection import Inspection, inspect_tokens
from nanogpt.inference.prompts import device_of
from nanogpt.inference.sampling import Randomness
from nanogpt.inference.text import pieces_of
from nanogpt.machine.device import autocast, eager_mode, explain_out_of_memory
from nanogpt.machine.precision import pick_sampling_dtype
from nanogpt.model.gpt import GPT
from nanogpt.sampler import Completion, Sampler
from nanogpt.terminal.console import late_progress_bar, silence
from nanogpt.text.encoding import utf8
from nanogpt.training.metrics import read_rows
from nanogpt.training.plot import points

Texts = list[str] | tuple[str, ...]

SETTINGS = (
    *(field.name for field in fields(SamplingParams)),
    *("num_tokens", "num_samples", "stop", "seed", "logprobs", "unknown", "dtype", "quantize"),
)
"""Keywords of generate that are flags of the `sample` command too."""

HIGHLIGHT = "217, 72, 1"
"""Red, green and blue behind an improbable token."""


# --- data ---


def prepare(
    input_file: "str | PathLike[str] | Iterable[str | PathLike[str]]" = (),
    data_dir: "str | PathLike[str]" = "data",
    *,
    quiet: bool = False,
    **settings: Any,
) -> None:
    """Turn texts into a data folder: train.pt, val.pt and vocab.pt. Does nothing if it holds these already.

    input_file: a file, a folder, a glob or an address, or several; none: Tiny Shakespeare, downloaded.
    settings: flags of the `data` command (PrepareConfig): tokenizer="bpe", vocab_size=1000, overwrite=True.
    Raises: UserError, as the command does.
    """
    several = isinstance(input_file, Iterable) and not isinstance(input_file, str)
    files = tuple(cast(Iterable[str], input_file)) if several else (input_file,)
    with silence(quiet):
        known = [field.name for field in fields(PrepareConfig)]
        check_names(settings, [name for name in known if name not in ("input_file", "data_dir")])
        prepare_data(PrepareConfig(cast(tuple[str, ...], files), cast(str, data_dir), **settings))


def check_names(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise UserError if a keyword is unknown."""
    unknown = [name for name in given if name not in known]
    require(not unknown, f"{', '.join(unknown)} is no setting: use {', '.join(known)}")


# --- metrics ---


def load_metrics(run: "str | PathLike[str]") -> "dict[str, tuple[np.ndarray, np.ndarray]]":
    """The metrics of a run: name -> the steps at which it was logged, (N,) int64, and its values, (N,).

    run: a run folder, or its metrics.jsonl. The names are those of its lines: train_loss, val_loss, lr, ...
    Raises: UserError if there is no metrics.jsonl, or it cannot be read.
    """
    path = Path(run) if Path(run).is_file() else RunFolder(Path(run)).metrics
    require(path.is_file(), f"{path} does not exist: give a run folder (--out_dir)")
    rows = [row for _, row in read_rows(path) if row is not None]
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    found = {name: points(rows, name) for name in names}
    return {
        name: (np.array([step for step, _ in some], np.int64), np.array([value for _, value in some], float))
        for name, some in found.items()
    }


# --- generate ---


@overload
def generate(
    model: GPT,
    prompt: Tensor | Sequence[Tensor],
    params: SamplingParams = ...,
    *,
    num_tokens: int,
    generator: Randomness = ...,
    observe: Observer | None = ...,
    **settings: Any,
) -> Iterator[Tensor]: ...
@overload
def generate(model: TextModel, prompt: str, *, stream: Literal[True], **settings: Any) -> Iterator[str]: ...
@overload
def generate(
    model: TextModel,
    prompt: str,
    *,
    num_samples: None = ...,
    logprobs: None = ...,
    stream: Literal[False] = ...,
    **settings: Any,
) -> str: ...
@overload
def generate(
    model: TextModel,
    prompt: str,
    *,
    num_samples: None = ...,
    logprobs: int,
    stream: Literal[False] = ...,
    **settings: Any,
) -> Completion: ...
@overload
def generate(
    model: TextModel,
    prompt: str,
    *,
    num_samples: int,
    logprobs: None = ...,
    stream: Literal[False] = ...,
    **settings: Any,
) -> list[str]: ...
@overload
def generate(
    model: TextModel,
    prompt: str,
    *,
    num_samples: int,
    logprobs: int,
    stream: Literal[False] = ...,
    **settings: Any,
) -> list[Completion]: ...
@overload
def generate(
    model: TextModel,
    prompt: Texts,
    *,
    logprobs: None = ...,
    stream: Literal[False] = ...,
    **settings: Any,
) -> list[str]: ...
@overload
def generate(
    model: TextModel, prompt: Texts, *, logprobs: int, stream: Literal[False] = ..., **settings: Any
) -> list[Completion]: ...


def generate(model: Any, prompt: Any, params: SamplingParams = DEFAULT_PARAMS, **settings: Any) -> Any:
    """Continue a prompt: returns the new text, without the prompt; for several prompts, a list.

    num_tokens: tokens to generate, by default 500. num_samples: number of texts for one prompt, as a list.
    seed: makes the texts repeatable; text i has the seed `seed` + i, and does not depend on the others.
    stop: a text, or a list of texts, before which to end. stream=True: return an iterator over the text of
    one prompt, in chunks, while it is generated; a chunk never ends within a character. logprobs=5: return a
    Completion instead of each text, with its tokens, their log-probabilities, and the 5 likeliest in each
    place.
    temperature, top_k, top_p, min_p, repetition_penalty, ...: the fields of SamplingParams; or params.
    unknown="skip": leave unknown characters out of a prompt. dtype, quantize: as the flags of the command.
    quiet: show no progress bar.
    With the same seed, the `sample` command generates the same text.
    Raises: UserError, at the call, for an impossible value or an unknown name.

    With a GPT in place of a TextModel, prompts are token ids: see nanogpt.inference.generate.
    """
    if isinstance(model, GPT):
        advice = "for a text, give all that load_model returns: model = load_model(path)"
        require(not holds_text(prompt), f"a GPT continues token ids: {advice}")
        return generate_ids(model, prompt, params, **settings)
    require(isinstance(model, TextModel), f"model is a {type(model).__name__}: give what load_model returns")
    return continue_texts(model, prompt, **{**vars(params), **settings})


def holds_text(prompt: object) -> bool:
    """Whether a prompt is a text or a list of them."""
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, (list, tuple)) and any(
        isinstance(item, str) for item in cast(Sequence[object], prompt)
    )


def continue_texts(
    model: TextModel,
    prompt: str | Iterable[str],
    *,
    stream: bool = False,
    quiet: bool = False,
    num_samples: int | None = None,
    **settings: Any,
) -> Any:
    """See generate, which calls this for texts."""
    check_names(settings, [*SETTINGS, "stream", "quiet"])
    if isinstance(settings.get("stop"), str):
        settings["stop"] = [settings["stop"]]
    config = SampleConfig(**settings, num_samples=1 if num_samples is None else num_samples)
    one = isinstance(prompt, str)
    require(one or num_samples is None, "num_samples is for one prompt: repeat it in a list, [prompt] * 3")
    prompts = [prompt] * config.num_samples if isinstance(prompt, str) else [*prompt]
    for item in cast(list[object], prompts):
        require(
            isinstance(item, str), f"a prompt is a {type(item).__name__}: give a text, or a list of texts"
        )
    if stream:
        alone = one and num_samples is None and config.logprobs is None
        require(alone, "stream=True is for one text: leave out num_samples and logprobs, and give one prompt")
        return Sampler.of(model, prompts, config).chunks()
    with silence(quiet), late_progress_bar("Tokens", len(prompts) * config.num_tokens) as advance:
        sampler = Sampler.of(model, prompts, config)
        with sampler.computing():
            rows = sampler.rows(advance)
            if config.logprobs is None:
                made: list[Any] = [sampler.text(row) for row in rows]
            else:
                made = [sampler.completion(number, row) for number, row in enumerate(rows)]
    return made[0] if one and num_samples is None else made


# --- score ---


@dataclass(frozen=True, repr=False)
class TextScore(scoring.Score):
    """The losses of a model on a text. Iterating gives the text of each token with its loss."""

    tokens: tuple[str, ...]
    """Texts of the predicted tokens, (N - 1,); "" for one that only begins a character."""
    first: str
    """Text of the first token, which is not predicted, since nothing comes before it."""

    def __iter__(self) -> Iterator[tuple[str, float]]:
        """The text of each predicted token with its loss in nats."""
        return zip(self.tokens, cast(list[float], self.losses.tolist()), strict=True)

    def __repr__(self) -> str:
        """One line, instead of all losses."""
        count = f"{len(self.losses):,} tokens"
        return f"TextScore({count}, {self.loss:.4f} nats a token, {self.bits_per_byte:.4f} bits a byte)"

    def _repr_html_(self) -> str:
        """The text as a notebook shows it: the redder a token, the less probable it was."""
        shown = [html.escape(self.first)]
        for text, loss in self:
            probability = math.exp(-loss)
            style = f"background: rgba({HIGHLIGHT}, {1 - probability:.2f})"
            title = f"probability {probability:.3f}, loss {loss:.2f} nats"
            shown.append(f'<span style="{style}" title="{title}">{html.escape(text)}</span>')
        head = f"{self.loss:.4f} nats a token, {self.bits_per_byte:.4f} bits a byte"
        return f'<div>{head}</div><pre style="white-space: pre-wrap">{"".join(shown)}</pre>'


def check_model_and_text(model: object, text: object) -> None:
    """Raise UserError unless the arguments are a TextModel and a text."""
    require(isinstance(model, TextModel), f"model is a {type(model).__name__}: give what load_model returns")
    require(isinstance(text, str), f"text is a {type(text).__name__}: give a text")


def score(
    model: TextModel,
    text: str,
    context: int | None = None,
    stride: int | None = None,
    *,
    dtype: Dtype = "auto",
    quiet: bool = False,
) -> TextScore:
    """The loss, in nats, of each token of a text but the first.

    A token is predicted from at most `context` tokens before it (None: the model's block_size), and from at
    least context - stride if there are that many (stride: None: context). dtype: of the matrix products;
    auto: as in training, where the device is fast at it. quiet: show no progress bar.
    Raises: UserError for a text of fewer than two tokens, an unknown character, or an impossible window.
    """
    check_model_and_text(model, text)
    ids = model.tokenizer.encode(text)
    require(len(ids) > 1, f"text has {len(ids)} tokens: give two at least, of which the second is predicted")
    sizes = scoring.token_sizes(scoring.token_lengths(model.tokenizer), ids, len(utf8(text)))
    context, stride = scoring.window_sizes(model.model, context, stride)
    picked = pick_sampling_dtype(dtype, device_of(model.model), model.trained_in)
    with silence(quiet), explain_out_of_memory(), late_progress_bar("Scoring", len(ids) - 1) as advance:
        losses = scoring.score(model.model, ids, context, stride, dtype=picked, advance=advance)
    pieces = pieces_of(model.tokenizer, ids.tolist())
    return TextScore(losses, sizes, context, stride, tuple(pieces[1:]), pieces[0])


# --- inspect ---


def inspect_text(
    model: TextModel,
    text: str,
    *,
    top: int = 10,
    attention: tuple[int, int] | None = None,
    lens: bool = False,
    dtype: Dtype = "auto",
) -> Inspection:
    """Inspect, token by token, how the model reads a text that fits in its context.

    Each token but the first has its log-probability, the entropy of the distribution that it was predicted
    with, its rank, and the `top` likeliest tokens in its place. attention=(layer, head): adds the attention
    weights of that head. lens=True: adds what each layer would predict (logit lens). dtype: see score.
    Raises: UserError for an empty or too long text, an unknown character, or no such layer or head.
    """
    check_model_and_text(model, text)
    ids = torch.from_numpy(model.tokenizer.encode(text).astype(np.int64))
    device = device_of(model.model)
    picked = pick_sampling_dtype(dtype, device, model.trained_in)
    with explain_out_of_memory(), eager_mode(), autocast(device, picked):
        return inspect_tokens(model.model, model.tokenizer, ids, top=top, attention=attention, lens=lens)
