"""A save writes the state as it was when it began, in the background; a failure is reported and made good."""

import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import accelerator
import pytest
from accelerator import CudaLike, standing_in_for
from torch import Tensor

from nanogpt.checkpoint.format import Checkpoint, load_checkpoint, save_checkpoint
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.config import TrainConfig
from nanogpt.distributed.world import ALONE, World
from nanogpt.errors import UserError
from nanogpt.storage import files
from nanogpt.training import checkpointing, memory_estimate, snapshot
from nanogpt.training.checkpointing import MAX_STRETCH, Checkpointer
from nanogpt.training.fit import fit
from nanogpt.training.results import read_result
from nanogpt.training.run import Run
from nanogpt.training.setup import set_up
from nanogpt.training.snapshot import checkpoint_of
from nanogpt.training.trainer import train_step

accelerator.register()

MODERN = {"optimizer": "muon", "ema_decay": 0.9}


class Gate:
    """Stands before every write of a checkpoint. failing: names of files whose next write fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.open.set()
        self.failing: list[str] = []
        self.threads: list[str] = []
        monkeypatch.setattr(checkpointing, "save_checkpoint", self.save)

    def save(self, path: Path, saved: Checkpoint) -> None:
        self.threads.append(threading.current_thread().name)
        assert self.open.wait(60)
        if path.name in self.failing:
            self.failing.remove(path.name)
            raise UserError(f"cannot write {path}: No space left on device")
        save_checkpoint(path, saved)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@pytest.fixture
def run(config: TrainConfig) -> Iterator[Run]:
    """A run after a step, without any file."""
    with running(config) as run:
        yield run


class running:  # noqa: N801
    """A run after a step; its files are closed at the end."""

    def __init__(self, config: TrainConfig) -> None:
        self.run = set_up(config, RunFolder(Path(config.out_dir)))

    def __enter__(self) -> Run:
        step(self.run)
        return self.run

    def __exit__(self, *_: object) -> None:
        self.run.checkpointer.close()
        self.run.metrics.close()


def step(run: Run) -> None:
    read_result(run, train_step(run))


# --- in the background ---


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("settings", [{}, MODERN], ids=["plain", "modern"])
def test_a_save_has_the_state_as_it_was_when_it_began(config, gate, tmp_path, device, settings) -> None:
    """Byte for byte as if the training had waited: tied weights are in it once."""
    with standing_in_for(CudaLike()), running(replace(config, device=device, **settings)) as run:
        save_checkpoint(tmp_path / "waited.pt", checkpoint_of(run, Tensor.detach))
        gate.open.clear()
        run.checkpointer.save_last(run)
        assert run.checkpointer.is_writing
        for _ in range(2):
            step(run)
        assert not run.folder.last.exists()
        gate.open.set()
        run.checkpointer.finish_save()
        assert run.folder.last.read_bytes() == (tmp_path / "waited.pt").read_bytes()
        assert (run.checkpointer.saved_step, gate.threads) == (1, ["save_0"])


@pytest.mark.parametrize("why", ["no room", "out of memory"])
def test_without_memory_for_a_copy_the_training_waits(run: Run, gate, monkeypatch, why: str) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    if why == "no room":
        monkeypatch.setattr(memory_estimate, "free", lambda _: 1e6)
    else:
        monkeypatch.setattr(type(run.kind), "copy_to_host", refuse)
    run.checkpointer.save_last(run)
    assert not run.checkpointer.is_writing
    assert gate.threads == ["save_0"]
    assert load_checkpoint(run.folder.last).progress["step"] == 1


def test_an_error_that_is_not_of_memory_is_a_bug(run: Run, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(type(run.kind), "copy_to_host", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run.checkpointer.save_last(run)


def test_a_save_waits_for_the_one_before(run: Run, gate) -> None:
    gate.open.clear()
    run.checkpointer.save_last(run)
    threading.Timer(0.2, gate.open.set).start()
    step(run)
    run.checkpointer.save(run)
    assert load_checkpoint(run.folder.last).progress["step"] == 2


def test_an_exception_leaves_after_the_save_is_written(config: TrainConfig, gate) -> None:
    def fail(step: int, loss: float) -> bool:
        gate.open.clear()  # the next write begins, and takes its time
        threading.Timer(0.2, gate.open.set).start()
        raise KeyError("a bug of the caller")

    with pytest.raises(KeyError):
        fit(config, fail)
    assert load_checkpoint(Path(config.out_dir) / "last.pt").progress["step"] == 10


# --- what fails ---


def test_what_fails_in_the_background_is_reported_and_the_best_loss_is_again_that_of_the_file(
    run: Run, gate, capsys
) -> None:
    run.progress.best_val_loss = 3.0
    run.checkpointer.save_last(run, best=True)
    run.checkpointer.try_finish_save()
    step(run)
    gate.failing = ["ckpt.pt"]
    run.progress.best_val_loss = 2.0
    run.checkpointer.save_last(run, best=True)
    assert not run.checkpointer.try_finish_save()
    assert "ckpt.pt: No space left on device (training goes on" in capsys.readouterr().err
    assert run.progress.best_val_loss == 3.0
    assert load_checkpoint(run.folder.best).progress["step"] == 1
    assert run.checkpointer.is_due(1e9)  # last.pt, which is not to hold a best loss that no file has
    run.checkpointer.save(run)
    assert load_checkpoint(run.folder.last).progress["best_val_loss"] == 3.0
    assert not run.checkpointer.is_due(1e9)


def test_a_best_checkpoint_that_is_in_place_counts_even_if_last_pt_is_not(run, monkeypatch, capsys) -> None:
    def refuse(*_: object) -> None:
        raise UserError("last.pt is in use")

    monkeypatch.setattr(checkpointing, "copy_file", refuse)
    run.progress.best_val_loss = 2.0
    run.checkpointer.save_last(run, best=True)
    assert not run.checkpointer.try_finish_save()
    assert "last.pt is in use (training goes on" in capsys.readouterr().err
    assert run.progress.best_val_loss == 2.0
    assert (run.checkpointer.saved_step, run.checkpointer.last_progress) == (1, None)


def test_a_best_checkpoint_that_fails_costs_the_evaluation_after_it_nothing(config, gate, capsys) -> None:
    """That one is compared with the ckpt.pt that is there."""
    gate.failing = ["ckpt.pt"]
    result = fit(config)
    assert capsys.readouterr().err.count("No space left") == 1
    best, last = (load_checkpoint(Path(config.out_dir) / name) for name in ("ckpt.pt", "last.pt"))
    assert best.progress["best_val_loss"] == last.progress["best_val_loss"] == result.best_val_loss
    assert last.progress["step"] == 30


# --- one content, two files ---


def test_at_a_best_evaluation_both_files_have_the_same_content(run: Run) -> None:
    best, last = run.folder.best, run.folder.last
    run.checkpointer.save_last(run, best=True)
    run.checkpointer.finish_save()
    assert best.read_bytes() == last.read_bytes()
    assert not best.samefile(last)  # damage to one is not damage to the other
    before = best.read_bytes()
    step(run)
    run.checkpointer.save(run)
    assert (load_checkpoint(best).progress["step"], load_checkpoint(last).progress["step"]) == (1, 2)
    assert best.read_bytes() == before
    assert {path.name for path in run.folder.path.iterdir() if path.suffix == ".part"} == set()


def test_a_copy_that_finds_no_room_leaves_the_old_file(run: Run, monkeypatch, capsys) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run.checkpointer.save(run)
    before = run.folder.last.read_bytes()
    monkeypatch.setattr(files.shutil, "copyfileobj", refuse)
    run.checkpointer.save_last(run, best=True)
    assert not run.checkpointer.try_finish_save()
    assert "last.pt: No space left on device" in capsys.readouterr().err
    assert run.folder.last.read_bytes() == before


# --- how often ---


@pytest.mark.parametrize(
    ("seconds", "held_up", "interval"),
    [(60, 0.0, 60), (60, 1.0, 60), (60, 2.0, 100), (60, 1e3, 60 * MAX_STRETCH), (0, 5.0, 0), (600, 5.0, 600)],
)
def test_slow_saves_are_rarer(monkeypatch, seconds: float, held_up: float, interval: float) -> None:
    """At most 2 % of the time, at most ten times the interval asked for; 0 is after every update."""
    now = 1000.0
    monkeypatch.setattr(checkpointing.time, "perf_counter", lambda: now)
    checkpointer = Checkpointer(RunFolder(Path("out")), ALONE)
    checkpointer.held_up = held_up
    if interval:
        now += interval - 0.01
        assert not checkpointer.is_due(seconds)
    now += 0.02
    assert checkpointer.is_due(seconds)
    checkpointer.world = World(1, 2)  # the first process, which writes, says so for all
    assert not checkpointer.is_due(seconds)


def test_the_time_that_a_save_holds_up_is_counted(run: Run, gate, monkeypatch) -> None:
    monkeypatch.setattr(snapshot, "fits_in_main_memory", lambda _: False)
    gate.open.clear()
    threading.Timer(0.2, gate.open.set).start()
    run.checkpointer.save_last(run)
    assert 0.1 < run.checkpointer.held_up < 10
    assert math.isfinite(run.checkpointer.saved_at)
