"""Whether the dtype that was chosen for Muon and for training is the fastest that this card has."""

from functools import partial

import torch

from nanogpt.machine.device import seconds_of
from nanogpt.machine.precision import pick_dtype, pick_muon_dtype

SIZE, BATCH = 2048, 4
"""Products that keep a GPU busy."""


def rates(place: torch.device) -> dict[torch.dtype, float]:
    """Operations a second of large products in each dtype."""
    found: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(BATCH, SIZE, SIZE, dtype=dtype, device=place)
        times = [seconds_of(partial(torch.bmm, x, x), place) for _ in range(6)]
        found[dtype] = 2 * BATCH * SIZE**3 / min(times[1:])
    return found


def test_what_is_chosen_is_as_fast_as_anything_here(gpu_alone: torch.device) -> None:
    """bfloat16 and float16 are equally fast on most cards: a fifth of leeway."""
    measured = rates(gpu_alone)
    best = max(measured.values())
    for choice in (
        pick_dtype("auto", gpu_alone, 384),
        pick_muon_dtype("auto", gpu_alone),
    ):
        assert measured[choice.dtype] > 0.8 * best, (choice, measured)
