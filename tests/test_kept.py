"""Kept checkpoints: spread over the training, the same after any kill, never worth the training itself."""

import math
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from nanogpt import generate, load_model
from nanogpt.checkpoint import kept
from nanogpt.checkpoint.format import Checkpoint, load_checkpoint, save_checkpoint
from nanogpt.checkpoint.kept import kept_checkpoints, kept_path, surplus
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.cli import main as cli
from nanogpt.config import TrainConfig
from nanogpt.errors import UserError
from nanogpt.storage.files import copy_file
from nanogpt.training import checkpointing, report
from nanogpt.training.fit import fit
from nanogpt.training.setup import set_up


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    """A run with four evaluations, which keeps some."""
    return replace(config, n_layer=1, max_iters=12, eval_interval=3, keep_checkpoints=4)


def found(config: TrainConfig) -> dict[int, Path]:
    return kept_checkpoints(Path(config.out_dir) / "checkpoints")


def last_step(config: TrainConfig) -> int:
    return int(load_checkpoint(Path(config.out_dir) / "last.pt").progress["step"])


# --- which ones ---


@pytest.mark.parametrize("count", [4, 5, 8, 13, 40])
def test_they_are_spread_over_the_steps_however_long_the_training_is(count: int):
    """No gap is wider than three even ones, in the square root of the step, or than an interval."""
    chance, left, best = random.Random(count), [], None
    for step in range(0, 50_000, 50):
        left.append(step)
        best = step if chance.random() < 0.3 else best
        for given_up in surplus(left, count, best):
            left.remove(given_up)
        assert {0, step, *([] if best is None else [best])} <= set(left)
        assert len(left) == min(count, step // 50 + 1)
        even = math.sqrt(step) / (count - 1)
        for one, other in pairwise(left):
            assert other - one == 50 or math.sqrt(other) - math.sqrt(one) <= 3 * even


def test_other_files_are_left_alone(tmp_path: Path):
    names = ["step-000005.pt", "step-1000000.pt", "step-000010.pt"]
    others = ["step-10.pt", "step-0000010.pt", "step-٠٠٠٠٠٣.pt", "step-x.pt", "ckpt.pt", "step-000005.pt.old"]
    for name in (*names, *others, "step-000015.pt.part"):
        (tmp_path / name).touch()
    assert list(kept_checkpoints(tmp_path)) == [5, 10, 1_000_000]
    kept.forget_after(tmp_path, 10)
    assert {path.name for path in tmp_path.iterdir()} == {names[0], names[2], *others}
    assert kept_checkpoints(tmp_path / "nowhere") == {}


# --- what they are ---


@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.5, "optimizer": "muon"}], ids=["plain", "average"])
def test_a_run_keeps_its_models_without_the_optimizer(config: TrainConfig, settings, capsys):
    config = replace(config, **settings)
    result = fit(config)
    assert list(found(config)) == [0, 3, 6, 12]
    assert "Kept checkpoints: 4, from step 0 to 12" in capsys.readouterr().out
    last = load_checkpoint(Path(config.out_dir) / "last.pt")
    newest = load_checkpoint(found(config)[12])
    assert (newest.optimizers, newest.average, newest.scaler) == ([], {}, {})
    assert newest.progress == last.progress
    for name, weight in last.weights.items():
        assert torch.equal(newest.weights[name], weight)
    best = int(load_checkpoint(Path(config.out_dir) / "ckpt.pt").progress["step"])
    assert best in found(config)
    assert load_checkpoint(found(config)[best]).progress["best_val_loss"] == result.best_val_loss


def test_they_are_sampled_from_and_started_from(config: TrainConfig, tmp_path: Path, capsys):
    fit(config)
    path = found(config)[3]
    capsys.readouterr()
    flags = ["--checkpoint", str(path), "--prompt", "From", "--num_tokens", "20", "--seed", "1"]
    assert cli.run_command("sample", [*flags, "--device", "cpu"], "nanogpt sample") == 0
    text = generate(load_model(path, "cpu"), "From", num_tokens=20, seed=1)
    assert capsys.readouterr().out.rstrip("\n") == ("From" + text).rstrip("\n")
    fit(replace(config, init_from=str(path), out_dir=str(tmp_path / "other"), max_iters=1))
    first = load_checkpoint(tmp_path / "other" / "checkpoints" / "step-000000.pt")
    for name, weight in load_checkpoint(path).weights.items():
        assert torch.equal(first.weights[name], weight)


def test_none_are_kept_unless_asked_for(config: TrainConfig):
    fit(replace(config, keep_checkpoints=0))
    assert not (Path(config.out_dir) / "checkpoints").exists()


@pytest.mark.parametrize("count", [-1, 1, 2])
def test_too_few_are_refused(count: int):
    with pytest.raises(UserError, match=f"--keep_checkpoints {count} is too"):
        TrainConfig(keep_checkpoints=count)


# --- kills, and resuming ---


class Killed(BaseException):
    """As a kill: it is caught nowhere."""


@contextmanager
def killed_at(moment: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let nothing be written or deleted from the nth time on. Yields what was before."""
    done: list[str] = []

    def counted(path: Path) -> None:
        if len(done) >= moment:
            raise Killed
        done.append(path.name)

    def save(path: Path, saved: Checkpoint) -> None:
        counted(path)
        save_checkpoint(path, saved)

    def copy(source: Path, target: Path) -> None:
        counted(target)
        copy_file(source, target)

    def unlink(path: Path, *, missing_ok: bool = False) -> None:
        if path.name.startswith("step-") and path.suffix == ".pt":
            counted(path)
        plain(path, missing_ok=missing_ok)

    plain = Path.unlink
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "save_checkpoint", save)
        patch.setattr(checkpointing, "copy_file", copy)
        patch.setattr(Path, "unlink", unlink)
        yield done


def test_killed_at_any_moment_and_resumed_a_run_has_those_of_one_that_never_stopped(
    config: TrainConfig, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(report, "plot_losses", lambda *_: None)  # which takes longer than such a run
    config = replace(config, max_iters=9, keep_checkpoints=3)
    never = replace(config, out_dir=str(tmp_path / "never"))
    with killed_at(1000, monkeypatch) as done:
        fit(never, quiet=True)
    assert len(found(never)) == 3
    assert {"step-000009.pt", "ckpt.pt", "last.pt"} <= set(done)
    for moment in range(2, len(done)):  # from when last.pt is there
        with killed_at(moment, monkeypatch), pytest.raises(Killed):
            fit(config, quiet=True)
        resumed = replace(config, resume=True)
        run = set_up(resumed, RunFolder(Path(config.out_dir)))
        run.metrics.close()
        assert max(found(config)) == run.progress.evaluated_at
        assert len(found(config)) <= 3
        fit(resumed, quiet=True)
        assert list(found(config)) == list(found(never)), (moment, done[:moment])
        for step, path in found(never).items():
            ours, theirs = load_checkpoint(found(config)[step]), load_checkpoint(path)
            assert all(torch.equal(ours.model[name], weight) for name, weight in theirs.model.items())
        shutil.rmtree(config.out_dir)


def test_a_resumed_run_may_keep_fewer_or_begin_to_keep(config: TrainConfig):
    fit(config)
    fit(replace(config, resume=True, keep_checkpoints=3, max_iters=15))
    assert len(found(config)) == 3
    fit(replace(config, resume=True, keep_checkpoints=0, max_iters=18))
    assert max(found(config)) == 15
    fit(replace(config, resume=True, keep_checkpoints=10, max_iters=21))
    assert {0, 15, 21} <= set(found(config))


def test_a_damaged_newest_checkpoint_takes_the_later_ones_along(config: TrainConfig):
    fit(config)
    folder = Path(config.out_dir)
    shutil.copy(folder / "ckpt.pt", folder / "best.pt")
    fit(replace(config, resume=True, max_iters=24, patience=1))
    shutil.copy(folder / "best.pt", folder / "ckpt.pt")
    (folder / "last.pt").write_bytes(b"damaged")
    best = int(load_checkpoint(folder / "ckpt.pt").progress["step"])
    assert max(found(config)) > best
    fit(replace(config, resume=True, max_iters=best))
    assert max(found(config)) == best


def test_no_run_resumes_from_one(config: TrainConfig):
    fit(config)
    folder = Path(config.out_dir) / "checkpoints"
    for out_dir in (folder, folder / "step-000003.pt"):
        with pytest.raises(UserError, match=r"^--resume cannot go on from .*: give the run, --out_dir ") as e:
            fit(replace(config, resume=True, out_dir=str(out_dir)))
        assert f"--out_dir {config.out_dir}, or" in str(e.value)
    for name in ("last.pt", "ckpt.pt"):
        shutil.copy(folder / "step-000003.pt", Path(config.out_dir) / name)
    with pytest.raises(UserError, match=r"without optimizer state: give the last\.pt of its run"):
        fit(replace(config, resume=True))


def test_they_are_set_aside_with_their_run(config: TrainConfig):
    fit(config)
    before = {step: path.read_bytes() for step, path in found(config).items()}
    fit(replace(config, seed=2, keep_checkpoints=0))
    assert found(config) == {}
    aside = Path(config.out_dir) / "previous" / "1" / "checkpoints"
    assert {step: path.read_bytes() for step, path in kept_checkpoints(aside).items()} == before
    fit(replace(config, overwrite=True))
    fit(replace(config, overwrite=True, keep_checkpoints=0))
    assert found(config) == {}
    assert not (Path(config.out_dir) / "previous" / "2").exists()


# --- what fails ---


def test_a_folder_that_cannot_be_written_does_not_end_the_training(
    config: TrainConfig, tmp_path: Path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(checkpointing, "kept_path", lambda folder, step: tmp_path / "file" / f"{step}.pt")
    assert fit(config).step == 12
    assert capsys.readouterr().err.count(": File exists (training goes on") == 5
    assert last_step(config) == 12


def test_a_disk_that_was_full_for_a_while_leaves_a_gap(config: TrainConfig, monkeypatch, capsys):
    def save(path: Path, saved: Checkpoint) -> None:
        if path == kept_path(path.parent, 6):
            raise UserError(f"cannot write {path}: No space left on device")
        save_checkpoint(path, saved)

    monkeypatch.setattr(checkpointing, "save_checkpoint", save)
    fit(config)
    assert capsys.readouterr().err.count("No space left on device (training goes on") == 1
    assert list(found(config)) == [0, 3, 9, 12]
