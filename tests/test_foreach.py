"""Operations on many tensors are those on each, with a number or a scalar tensor."""

import pytest
import torch

from nanogpt.training import foreach


def tensors(shapes=((3, 4), (5,), (2, 2))):
    return [torch.randn(shape) for shape in shapes]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


@pytest.mark.parametrize("number", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
def test_each_operation_is_that_on_each_tensor(number):
    ours, others = tensors(), tensors()
    plain = [t.clone() for t in ours]
    foreach.mul_(ours, number)
    foreach.add_(ours, others, number)
    foreach.lerp_(ours, others, number)
    for t, p, other in zip(ours, plain, others, strict=True):
        torch.testing.assert_close(t, (0.3 * p + 0.3 * other).lerp(other, 0.3))


@pytest.mark.parametrize("weight", [0.05, 0.9])
def test_a_skipped_end_counts_for_nothing_whatever_it_is(weight):
    ours, ends = tensors(), tensors()
    plain = [t.clone() for t in ours]
    foreach.lerp_(ours, ends, weight, skip=torch.tensor(0.0))
    for t, p, end in zip(ours, plain, ends, strict=True):
        torch.testing.assert_close(t, p.lerp(end, weight))
    before = [t.clone() for t in ours]
    broken = [
        torch.full_like(t, value) for t, value in zip(ours, (float("nan"), float("inf"), 1.0), strict=True)
    ]
    foreach.lerp_(ours, broken, weight, skip=torch.tensor(1.0))
    assert all(torch.equal(*pair) for pair in zip(ours, before, strict=True))


def test_of_no_tensors_nothing_is_asked():
    for operation in (foreach.add_, foreach.lerp_):
        operation([], [], 0.5)
        operation([], [], torch.tensor(0.5))
    foreach.mul_([], 0.5)
