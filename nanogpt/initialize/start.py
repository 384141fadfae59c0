"""The first weights of a training that starts from a trained model.

Example: weights = first_weights(config, tokenizer)           # config.init_from says which model
The architecture is the source's, but for a shorter context. The tokens are those of the data: rows of padding
are cut off, and a vocabulary of characters may be another one, whose new characters get new rows.

Shapes: V tokens of the data, R rows of the source, C n_embd
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanogpt.config import SHAPE_FIELDS, Architecture, TrainConfig
from nanogpt.errors import UserError, require
from nanogpt.initialize.registry import open_source
from nanogpt.initialize.source import PretrainedModel
from nanogpt.model.gpt import ACTIVATIONS, default_hidden_dim
from nanogpt.terminal.console import command, say
from nanogpt.tokenizer.base import CharTokenizer, Tokenizer
from nanogpt.tokenizer.registry import PROBE

IGNORED = ("zero_init",)
"""Fields of the shape that say only how weights begin."""

MAX_SHOWN = 20
"""Characters that a line shows."""


def first_weights(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """All weights by name, float32, for a model of `config` with the tokens of `tokenizer`.

    Raises: UserError if the model that config.init_from names does not fit.
    """
    assert config.init_from is not None
    source = open_source(config.init_from)
    check_shape(config, source)
    rows = match_tokens(source, tokenizer, config.data_dir)
    weights = source.weights()
    say(f"Starting from {source.name} ({source.program})")
    if "position_embedding.weight" in weights and config.block_size < source.config.block_size:
        weights["position_embedding.weight"] = weights["position_embedding.weight"][
            : config.block_size
        ].clone()
        say(f"Of {source.config.block_size:,} learned positions, the first {config.block_size:,} are kept")
    for name in ("token_embedding.weight", "head.weight"):
        if name in weights:
            weights[name] = pick_rows(weights[name], rows, config.seed)
    if source.config.tied:
        weights["head.weight"] = weights["token_embedding.weight"]
    return weights


def check_shape(config: TrainConfig, source: PretrainedModel) -> None:
    """Check that a training has the source's architecture. Raises: UserError naming the first difference."""
    for name in SHAPE_FIELDS:
        given, found = value_of(config, name), value_of(source.config, name)
        if given == found or name in IGNORED:
            continue
        if name != "block_size":
            raise UserError(
                f"--{name} {given} contradicts {source.name}, which has {name} {found}: leave it out"
            )
        require(
            given < found or config.positions != "learned",
            f"--block_size {given} is more than the {found} learned positions of {source.name}: give {found} "
            "or less",
        )


def value_of(config: Architecture, name: str) -> Any:
    """A field of an architecture; in place of None, the number that it stands for."""
    value = getattr(config, name)
    if name == "n_kv_head":
        return value or config.n_head
    if name == "head_dim":
        return config.head_width
    if name == "mlp_width":
        return value or default_hidden_dim(config.n_embd, gated=ACTIVATIONS[config.mlp].gated)
    return value


# --- the vocabulary ---


def match_tokens(source: PretrainedModel, tokenizer: Tokenizer, data_dir: str) -> list[int | None]:
    """The row of the source for each token of the data, (V,); None for a new character.

    Raises: UserError if the data has other tokens.
    """
    has, size = source.config.vocab_size, tokenizer.vocab_size
    prepare = f"{' '.join(command('data'))} --tokenizer {source.prepare_with} --input_file YOUR_TEXT"
    advice = f"the data in {data_dir} has other tokens than {source.name}: prepare it with {prepare}"
    require(source.num_tokens in (None, size), advice)
    theirs = source.tokenizer()
    added_end = theirs.end_of_text == has == theirs.vocab_size - 1  # a tokenizer.json without one got ours
    if theirs.vocab_size > has and not added_end:
        raise UserError(
            f"--init_from {source.name} has {has} rows for the {theirs.vocab_size} of its tokenizer"
        )
    if is_same(theirs, tokenizer):
        rows = [row if row < has else None for row in range(size)]
        report_characters(source, theirs, tokenizer, rows)
        return rows
    require(isinstance(tokenizer, CharTokenizer) and is_characters(theirs), advice)
    require(
        not source.config.ngram_vocab,
        f"{source.name} has tables of n-grams for its own characters, and {data_dir} has others: take "
        f"those that it does not have out of the text, and prepare that with {prepare}",
    )
    row_of = {token: row for row, token in enumerate(theirs.tokens[:has])}
    rows = [row_of.get(token) for token in tokenizer.tokens]
    report_characters(source, theirs, tokenizer, rows)
    return rows


def is_same(theirs: Tokenizer, tokenizer: Tokenizer) -> bool:
    """Whether two tokenizers make the same tokens of a text, and end it alike."""
    if theirs.tokens != tokenizer.tokens or theirs.end_of_text != tokenizer.end_of_text:
        return False
    if isinstance(tokenizer, CharTokenizer) or theirs.to_dict() == tokenizer.to_dict():
        return True
    return theirs.encode(PROBE).tolist() == tokenizer.encode(PROBE).tolist()


def is_characters(tokenizer: Tokenizer) -> bool:
    """Whether each token is one character, but for the end of a text."""
    tokens = [token for i, token in enumerate(tokenizer.tokens) if i != tokenizer.end_of_text]
    return all(len(token.decode("utf-8", "replace")) == 1 for token in tokens)


def report_characters(
    source: PretrainedModel, theirs: Tokenizer, tokenizer: Tokenizer, rows: Sequence[int | None]
) -> None:
    """Say which characters are new, and which of the source's the data does not have."""
    new = [token for token, row in zip(tokenizer.tokens, rows, strict=True) if row is None]
    old = sorted(set(theirs.tokens[: source.config.vocab_size]) - set(tokenizer.tokens))
    if new:
        say(f"New in the vocabulary, with fresh weights: {show(new)}")
    if old:
        say(
            f"Left out of the vocabulary, since the data does not have them: {show(old)} "
            f"({' '.join(command('data'))} --tokenizer {source.prepare_with} keeps them)"
            if source.prepare_with.endswith(".pt")
            else f"Left out of the vocabulary, since the data does not have them: {show(old)}"
        )


def show(tokens: Sequence[bytes]) -> str:
    """The first tokens, for a message."""
    shown = " ".join(repr(token.decode("utf-8", "replace")) for token in tokens[:MAX_SHOWN])
    return shown if len(tokens) <= MAX_SHOWN else f"{shown} and {len(tokens) - MAX_SHOWN} more"


def pick_rows(weight: Tensor, rows: Sequence[int | None], seed: int) -> Tensor:
    """The rows of a matrix (R, C) for the tokens of the data, (V, C). New rows are as GPT-2's at first."""
    if rows == list(range(len(weight))):
        return weight
    generator = torch.Generator().manual_seed(seed)
    picked = torch.empty(len(rows), weight.shape[1]).normal_(0.0, 0.02, generator=generator)
    old = [i for i, row in enumerate(rows) if row is not None]
    picked[old] = weight[[row for row in rows if row is not None]]
    return picked
