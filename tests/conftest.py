"""What several tests share: a small text, a prepared data folder, a tiny configuration."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are slower on two, here and in children

if not any(map(shutil.which, ("cc", "gcc", "clang"))):
    os.environ["NANOGPT_NATIVE"] = "0"  # else sampling says each time that there is no compiler

import pytest
import torch
import torch.compiler.config

from nanogpt.config import TrainConfig
from nanogpt.data.config import PrepareConfig
from nanogpt.data.dataset import Dataset, load_dataset
from nanogpt.data.prepare import main as prepare
from nanogpt.native.build import BuildError
from nanogpt.text.corpus import Corpus
from nanogpt.text.documents import SkipReport
from nanogpt.text.options import ReadOptions

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
def called_as_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advice names commands as this program was called, which is not to depend on how pytest was."""
    monkeypatch.setattr(sys, "argv", ["test.py"])


torch.compiler.config.cache_key_tag = torch.backends.cpu.get_cpu_capability()  # as train.compile_model says


@pytest.fixture
def pytorch_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """No steps in C: a test watches what PyTorch computes."""
    monkeypatch.setattr("nanogpt.native.step.library", lambda: BuildError("a test switches them off"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small are slower on two, and very slow where another process wants a core too."""
    torch.set_num_threads(1)


def prepared(folder: Path, text: str, **settings: Any) -> Dataset:
    """Write a text to a file beside `folder`, prepare the folder from it, and open it."""
    path = folder.with_name(f"{folder.name}.txt")
    path.write_bytes(text.encode("utf-8"))
    prepare(PrepareConfig(input_file=(str(path),), data_dir=str(folder), **settings))
    return load_dataset(folder)


def tiny_run(folder: Path, text: str, **settings: Any) -> Path:
    """Train a tiny model on the bytes of a text, so that a character is in several tokens: its run folder."""
    from nanogpt.training.fit import fit

    prepared(folder / "data", text, tokenizer="byte")
    folders = {"data_dir": str(folder / "data"), "out_dir": str(folder / "out")}
    small = {"n_layer": 1, "n_head": 2, "n_embd": 32, "batch_size": 8, "device": "cpu", "dtype": "float32"}
    fit(TrainConfig(**folders, **{**small, **settings}), quiet=True)
    return folder / "out"


@pytest.fixture(scope="module")  # while it runs, no other test of the process can run an event loop
def browser() -> Iterator[Any]:
    """Headless Chromium, or the test is skipped."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("Chromium is not installed")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path)
        yield started
        started.close()


def texts_in(path: Path, raw: str | bytes, text_field: str = "text") -> tuple[list[str], SkipReport]:
    """The texts of a file, and the report, whose lines begin behind the file's name."""
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    report = SkipReport()
    found, waiting = [], b""
    for piece, ends in Corpus((path,), ReadOptions(text_field)).chunks(report):
        waiting += piece
        if ends:
            found.append(waiting.decode())
            waiting = b""
    assert report.broken_count == len(report.broken)
    report.broken = [line.removeprefix(str(path)) for line in report.broken]
    report.notes = [line.removeprefix(f"{path}: ") for line in report.notes]
    return found, report


@pytest.fixture
def text() -> str:
    """A text that a model can learn: 40 times two lines, numbered so that no two are alike."""
    return "".join(f"{number} {VERSE}" for number in range(40))


@pytest.fixture
def data_dir(tmp_path: Path, text: str) -> Path:
    """A prepared data folder."""
    folder = tmp_path / "data"
    prepared(folder, text)
    return folder


@pytest.fixture
def config(tmp_path: Path, data_dir: Path) -> TrainConfig:
    """A tiny run on that folder."""
    return TrainConfig(**TINY, data_dir=str(data_dir), out_dir=str(tmp_path / "out"))
