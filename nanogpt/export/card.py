"""The model card: README.md of an exported folder, written from the checkpoint and what is known of its run.

Example: (folder / "README.md").write_text(model_card(source, "f32"))
It says what the files say and no more: language, licence and the origin of the text are not known here.
The form: https://huggingface.co/docs/hub/model-cards.
"""

import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

from nanogpt import __version__
from nanogpt.config import TrainConfig
from nanogpt.export.families import closest_family
from nanogpt.export.source import Evaluation, TrainedModel
from nanogpt.tokenizer.base import END_OF_TEXT, CharTokenizer
from nanogpt.units import duration, plural

FRONT_MATTER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- nanogpt
---
"""

MAX_EVALUATIONS = 20
"""Rows of the table of losses."""

NO_RECIPE = ("preset", "data_dir", "out_dir", "resume", "overwrite", "minutes", "fixed", "device", "log_to")
"""Settings that are not part of the recipe: names, folders, the machine, and what chose the others."""


def model_card(source: TrainedModel, dtype: str) -> str:
    """The whole card, in Markdown."""
    sections = {
        f"# {source.name}": introduction(source),
        "## Use": usage(source),
        "## Model": shape(source, dtype),
        "## Data": data(source),
        "## Training": recipe(source),
        "## Losses": losses(source),
        "## Limits": limits(source),
    }
    parts = [f"{title}\n\n" + "\n".join(lines) for title, lines in sections.items()]
    return "\n\n".join([FRONT_MATTER.rstrip(), *parts]) + "\n"


def introduction(source: TrainedModel) -> list[str]:
    """What it is, and what the card does not know."""
    is_tuned = source.saved.train_config.init_from is not None
    origin = "fine-tuned from another model" if is_tuned else "trained from scratch"
    base = ["The name of that model is not said here, where it may be a folder: add it, and its licence."]
    return [
        f"A language model of {source.num_weights:,} parameters, {origin} with NanoGPT {__version__}. It "
        "continues text.",
        "",
        "This card was written from the checkpoint, which does not know the language and the origin of the "
        "text, nor a licence: add them before you publish it.",
        *(base if is_tuned else []),
    ]


def usage(source: TrainedModel) -> list[str]:
    """Python that continues a text."""
    newline_is_known = not source.tokenizer.unknown_characters("\n")
    prompt = "\n" if newline_is_known else source.tokenizer.decode([0])
    length = max(1, min(200, source.config.block_size - len(source.tokenizer.encode(prompt))))
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"folder = {source.name!r}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        f'inputs = tokenizer({prompt!r}, return_tensors="pt", return_token_type_ids=False)',
        f"tokens = model.generate(**inputs, max_new_tokens={length}, do_sample=True, temperature=0.8)",
        "print(tokenizer.decode(tokens[0]))",
        "```",
    ]


def shape(source: TrainedModel, dtype: str) -> list[str]:
    """The architecture."""
    config = source.config
    rows = {
        "architecture": closest_family(config).title,
        "layers": config.n_layer,
        "width": config.n_embd,
        "heads": config.n_head,
        "key-value heads": config.n_kv_head or config.n_head,
        "width of a head": config.head_width,
        "context": f"{config.block_size:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "parameters": f"{source.num_weights:,}, in {dtype}",
    }
    return table(("", ""), [(name, str(value)) for name, value in rows.items()])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def data(source: TrainedModel) -> list[str]:
    """What is known of the text."""
    tokenizer, known = source.tokenizer, source.data
    what = {
        "char": "characters",
        "byte": "bytes of UTF-8",
        "bpe": "pieces of words (byte-level byte-pair encoding)",
        "tokenizer.json": "those of a tokenizer.json",
    }[tokenizer.kind]
    lines = [f"- Tokens: {what}, {tokenizer.vocab_size:,} different ones"]
    if known is not None:
        lines.append(f"- Training split: {len(known.train):,} tokens")
        lines.append(f"- Validation split: {len(known.val):,} tokens")
        if known.bytes is not None:
            lines.append(f"- Text: {known.bytes:,} bytes of UTF-8")
        if known.counted is not None:
            lines.append("- It is pairs of prompt and completion: losses are those of completions alone")
    return [
        *lines,
        f"- Fingerprint (SHA-256 of the documents and their preparation): `{source.saved.fingerprint}`",
    ]


def recipe(source: TrainedModel) -> list[str]:
    """How it was trained: the settings that differ from NanoGPT's defaults, as a command."""
    config, progress = source.train_config, source.saved.progress
    seen = source.step * config.batch_size * config.block_size
    epochs = "" if source.data is None else f", {seen / max(1, len(source.data.train)):.1f} epochs"
    elapsed = progress.get("elapsed_s")
    time = f" in {duration(elapsed)}" if elapsed else ""
    precision = source.saved.precision
    average = ["", "The weights are an average (EMA) over the last updates."] if source.saved.average else []
    return [
        f"{plural(source.step, 'update')} of {config.batch_size} times {config.block_size} tokens, {seen:,} "
        f"in all{epochs}{time}, on {precision['device']} in {precision['dtype']}. The recipe:",
        "",
        "```bash",
        recipe_command(config),
        "```",
        *average,
    ]


def recipe_command(config: TrainConfig) -> str:
    """The settings of a training that differ from their defaults, as a command."""
    words = [word for name in recipe_settings(config) for word in words_of(config, name)]
    return shlex.join(["nanogpt", "train", *words])


def recipe_settings(config: TrainConfig) -> list[str]:
    """The settings of a training that differ from their defaults."""
    names = [field.name for field in fields(config) if field.name not in NO_RECIPE]
    return [name for name in names if getattr(config, name) != getattr(TrainConfig(), name)]


def words_of(config: TrainConfig, name: str) -> list[str]:
    """A setting as words of a command line."""
    value: Any = getattr(config, name)
    if isinstance(value, tuple):
        return [word for item in cast(tuple[str, ...], value) for word in (f"--{name}", item)]
    return (
        [f"--{name}" if value else f"--no_{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    )


def losses(source: TrainedModel) -> list[str]:
    """The validation loss, and its curve if it is known."""
    config = source.saved.train_config
    if source.val_loss is None:
        return ["It was not evaluated."]
    which = (
        "Validation loss"
        if source.is_best
        else "Lowest validation loss of the run (these weights are later ones)"
    )
    over = (
        ""
        if config.eval_iters is None
        else f", over at most {plural(config.eval_iters, 'batch')} of the split"
    )
    lines = [f"{which}: {source.val_loss:.4f} nats per token{over}."]
    if source.curve:
        has_bits = all(point.bits_per_byte is not None for point in source.curve)
        head = ("step", "validation loss", "bits per byte")[: 2 + has_bits]
        rows = [
            (f"{point.step:,}", f"{point.loss:.4f}", f"{point.bits_per_byte or 0:.4f}")[: 2 + has_bits]
            for point in spread(source.curve)
        ]
        lines += ["", *table(head, rows)]
    return [*lines, "", "The checkpoint knows of no other measurement."]


def spread(curve: Sequence[Evaluation]) -> list[Evaluation]:
    """At most MAX_EVALUATIONS of a curve, evenly spread; the first, the last and the best are among them."""
    last, count = len(curve) - 1, min(len(curve), MAX_EVALUATIONS - 1)
    chosen = {round(i * last / max(1, count - 1)) for i in range(count)}
    best = min(range(len(curve)), key=lambda i: curve[i].loss)
    return [curve[i] for i in sorted(chosen | {best})]


def limits(source: TrainedModel) -> list[str]:
    """What it cannot do."""
    config, tokenizer = source.saved.train_config, source.tokenizer
    lines = [
        "- It writes text like that of its training. It was not trained to answer, to follow instructions, "
        "or to tell what is true.",
        f"- It sees {source.config.block_size:,} tokens at most"
        + (", and fails beyond." if source.config.positions == "learned" else "; longer texts are untested."),
    ]
    if source.step < config.max_iters:
        lines.append(f"- It is from step {source.step:,} of the {config.max_iters:,} that were planned.")
    if isinstance(tokenizer, CharTokenizer):
        lines.append(
            f"- It knows {plural(len(tokenizer.chars), 'character')}. All others are left out of a text, "
            "without a word."
        )
    if tokenizer.end_of_text is not None:
        lines.append(
            f"- A text that spells `{END_OF_TEXT}` ends there, unless it is encoded with "
            "`split_special_tokens=True`."
        )
    return lines
