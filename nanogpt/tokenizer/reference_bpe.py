"""Byte-level BPE in plain Python, written to be read: pre-tokenization, training, encoding, decoding.

Example: merges = train(text, vocab_size=300)
         ids = encode("to be or not to be", merges)
         decode(ids, merges)

The idea (Sennrich et al. 2016; over bytes: Radford et al. 2019): begin with 256 tokens, one for each byte.
Find the pair of neighboring tokens that occurs most often in the text, make it a token of its own, and
repeat. Frequent words end up as one token, rare words as several, and no text is ever unknown.

Nothing imports this file. `nanogpt/tokenizer/bpe.py` computes the same merges and the same ids, much faster;
tests/test_reference_bpe.py compares the two.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

Pair = tuple[bytes, bytes]
"""Two neighboring tokens. A token is a string of bytes."""

WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+", re.ASCII)
"""GPT-2's rule for a word: an English ending such as 's; or letters, digits or other signs, each with the
space before them; or white space, whose last character is left to the next word."""

PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}

TIE_ORDER = sorted(range(256), key=lambda byte: (byte not in PRINTABLE, byte))
"""The bytes in the order that decides between equally frequent pairs: GPT-2 has the printable ones first."""


def split_words(text: str) -> list[str]:
    """Pre-tokenization: cut a text into words. No token extends beyond a word."""
    simple = "".join(map(ascii_of_same_kind, text))
    return [text[found.start() : found.end()] for found in WORD.finditer(simple)]


def ascii_of_same_kind(char: str) -> str:
    """An ASCII character of the same kind: a letter, a digit, white space, or another sign."""
    if char.isascii():
        return char
    if char.isspace():
        return "\n"
    return {"L": "a", "N": "0"}.get(unicodedata.category(char)[0], "!")


def train(text: str, vocab_size: int) -> list[Pair]:
    """Learn merges from a text: as many as a vocabulary of `vocab_size` has room for, most frequent first.

    The bytes take 256 ids and the end of a text takes one. Fewer merges if the text runs out of pairs.
    """
    words = [(to_bytes(word), count) for word, count in Counter(split_words(text)).items()]
    order = {bytes([byte]): number for number, byte in enumerate(TIE_ORDER)}
    merges: list[Pair] = []
    while len(merges) < vocab_size - 257 and (counts := count_pairs(words)):
        # The most frequent pair; of several, the one whose left token is older, then the right one.
        best = max(counts, key=lambda pair: (counts[pair], -order[pair[0]], -order[pair[1]]))
        merges.append(best)
        order.setdefault(best[0] + best[1], len(order))
        words = [(merge(word, best), count) for word, count in words]
    return merges


def count_pairs(words: Iterable[tuple[Sequence[bytes], int]]) -> Counter[Pair]:
    """Count how often each pair of neighboring tokens occurs, in words that occur `count` times each."""
    counts: Counter[Pair] = Counter()
    for word, count in words:
        for pair in pairwise(word):
            counts[pair] += count
    return counts


def merge(tokens: Sequence[bytes], pair: Pair) -> list[bytes]:
    """Replace every occurrence of a pair by one token, from left to right."""
    merged: list[bytes] = []
    position = 0
    while position < len(tokens):
        found = tuple(tokens[position : position + 2]) == pair
        merged.append(pair[0] + pair[1] if found else tokens[position])
        position += 2 if found else 1
    return merged


def to_bytes(word: str) -> list[bytes]:
    """Write a word as one token for each byte of its UTF-8."""
    return [bytes([byte]) for byte in word.encode()]


def encode(text: str, merges: Sequence[Pair]) -> list[int]:
    """Turn a text into ids: in each word, apply the merges in the order in which they were learned."""
    rank = {pair: number for number, pair in enumerate(merges)}
    id_of = {token: number for number, token in enumerate(vocabulary(merges))}
    return [id_of[token] for word in split_words(text) for token in encode_word(word, rank)]


def encode_word(word: str, rank: Mapping[Pair, int]) -> list[bytes]:
    """Turn a word into tokens: while some pairs have a rank, merge the pair of the lowest rank."""
    tokens = to_bytes(word)
    while pairs := [pair for pair in pairwise(tokens) if pair in rank]:
        tokens = merge(tokens, min(pairs, key=lambda pair: rank[pair]))
    return tokens


def decode(ids: Iterable[int], merges: Sequence[Pair]) -> str:
    """Turn ids back into a text. Bytes that are not UTF-8, which a model may write, become U+FFFD."""
    tokens = vocabulary(merges)
    return b"".join(tokens[number] for number in ids).decode("utf-8", "replace")


def vocabulary(merges: Iterable[Pair]) -> list[bytes]:
    """List the tokens in the order of their ids: first every byte, then one token for each merge."""
    tokens = [bytes([byte]) for byte in range(256)]
    return list(dict.fromkeys([*tokens, *(left + right for left, right in merges)]))
