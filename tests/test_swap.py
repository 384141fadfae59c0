"""A data set takes the place of another: killed at any instant, one of the two is there, whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import prepared
from filelock import FileLock

from nanogpt.data import swap
from nanogpt.data.config import PrepareConfig
from nanogpt.data.dataset import load_dataset
from nanogpt.data.prepare import main
from nanogpt.errors import UserError

OLD, NEW = "It was the best of times.\n" * 20, "It was the worst of times!\n" * 30
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")


class KilledError(BaseException):
    """Stands for SIGKILL."""


class Killer:
    """Kills at the n-th call that changes the disk, and at each after it: nothing runs behind a SIGKILL."""

    def __init__(self):
        self.calls, self.last = 0, None

    def __call__(self):
        self.calls += 1
        if self.last is not None and self.calls > self.last:
            raise KilledError


watching = []
"""The killer that is at work; an audit hook cannot be taken away again."""


def watch(event, arguments):
    if not watching:
        return
    mode = arguments[2] if event == "open" else 0
    writes = event == "open" and isinstance(mode, int) and mode & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
        watching[0]()


@pytest.fixture
def killer(monkeypatch):
    """Sees every call that opens a file to write, syncs, renames or deletes."""
    if watch not in hooks:
        sys.addaudithook(watch)
        hooks.append(watch)
    found, really = Killer(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (watching and found(), really(descriptor)))
    yield found
    watching.clear()


hooks = []


def text_of(folder):
    loaded = load_dataset(folder)
    return loaded.tokenizer.decode(np.concatenate((loaded.train, loaded.val)).tolist())


def start(tmp_path, **settings):
    """A folder with the old set, and what replaces it by the new one."""
    prepared(tmp_path / "first", OLD, **settings)
    (tmp_path / "new.txt").write_text(NEW)
    return PrepareConfig(
        input_file=(str(tmp_path / "new.txt"),), data_dir=str(tmp_path / "data"), overwrite=True
    )


SHARDED = {
    "shards to one file": ({"shard_tokens": 200}, {}),
    "one file to shards": ({}, {"shard_tokens": 300}),
}


@pytest.mark.parametrize("kind", ["files", *SHARDED])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_kill_at_any_call_leaves_the_old_set_or_the_new_one(tmp_path, killer, kind):
    before, after = SHARDED.get(kind, ({}, {}))
    config = replace(start(tmp_path, **before), **after)
    folder = tmp_path / "data"
    seen = set()
    killer.last = 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "first", folder)
        killer.calls = 0
        watching.append(killer)
        try:
            main(config)
        except KilledError:
            killed = True
        else:
            killed = False
        watching.clear()
        text = text_of(folder)
        assert text in (OLD, NEW)
        seen.add((text, killed))
        if not killed:
            break
        main(config)
        assert text_of(folder) == NEW
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        assert names == {"vocab.pt", *load_names(after)}
        killer.last += 1
    assert killer.last > 20
    assert seen == {(OLD, True), (NEW, True), (NEW, False)}


def load_names(settings):
    if not settings:
        return {"train.pt", "val.pt"}
    return {"train-00000.pt", "train-00001.pt", "train-00002.pt", "val-00000.pt"}


CHILD = """
import os, signal, sys
from nanogpt.data.config import PrepareConfig
from nanogpt.data import prepare
left = int(sys.argv[3])
def watch(event, arguments):
    global left
    if event == "os.rename":
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
prepare.main(PrepareConfig(input_file=(sys.argv[1],), data_dir=sys.argv[2], overwrite=True))
"""


@posix
@pytest.mark.parametrize(("renames", "left"), [(1, OLD), (5, NEW)])
def test_a_real_kill_between_two_renames_too(tmp_path, renames, left):
    """Renames: train.pt, val.pt, vocab.pt to be whole; the journal; then each to its place."""
    start(tmp_path)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "new.txt"), str(tmp_path / "first"), str(renames)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert text_of(tmp_path / "first") == left


def journaled(tmp_path):
    """The old set, the new one beside it, and a journal."""
    folder = tmp_path / "first"
    config = start(tmp_path)
    main(replace(config, data_dir=str(tmp_path / "second")))
    new = swap.make_new_folder(folder)
    for name in ("train.pt", "val.pt", "vocab.pt"):
        shutil.copy(tmp_path / "second" / name, new / name)
    names = {"names": ["train.pt", "val.pt", "vocab.pt"], "stale": []}
    (folder / "preparing/swap.json").write_text(json.dumps(names))
    return folder


def test_whoever_opens_the_folder_finishes_a_swap(tmp_path):
    folder = journaled(tmp_path)
    assert text_of(folder) == NEW
    assert not (folder / "preparing/swap.json").exists()
    assert text_of(folder) == NEW


def test_a_swap_that_cannot_be_finished_is_one_line_and_stays_to_be_finished(tmp_path, monkeypatch):
    folder = journaled(tmp_path)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(UserError, match=r"cannot finish replacing .*Permission denied") as raised:
            load_dataset(folder)
        assert "\n" not in str(raised.value)
    assert text_of(folder) == NEW


def test_a_swap_that_another_program_is_at_is_waited_for(tmp_path, monkeypatch):
    folder = journaled(tmp_path)
    monkeypatch.setattr(swap, "WAIT_SECONDS", 0.05)
    with (
        FileLock(folder / ".lock"),
        pytest.raises(UserError, match="another program is writing to"),
    ):
        load_dataset(folder)
    assert text_of(folder) == NEW


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"names": 3, "stale": []}',
        b'{"names": ["../x"], "stale": []}',
        b"\xff",
    ],
)
def test_a_journal_that_is_none_moves_nothing(tmp_path, content):
    folder = journaled(tmp_path)
    (folder / "preparing/swap.json").write_bytes(content)
    assert text_of(folder) == OLD


@posix
def test_a_link_or_a_pipe_in_place_of_the_folder_or_the_journal_is_not_followed(tmp_path):
    folder = journaled(tmp_path)
    (folder / "preparing").rename(tmp_path / "elsewhere")
    (folder / "preparing").symlink_to(tmp_path / "elsewhere")
    assert text_of(folder) == OLD
    config = PrepareConfig(input_file=(str(tmp_path / "new.txt"),), data_dir=str(folder), overwrite=True)
    with pytest.raises(UserError, match=r"preparing is not a folder of this program: move it away"):
        main(config)
    assert (tmp_path / "elsewhere/new/train.pt").exists()
    (folder / "preparing").unlink()
    (folder / "preparing").mkdir()
    os.mkfifo(folder / "preparing/swap.json")
    assert text_of(folder) == OLD


def test_a_reader_that_comes_between_two_renames_reads_again(tmp_path, monkeypatch):
    """vocab.pt of the old set, then the files of the new one: it looks like damage, and is none."""
    config = replace(start(tmp_path), data_dir=str(tmp_path / "first"))
    from nanogpt.data import dataset

    really, done = dataset.verify, []

    def swapped(*arguments, **values):
        if not done:
            done.append(1)
            main(config)
        really(*arguments, **values)

    monkeypatch.setattr(dataset, "verify", swapped)
    assert text_of(tmp_path / "first") == NEW


def test_a_folder_in_place_of_a_file_is_refused_before_anything_is_moved(tmp_path):
    config = replace(start(tmp_path), data_dir=str(tmp_path / "first"))
    Path(tmp_path / "first/train-00007.pt").mkdir()
    with pytest.raises(UserError, match=r"train-00007.pt is a folder: move it away"):
        main(config)
    assert text_of(tmp_path / "first") == OLD
