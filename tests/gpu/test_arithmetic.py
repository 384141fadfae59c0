"""Whether the dtype that was chosen for Muon and for training is the fastest that this card has."""

import pytest
import torch

arithmetic = pytest.importorskip("nanogpt.precision", exc_type=ImportError)

SIZE, BATCH = 2048, 4
"""Products that keep a GPU busy."""


def rates(place: torch.device) -> dict[torch.dtype, float]:
    """Operations a second of large products in each dtype."""
    from nanogpt.device import kind_of

    found: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(BATCH, SIZE, SIZE, dtype=dtype, device=place)
        with arithmetic.alone(place) as clock:
            times: list[float] = []
            for _ in range(6):
                start = clock()
                torch.bmm(x, x)
                kind_of(place).synchronize(place)
                times.append(clock() - start)
        found[dtype] = 2 * BATCH * SIZE**3 / min(times[1:])
    return found


def test_what_is_chosen_is_as_fast_as_anything_here(gpu_alone: torch.device) -> None:
    """bfloat16 and float16 are equally fast on most cards: a fifth of leeway."""
    measured = rates(gpu_alone)
    best = max(measured.values())
    for choice in (
        arithmetic.pick_dtype("auto", gpu_alone, 384),
        arithmetic.pick_muon_dtype("auto", gpu_alone),
    ):
        assert measured[choice.dtype] > 0.8 * best, (choice, measured)
