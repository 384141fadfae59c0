"""Several files read as one array; a shuffle too long to be listed is a shuffle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.data import batches as data_module
from nanogpt.data.batches import BatchSampler, shuffled_numbers
from nanogpt.data.shards import Shards

quick = settings(deadline=None, derandomize=True, max_examples=60)


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_shards_read_as_the_whole(sizes, draw):
    whole = np.arange(sum(sizes), dtype=np.uint16) * 7
    shards = Shards(np.split(whole, np.cumsum(sizes)[:-1]))
    assert len(shards) == len(whole)
    assert shards.dtype == whole.dtype
    start, stop = draw.draw(st.integers(0, len(whole))), draw.draw(st.integers(0, len(whole) + 3))
    assert np.array_equal(shards[start:stop], whole[start:stop])
    places = np.array(draw.draw(st.lists(st.integers(0, len(whole) - 1), min_size=4, max_size=4))).reshape(
        2, 2
    )
    assert np.array_equal(shards[places], whole[places])
    assert int(shards[-1]) == int(whole[-1])
    assert int(shards[0]) == int(whole[0])


@quick
@given(st.integers(1, 3000), st.integers(0, 99))
def test_a_computed_shuffle_visits_everything_once(size, seed):
    order = shuffled_numbers(np.arange(size), size, np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(size))


def test_a_computed_shuffle_looks_like_one():
    size = 50_021
    order = shuffled_numbers(np.arange(size), size, np.random.default_rng(1))
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.02
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert np.abs(np.diff(order)).mean() / size == pytest.approx(1 / 3, abs=0.01)
    assert not np.array_equal(order, shuffled_numbers(np.arange(size), size, np.random.default_rng(2)))


def test_batches_of_a_long_epoch_are_disjoint_windows_each_once(monkeypatch):
    monkeypatch.setattr(data_module, "MAX_LISTED_WINDOWS", 10)
    batches = BatchSampler(np.zeros(1003, np.uint8), block_size=10, batch_size=33, seed=5)
    visits = np.concatenate([batches(step) for step in range(3)])
    assert batches.windows == 99
    assert len(set(visits.tolist())) == 99
    assert {int(start) % 10 for start in visits} == {int(visits[0]) % 10}
    assert (
        batches(1).tolist() == BatchSampler(batches.tokens, block_size=10, batch_size=33, seed=5)(1).tolist()
    )
    assert batches(4).tolist() != batches(1).tolist()
