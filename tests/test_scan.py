"""The first pass counts right, in order, in as many threads as there are; splits are pure."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.data import scan
from nanogpt.data.config import PrepareConfig
from nanogpt.data.scan import ScanResult, Split, fingerprint_of, group_into_batches, map_in_order
from nanogpt.errors import UserError
from nanogpt.machine.cores import usable_cores
from nanogpt.text.documents import Chunk

quick = settings(deadline=None, derandomize=True, max_examples=100)


def surveyed(lengths, digests=None, first_val=None):
    found = ScanResult(first_val=first_val)
    found.characters.extend(lengths)
    found.digests.extend(digests or range(len(lengths)))
    return found


def test_results_come_in_order_whatever_finishes_first():
    def slow(number):
        time.sleep(0.002 * (number % 3))
        return number * number

    assert list(map_in_order(slow, range(40))) == [number * number for number in range(40)]
    assert list(map_in_order(slow, [])) == []


def test_few_items_are_held_at_a_time():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    for done, _ in enumerate(map_in_order(int, items())):
        assert len(taken) <= done + usable_cores(physical=False) + 3


def test_an_error_in_a_thread_or_in_the_items_comes_out_and_ends_the_threads():
    def fail(number):
        if number == 7:
            raise UserError("seven")
        return number

    def failing():
        yield from range(5)
        raise UserError("five")

    before = threading.active_count()
    with pytest.raises(UserError, match="seven"):
        list(map_in_order(fail, range(20)))
    with pytest.raises(UserError, match="five"):
        list(map_in_order(fail, failing()))
    stopped = map_in_order(fail, range(20))
    next(stopped)
    stopped.close()
    assert threading.active_count() == before


@quick
@given(st.lists(st.integers(0, 9)), st.integers(1, 20), st.integers(1, 5))
def test_batches_are_all_items_in_order_and_of_bounded_size(sizes, characters, count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "BATCH_BYTES", characters)
        patch.setattr(scan, "BATCH_DOCUMENTS", count)
        found = list(group_into_batches(sizes, lambda size: size))
    assert [size for batch in found for size in batch] == sizes
    assert all(0 < len(batch) <= count and sum(batch[:-1]) < characters for batch in found)
    assert all(len(batch) == count or sum(batch) >= characters for batch in found[:-1])


@quick
@given(st.lists(st.integers(0, 5), min_size=1), st.integers(1, 4), st.floats(0.01, 0.99))
def test_the_tail_begins_at_its_character_and_loses_none(lengths, piece, share):
    text = "".join(chr(0x4000 + i) for i in range(sum(lengths)))
    pieces, position = [], 0
    for length in lengths:
        cuts = list(range(position, position + length, piece)) or [position]
        for start in cuts:
            end = min(start + piece, position + length)
            pieces.append(Chunk(text[start:end].encode(), start == cuts[-1]))
        position += length
    boundary = int(len(text) * share)
    config = PrepareConfig(train_split=share)
    if min(boundary, len(text) - boundary) < 2:
        with pytest.raises(UserError, match="too short"):
            Split(surveyed(lengths), config)
        return
    sides = list(Split(surveyed(lengths), config)(pieces))
    for side, expected in enumerate((text[:boundary], text[boundary:])):
        assert b"".join(part.raw for part, its_side in sides if its_side == side).decode() == expected
    assert sum(part.ends for part, _ in sides) == len(lengths)
    assert [side for _, side in sides] == sorted(side for _, side in sides) or 0 in lengths


def test_a_document_that_ends_where_the_tail_begins_ends_on_its_side():
    sides = list(
        Split(surveyed([5, 5]), PrepareConfig(train_split=0.5))(
            [Chunk(b"a" * 5, True), Chunk(b"b" * 5, True)]
        )
    )
    assert sides == [(Chunk(b"aaaaa", True), 0), (Chunk(b"bbbbb", True), 1)]
    (first, second) = Split(surveyed([10]), PrepareConfig(train_split=0.5))(
        [Chunk(b"a" * 5 + b"b" * 5, True)]
    )
    assert (first, second) == ((Chunk(b"aaaaa", False), 0), (Chunk(b"bbbbb", True), 1))


def test_documents_are_drawn_by_their_digest_alone():
    digests = np.random.default_rng(1).integers(0, 2**64, 5000, np.uint64, endpoint=False).tolist()
    for share in (0.1, 0.5, 0.9):
        config = PrepareConfig(split="documents", train_split=share)
        drawn = Split(surveyed([9] * 5000, digests), config).by_document
        assert abs(1 - drawn.mean() - share) < 0.03
        backwards = Split(surveyed([9] * 5000, digests[::-1]), config).by_document
        assert np.array_equal(drawn, backwards[::-1])


def test_a_side_without_documents_is_refused():
    with pytest.raises(UserError, match="1 document: too short") as raised:
        Split(surveyed([100], [5]), PrepareConfig(split="documents"))
    assert "\n" not in str(raised.value)


def test_duplicates_are_counted_where_they_are_whole():
    lengths, digests = [10] * 10, [0, 1, 2, 3, 4, 0, 1, 1, 8, 2]
    assert Split(surveyed(lengths, digests), PrepareConfig(train_split=0.5)).duplicates() == (4, 5)
    # The one that the tail cuts is on neither side.
    assert Split(surveyed(lengths, digests), PrepareConfig(train_split=0.55)).duplicates() == (3, 4)
    boundary = Split(surveyed(lengths, digests, first_val=8), PrepareConfig())
    assert boundary.duplicates() == (1, 2)


def test_the_fingerprint_depends_on_documents_and_on_what_shapes_the_tokens_alone():
    texts, config = surveyed([3, 4], [7, 8]), PrepareConfig()
    same = fingerprint_of(texts, config)
    assert (
        fingerprint_of(texts, PrepareConfig(input_file=("a",), data_dir="x", overwrite=True, strict=True))
        == same
    )
    assert fingerprint_of(texts, PrepareConfig(vocab_size=300)) == same  # which bpe alone has
    others = [
        (surveyed([3, 4], [8, 7]), config),
        (surveyed([3], [7]), config),
        (surveyed([3, 4], [7, 8], first_val=1), config),
        (texts, PrepareConfig(train_split=0.8)),
        (texts, PrepareConfig(split="documents")),
        (texts, PrepareConfig(tokenizer="byte")),
        (texts, PrepareConfig(tokenizer="bpe")),
        (texts, PrepareConfig(tokenizer="bpe", vocab_size=300)),
    ]
    assert len({same, *(fingerprint_of(*other) for other in others)}) == 1 + len(others)
