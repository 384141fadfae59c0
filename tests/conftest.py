"""What several tests share: a small text, a prepared data folder, a tiny configuration."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt.config import DataConfig, TrainConfig
from nanogpt.corpus import Source
from nanogpt.data import prepare

VERSE = "From fairest creatures we desire increase,\nThat thereby beauty's rose might never die,\n"

TINY: dict[str, Any] = {
    "block_size": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "dropout": 0.1,
    "batch_size": 8,
    "max_iters": 30,
    "learning_rate": 1e-2,
    "warmup_iters": 5,
    "eval_interval": 10,
    "log_interval": 1,
    "device": "cpu",
    "dtype": "float32",
}
"""A run of a second or less."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small are slower on two, and very slow where another process wants a core too."""
    torch.set_num_threads(1)


@pytest.fixture
def text() -> str:
    """A text that a model can learn: 40 times two lines, numbered so that no two are alike."""
    return "".join(f"{number} {VERSE}" for number in range(40))


@pytest.fixture
def data_dir(tmp_path: Path, text: str) -> Path:
    """A prepared data folder."""
    folder = tmp_path / "data"
    prepare(Source(text, "sonnet"), DataConfig(data_dir=str(folder)))
    return folder


@pytest.fixture
def config(tmp_path: Path, data_dir: Path) -> TrainConfig:
    """A tiny run on that folder."""
    return TrainConfig(**TINY, data_dir=str(data_dir), out_dir=str(tmp_path / "out"))
