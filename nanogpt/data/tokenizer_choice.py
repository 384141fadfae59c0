"""The tokenizer of a data set: the one that --tokenizer names, or one that is learned from the text.

Use:    tokenizer = given_tokenizer(config) or learned_tokenizer(config, corpora, split, survey)
"""

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from nanogpt.config import DataConfig
from nanogpt.console import progress_bar, say
from nanogpt.data.scan import ScanResult, Split, all_chunks
from nanogpt.errors import UserError, require
from nanogpt.text.corpus import Corpus
from nanogpt.text.tiny_shakespeare import download
from nanogpt.tokenizer.base import ByteTokenizer, CharTokenizer, Tokenizer, characters
from nanogpt.tokenizer.bpe import gpt2, train_bpe
from nanogpt.tokenizer.registry import from_file

SAMPLE_BYTES = 1 << 26
"""How much of the training split a BPE is learned from, spread evenly over it."""

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


def given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer that --tokenizer names, None if it is learned. Errors: UserError if it cannot be had."""
    match config.tokenizer:
        case "char" | "bpe":
            return None
        case "byte":
            return ByteTokenizer()
        case "gpt2":
            return gpt2(published_merges())
        case path:
            return from_file(Path(path))


def learned_tokenizer(
    config: DataConfig, corpora: Mapping[str, Corpus], split: Split, survey: ScanResult
) -> Tokenizer:
    """Every character of the text, or a BPE learned from its training split.

    Errors: UserError if it is too small for --vocab_size.
    """
    if config.tokenizer == "char":
        return CharTokenizer(characters(survey.seen), end_of_text=len(survey.characters) > 1)
    sample = training_sample(corpora, split, survey.total)
    say(f"Learning a vocabulary of {config.vocab_size:,} from {len(sample) / 1e6:,.1f} MB of text")
    return train_bpe(sample, config.vocab_size)


def training_sample(corpora: Mapping[str, Corpus], split: Split, total: int) -> bytes:
    """Pieces of the training split in UTF-8, about SAMPLE_BYTES of it, evenly spread.

    The byte 0xFF stands between them: what follows a piece in the sample does not follow it in the text.
    total: size of the whole corpus, in characters (a little less than in bytes: the sample is the larger).
    """
    sample: list[bytes] = []
    taken = passed = 0
    with progress_bar("Sampling", size_in_bytes=True) as bar:
        task = bar.add_task("", total=sum(corpus.size for corpus in corpora.values()), detail="")
        for piece, side in split(all_chunks(corpora, partial(bar.advance, task))):
            if side == 0 and taken * total <= passed * SAMPLE_BYTES:
                sample.append(piece.raw)
                taken += len(piece.raw)
            passed += len(piece.raw)
    return b"\xff".join(sample)


def published_merges() -> str:
    """GPT-2's file of merges, from where it was published. Errors: UserError if it cannot be fetched."""
    try:
        raw = download(GPT2_URL)
    except OSError as error:
        raise UserError(
            "--tokenizer gpt2 cannot be fetched: connect to the internet, or give --tokenizer the path "
            f"of GPT-2's tokenizer.json ({type(error).__name__})"
        ) from error
    require(hashlib.sha256(raw).hexdigest() == GPT2_SHA256, "--tokenizer gpt2 arrived damaged: try again")
    return raw.decode("utf-8")
