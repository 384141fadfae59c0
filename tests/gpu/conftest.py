"""What the checks on a GPU share. Skipped where there is none.

NANOGPT_TEST_DEVICE names the device: cuda (the default), cuda:1, or cpu, which runs as much of them as a CPU
can, to see that they can be run at all; that says nothing about a GPU.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanogpt.config import TrainConfig

NAME = os.environ.get("NANOGPT_TEST_DEVICE", "cuda")


@pytest.fixture(scope="session", autouse=True)
def place() -> torch.device:
    """The device under test, with its number."""
    asked = torch.device(NAME)
    if asked.type == "cpu":
        return asked
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm GPU")
    return torch.device("cuda", asked.index or 0)


@pytest.fixture
def gpu_alone(place: torch.device) -> torch.device:
    """The device, where the check means nothing on a CPU."""
    if place.type == "cpu":
        pytest.skip("means nothing on a CPU")
    return place


@pytest.fixture
def config(config: TrainConfig, place: torch.device) -> TrainConfig:
    """A tiny run on the device, by the name that a user would give: cuda, without a number."""
    return replace(config, device=NAME, compile="off", cuda_graph="off")


def numbers(config: TrainConfig, kind: str = "train_loss") -> list[float]:
    """The losses of a run, in order."""
    lines = (Path(config.out_dir) / "metrics.jsonl").read_text("utf-8").splitlines()
    return [row[kind] for row in map(json.loads, lines) if kind in row]
