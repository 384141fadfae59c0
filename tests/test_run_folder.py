"""A run folder has one owner, loses no earlier run, and resumes from the newest valid file."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanogpt.checkpoint import run_dir
from nanogpt.checkpoint.format import Checkpoint, Progress, save_checkpoint
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.config import TrainConfig, model_config, to_dict
from nanogpt.errors import UserError
from nanogpt.model.gpt import GPT
from nanogpt.storage import files


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "out")


def small(**settings):
    """Settings of a very small model."""
    return TrainConfig(n_layer=1, n_head=1, n_embd=2, block_size=2, **settings)


def put(path, step, **settings):
    """A small checkpoint of a run at `step`, which is what all its weights are."""
    config = small(**settings)
    model = GPT(model_config(config, 5)).state_dict()
    checkpoint = Checkpoint(
        config=to_dict(config),
        vocab_size=5,
        progress=vars(Progress(step=step)),
        model={name: torch.full_like(tensor, float(step)) for name, tensor in model.items()},
        average={},
        optimizers=[],
        scaler={},
        precision={"device": "cpu", "dtype": "float32"},
        tokenizer={"kind": "char", "chars": "abcde"},
        fingerprint="f",
    )
    save_checkpoint(path, checkpoint)


def damage(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def tree(folder):
    """Every file under a folder and what is in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def silent(line):
    pytest.fail(f"nothing to report, but: {line}")


# The lock


def test_a_second_owner_is_refused(folder):
    with folder.locked():
        with pytest.raises(UserError, match=r"another training is writing to .*out: use another") as raised:
            RunFolder(folder.path).locked().__enter__()
        assert "\n" not in str(raised.value)
    with RunFolder(folder.path).locked():  # given back
        pass


def test_the_lock_is_given_back_when_the_owner_fails(folder):
    def fail():
        with folder.locked():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with folder.locked():
        pass


OWNER = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("mine", flush=True)
time.sleep(60)
"""


def test_another_process_is_refused_too_and_its_death_frees_the_folder(folder):
    folder.path.mkdir()
    command = [sys.executable, "-c", OWNER, str(folder.path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout.readline() == "mine\n"
            with pytest.raises(UserError, match="another training"):
                folder.locked().__enter__()
        finally:
            owner.kill()
            owner.wait()
    with folder.locked():
        pass


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_folder_that_cannot_be_made(tmp_path, below):
    (tmp_path / "file").write_bytes(b"not a folder")
    with pytest.raises(UserError, match=r"--out_dir .* cannot be written") as raised:
        RunFolder(tmp_path / "file" / below).locked().__enter__()
    assert "\n" not in str(raised.value)
    assert (tmp_path / "file").read_bytes() == b"not a folder"


def test_two_folders_have_two_owners(tmp_path):
    with RunFolder(tmp_path / "a").locked(), RunFolder(tmp_path / "b").locked():
        pass


# The newest checkpoint


@pytest.mark.parametrize(("last", "best", "newest"), [(20, 10, 20), (10, 20, 20), (10, 10, 10), (9, 10, 10)])
def test_the_most_steps_win(folder, last, best, newest):
    put(folder.last, last)
    put(folder.best, best)
    found = folder.newest_valid(silent)
    assert found.progress["step"] == newest
    assert torch.equal(found.model["final_norm.bias"], torch.full((2,), float(newest)))


@pytest.mark.parametrize("name", ["last", "best"])
def test_one_file_is_enough(folder, name):
    put(getattr(folder, name), 7)
    assert folder.newest_valid(silent).progress["step"] == 7


@pytest.mark.parametrize("damaged", ["last", "best"])
def test_a_damaged_file_is_reported_and_passed_over(folder, damaged):
    put(folder.last, 20)
    put(folder.best, 10)
    damage(getattr(folder, damaged))
    reports = []
    assert folder.newest_valid(reports.append).progress["step"] == (10 if damaged == "last" else 20)
    line, consequence = reports
    assert consequence == f"Going on from step {10 if damaged == 'last' else 20} instead"
    assert str(getattr(folder, damaged)) in line
    assert "passing it over" in line
    assert "\n" not in line


def test_nothing_but_damaged_files(folder):
    put(folder.last, 20)
    put(folder.best, 10)
    damage(folder.last)
    damage(folder.best)
    reports = []
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged: start without --resume"):
        folder.newest_valid(reports.append)
    assert len(reports) == 2


@pytest.mark.parametrize("made", [True, False])
def test_no_checkpoint_at_all(folder, made):
    if made:
        folder.path.mkdir()
    with pytest.raises(
        UserError, match=r"no checkpoint to resume in .*out: start without --resume"
    ) as raised:
        folder.newest_valid(silent)
    assert "\n" not in str(raised.value)


def test_a_half_written_file_is_no_checkpoint(folder):
    put(folder.best, 10)
    (folder.path / "last.pt.part").write_bytes(folder.best.read_bytes()[:100])
    assert folder.newest_valid(silent).progress["step"] == 10


# The saved settings


def test_saved_settings(folder):
    assert folder.saved_config() is None
    put(folder.best, 10, seed=1)
    assert folder.saved_config() == small(seed=1)
    put(folder.last, 20, seed=2)
    assert folder.saved_config() == small(seed=2)
    folder.last.write_bytes(b"damaged")
    assert folder.saved_config() == small(seed=1)
    folder.best.write_bytes(b"damaged")
    assert folder.saved_config() is None


# Earlier runs


def fill(folder, number):
    """A complete run, recognisable by its number."""
    put(folder.last, number)
    put(folder.best, number)
    folder.metrics.write_text(f"metrics {number}")
    folder.plot.write_text(f"plot {number}")
    folder.runs.mkdir()
    (folder.runs / "events").write_text(f"events {number}")


def test_earlier_runs_are_kept_under_rising_numbers(folder):
    runs = []
    for number in (1, 2, 3):
        fill(folder, number)
        runs.append({name: raw for name, raw in tree(folder.path).items() if not name.startswith("previous")})
        assert folder.archive_previous() == folder.path / "previous" / str(number)
        assert [path.name for path in folder.path.iterdir()] == ["previous"]
    assert [tree(folder.path / "previous" / str(number)) for number in (1, 2, 3)] == runs  # nothing is lost
    assert all(len(run) == 5 for run in runs)


def test_a_number_is_never_used_twice(folder):
    for name in ("2", "10", "notes", "1x"):
        (folder.path / "previous" / name).mkdir(parents=True)
    put(folder.last, 1)
    assert folder.archive_previous() == folder.path / "previous" / "11"


def test_a_part_of_a_run_is_a_run(folder):
    folder.path.mkdir()
    folder.metrics.write_text("metrics of a run killed before its first checkpoint")
    target = folder.archive_previous()
    assert target == folder.path / "previous" / "1"
    assert list(tree(target)) == ["metrics.jsonl"]


def test_nothing_to_set_aside(folder):
    assert folder.archive_previous() is None
    folder.path.mkdir()
    (folder.path / "notes.txt").write_text("mine")
    assert folder.archive_previous() is None
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]


def test_delete_deletes_the_run_and_nothing_else(folder):
    fill(folder, 1)
    folder.archive_previous()
    fill(folder, 2)
    (folder.path / "notes.txt").write_text("mine")
    assert folder.archive_previous(delete=True) is None
    assert sorted(path.name for path in folder.path.iterdir()) == ["notes.txt", "previous"]
    assert len(tree(folder.path / "previous" / "1")) == 5
    assert folder.archive_previous(delete=True) is None


def test_setting_aside_leaves_what_the_user_put_there(folder):
    fill(folder, 1)
    (folder.path / "notes.txt").write_text("mine")
    folder.archive_previous()
    assert Path(folder.path / "notes.txt").read_text() == "mine"


def test_it_works_inside_the_lock(folder):
    fill(folder, 1)
    with folder.locked():
        folder.archive_previous()
        with pytest.raises(UserError, match="another training"):
            RunFolder(folder.path).locked().__enter__()


# Cut short


class Killed(BaseException):
    """What no handler expects, as a kill."""


@contextlib.contextmanager
def killed_at(number, call="replace"):
    """Let the process die before one of its renames (or of other calls)."""
    left, real = [number], getattr(files.os, call)

    def counted(*args, **kwargs):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(files.os, call, counted)
        yield


def newest_step(folder):
    """Where --resume goes on, and what it takes its settings from."""
    assert RunFolder(folder.path).saved_config() == small(seed=20)
    with folder.locked():
        return folder.newest_valid(silent).progress["step"]


@pytest.fixture
def unequal(folder):
    """A run whose newest state is not its best."""
    put(folder.last, 20, seed=20)
    put(folder.best, 10, seed=10)
    folder.metrics.write_text("metrics")
    folder.plot.write_text("plot")
    folder.runs.mkdir()
    (folder.runs / "events").write_text("events")
    return folder


RENAMES = 6
"""Five files and folders, and then the folder they were gathered in."""


@pytest.mark.parametrize("delete", [False, True])
@pytest.mark.parametrize("back", range(6))
@pytest.mark.parametrize("number", range(RENAMES))
def test_a_run_whose_move_was_killed_anywhere_is_resumed_whole(unequal, number, back, delete):
    before = tree(unequal.path)
    with killed_at(number):
        unequal.archive_previous(delete=delete)
    with killed_at(back), unequal.locked():  # and on the way back, too
        pass
    assert newest_step(unequal) == 20
    assert {name: raw for name, raw in tree(unequal.path).items() if name != ".lock"} == before


@pytest.mark.parametrize("number", range(RENAMES))
def test_a_new_run_finishes_a_move_that_was_killed_anywhere(unequal, number):
    before = tree(unequal.path)
    with killed_at(number):
        unequal.archive_previous()
    with unequal.locked():
        assert unequal.archive_previous() == unequal.path / "previous" / "1"
    assert tree(unequal.path / "previous" / "1") == before
    assert sorted(path.name for path in unequal.path.iterdir()) == [".lock", "previous"]


def test_the_move_has_as_many_renames_as_these_tests_know(unequal):
    with killed_at(RENAMES - 1):
        unequal.archive_previous()
        pytest.fail("not killed")
    with killed_at(RENAMES):
        unequal.archive_previous()
        return
    pytest.fail("killed")


def test_a_deletion_that_was_killed_leaves_no_run_and_is_finished_by_the_next(unequal):
    with killed_at(0, call="unlink"):
        unequal.archive_previous(delete=True)
    with unequal.locked(), pytest.raises(UserError, match="no checkpoint to resume"):
        unequal.newest_valid(silent)
    unequal.archive_previous()
    assert [path.name for path in unequal.path.iterdir()] == [".lock"]


def test_two_runs_in_one_folder_are_kept_apart(unequal, capsys):
    with killed_at(RENAMES - 1):
        unequal.archive_previous()
    put(unequal.last, 5)
    with unequal.locked():
        assert unequal.newest_valid(silent).progress["step"] == 5
    assert "Files of two runs" in capsys.readouterr().err
    assert len(tree(unequal.path / "previous" / "1")) == 5


def test_the_move_is_synced(unequal, monkeypatch):
    synced = []
    monkeypatch.setattr(run_dir, "fsync_folder", synced.append)
    unequal.archive_previous()
    assert synced == [unequal.moving, unequal.path / "previous", unequal.path]


# What is no file


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")
def test_pipes_in_place_of_files_hang_nothing(folder):
    folder.path.mkdir()
    for path in (folder.last, folder.best, folder.job, folder.metrics, folder.plot):
        os.mkfifo(path)
    assert folder.saved_config() is None
    assert not folder.is_restart_of(TrainConfig(), "job", restarted=True)
    with folder.locked(), pytest.raises(UserError, match="no checkpoint to resume"):
        folder.newest_valid(silent)
    put(folder.path / "last", 1)
    (folder.path / "last").replace(folder.last)
    assert not folder.is_restart_of(small(), "job", restarted=False)
    assert folder.archive_previous() == folder.path / "previous" / "1"
    assert sorted(path.name for path in folder.path.iterdir()) == [".job", ".lock", "previous"]
