"""A run folder has one owner, loses no earlier run, and resumes from the newest file that is whole."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanogpt.checkpoint import Checkpoint, Progress, save
from nanogpt.config import TrainConfig, UserError, to_dict
from nanogpt.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "out")


def put(path, step, **settings):
    """A small checkpoint of a run at `step`."""
    checkpoint = Checkpoint(
        config=to_dict(TrainConfig(n_layer=1, **settings)),
        vocab_size=5,
        progress=vars(Progress(step=step)),
        model={"weight": torch.full((3,), float(step))},
        average={},
        optimizers=[],
        scaler={},
        arithmetic={"device": "cpu", "dtype": "float32"},
        tokenizer={"kind": "char", "chars": "abcde"},
        fingerprint="f",
    )
    save(path, checkpoint)


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
    found = folder.newest(silent)
    assert found.progress["step"] == newest
    assert torch.equal(found.model["weight"], torch.full((3,), float(newest)))


@pytest.mark.parametrize("name", ["last", "best"])
def test_one_file_is_enough(folder, name):
    put(getattr(folder, name), 7)
    assert folder.newest(silent).progress["step"] == 7


@pytest.mark.parametrize("damaged", ["last", "best"])
def test_a_damaged_file_is_reported_and_passed_over(folder, damaged):
    put(folder.last, 20)
    put(folder.best, 10)
    damage(getattr(folder, damaged))
    reports = []
    assert folder.newest(reports.append).progress["step"] == (10 if damaged == "last" else 20)
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
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole: start without --resume"):
        folder.newest(reports.append)
    assert len(reports) == 2


@pytest.mark.parametrize("made", [True, False])
def test_no_checkpoint_at_all(folder, made):
    if made:
        folder.path.mkdir()
    with pytest.raises(
        UserError, match=r"no checkpoint to resume in .*out: start without --resume"
    ) as raised:
        folder.newest(silent)
    assert "\n" not in str(raised.value)


def test_a_half_written_file_is_no_checkpoint(folder):
    put(folder.best, 10)
    (folder.path / "last.pt.part").write_bytes(folder.best.read_bytes()[:100])
    assert folder.newest(silent).progress["step"] == 10


# The saved settings


def test_saved_settings(folder):
    assert folder.saved_config() is None
    put(folder.best, 10, seed=1)
    assert folder.saved_config() == TrainConfig(n_layer=1, seed=1)
    put(folder.last, 20, seed=2)
    assert folder.saved_config() == TrainConfig(n_layer=1, seed=2)
    folder.last.write_bytes(b"damaged")
    assert folder.saved_config() == TrainConfig(n_layer=1, seed=1)
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
        assert folder.set_aside() == folder.path / "previous" / str(number)
        assert [path.name for path in folder.path.iterdir()] == ["previous"]
    assert [tree(folder.path / "previous" / str(number)) for number in (1, 2, 3)] == runs  # nothing is lost
    assert all(len(run) == 5 for run in runs)


def test_a_number_is_never_used_twice(folder):
    for name in ("2", "10", "notes", "1x"):
        (folder.path / "previous" / name).mkdir(parents=True)
    put(folder.last, 1)
    assert folder.set_aside() == folder.path / "previous" / "11"


def test_a_part_of_a_run_is_a_run(folder):
    folder.path.mkdir()
    folder.metrics.write_text("metrics of a run killed before its first checkpoint")
    target = folder.set_aside()
    assert target == folder.path / "previous" / "1"
    assert list(tree(target)) == ["metrics.jsonl"]


def test_nothing_to_set_aside(folder):
    assert folder.set_aside() is None
    folder.path.mkdir()
    (folder.path / "notes.txt").write_text("mine")
    assert folder.set_aside() is None
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]


def test_delete_deletes_the_run_and_nothing_else(folder):
    fill(folder, 1)
    folder.set_aside()
    fill(folder, 2)
    (folder.path / "notes.txt").write_text("mine")
    assert folder.set_aside(delete=True) is None
    assert sorted(path.name for path in folder.path.iterdir()) == ["notes.txt", "previous"]
    assert len(tree(folder.path / "previous" / "1")) == 5
    assert folder.set_aside(delete=True) is None


def test_setting_aside_leaves_what_the_user_put_there(folder):
    fill(folder, 1)
    (folder.path / "notes.txt").write_text("mine")
    folder.set_aside()
    assert Path(folder.path / "notes.txt").read_text() == "mine"


def test_it_works_inside_the_lock(folder):
    fill(folder, 1)
    with folder.locked():
        folder.set_aside()
        with pytest.raises(UserError, match="another training"):
            RunFolder(folder.path).locked().__enter__()
