"""Tokenizers against the libraries' own ways: learning a BPE, and encoding with it; characters, bytes.

Run:    python bench/bpe.py --megabytes 20 --rounds 3
Learning: ours (gigatoken) against tokenizers. Encoding: ours as `nanogpt data` does it (batches on
as many threads as there are cores) against tokenizers and tiktoken, one call a document and a call for all,
with the same merges; all must agree on every id. Memory aside, which bench/prepare.py measures. Needs the
extra `bench`. Prints a table of medians, writes bench/bpe.json.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial

import common
import numpy as np
import sources
import tiktoken
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers

from nanogpt.data.scan import group_into_batches, map_in_order
from nanogpt.machine.cores import usable_cores
from nanogpt.text.documents import Chunk
from nanogpt.tokenizer.base import END_OF_TEXT, ByteTokenizer, CharTokenizer, Tokenizer
from nanogpt.tokenizer.bpe import GPT2_ORDER, train_bpe, unspell

VOCABULARY = 4096

GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""GPT-2's rule for what a word is, as tiktoken writes it."""


def learn(documents: list[str]) -> Library:
    """The library's way to learn."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(documents, trainer)
    return library


def encode(tokenizer: Tokenizer, documents: list[str]) -> list[int]:
    """Our way: documents in batches, batches on threads."""
    pieces = [Chunk(text.encode(), True) for text in documents]
    groups = group_into_batches(pieces, lambda piece: len(piece.raw))
    work = partial(encode_group, tokenizer)
    return np.concatenate(list(map_in_order(work, groups)))


def encode_group(tokenizer: Tokenizer, group: list[Chunk]) -> np.ndarray:
    """Ids of a batch of documents."""
    return tokenizer.encode_batch([piece.raw for piece in group])[0]


def by_dictionary(text: str) -> list[int]:
    """Characters to ids as everyone writes it first."""
    ids = {char: i for i, char in enumerate(sorted(set(text)))}
    return [ids[char] for char in text]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    documents = sources.collect(options.megabytes * 10**6)
    text = "".join(documents)
    joined = b"\xff".join(document.encode() for document in documents)
    size = len(text.encode()) / 1e6

    ours = train_bpe(joined, VOCABULARY)
    library = Library.from_str(ours.source)
    ranks = {unspell(token): i for token, i in json.loads(ours.source)["model"]["vocab"].items()}
    theirs = tiktoken.Encoding("bench", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens={})
    reference = [i for one in library.encode_batch_fast(documents) for i in one.ids]
    assert encode(ours, documents).tolist() == reference
    assert [i for one in theirs.encode_ordinary_batch(documents) for i in one] == reference
    assert sorted(GPT2_ORDER) == list(range(256))
    chars = CharTokenizer.train(text)
    actions: dict[str, Callable[[], object]] = {
        "learn: tokenizers": lambda: learn(documents),
        "learn: ours": lambda: train_bpe(joined, VOCABULARY),
        "bpe: tokenizers, a call a document": lambda: [library.encode(one).ids for one in documents],
        "bpe: tokenizers, one call": lambda: [one.ids for one in library.encode_batch_fast(documents)],
        "bpe: tiktoken, a call a document": lambda: [theirs.encode_ordinary(one) for one in documents],
        "bpe: tiktoken, one call": lambda: theirs.encode_ordinary_batch(
            documents, num_threads=usable_cores()
        ),
        "bpe: ours, new words": lambda: encode(type(ours)(ours.source), documents),
        "bpe: ours": lambda: encode(ours, documents),
        "characters: dictionary": lambda: by_dictionary(text),
        "characters: ours": lambda: encode(chars, documents),
        "bytes: ours": lambda: encode(ByteTokenizer(), documents),
    }
    times = common.in_turn(actions, options.rounds)
    table = Table(
        "way", "seconds", "MB/s", title=f"{size:.0f} MB in {len(documents):,} documents, vocabulary 4,096"
    )
    rows: dict[str, float] = {}
    for name, values in times.items():
        median = statistics.median(values)
        rows[name] = size / median
        table.add_row(name, f"{median:.3f}", f"{size / median:,.1f}")
    Console().print(table)
    common.write_json("bpe", {"megabytes": size, "mb_per_s": rows})


if __name__ == "__main__":
    main()
