"""A folder has one owner: with locks or without, whatever happens to the file that holds the lock."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest

from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.errors import UserError
from nanogpt.storage import files, locking
from nanogpt.storage.locking import is_locked, lock

fcntl = pytest.importorskip("fcntl")


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks."""

    def make(number):
        def refuse(*_args):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", refuse)
        monkeypatch.setattr(files, "warned", set())

    return make


NUMBERS = [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL]


@pytest.mark.parametrize("number", NUMBERS)
def test_without_locks_a_second_owner_is_refused_and_the_lack_said_once(tmp_path, no_locks, capsys, number):
    no_locks(number)
    for _ in range(2):
        with lock(tmp_path, "busy"), pytest.raises(UserError, match="busy"):
            lock(tmp_path, "busy").__enter__()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"The file system of {tmp_path} has no locks: ")
    assert not (tmp_path / ".owner").exists()


OWNER = "import sys, time; from pathlib import Path; from nanogpt.storage.locking import write_owner_file\n"
OWNER += "write_owner_file(Path(sys.argv[1])); print('mine', flush=True); time.sleep(60)"


def test_without_locks_another_process_is_refused_until_it_dies(tmp_path, no_locks):
    no_locks(errno.ENOTSUP)
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout.readline() == "mine\n"
            with pytest.raises(UserError, match="busy"):
                lock(tmp_path, "busy").__enter__()
        finally:
            owner.kill()
            owner.wait()
    with lock(tmp_path, "busy"):
        pass


@pytest.mark.parametrize(
    "note", ["", "[1]", "{}", "[" * 100_000, '{"machine": 1, "process": -1, "start": "x"}', "other", "reused"]
)
def test_a_note_of_nobody_who_lives_is_written_over(tmp_path, no_locks, note):
    no_locks(errno.ENOTSUP)
    told = {
        "machine": locking.socket.gethostname(),
        "process": os.getpid(),
        "start": locking.process_start_time(),
    }
    if note == "other":
        note = json.dumps(told | {"machine": "another machine"})
    if note == "reused":  # the number of a process that began later
        note = json.dumps(told | {"start": told["start"] - 1000})
    (tmp_path / ".owner").write_text(note)
    with lock(tmp_path, "busy"):
        assert json.loads((tmp_path / ".owner").read_text())["process"] == os.getpid()


def test_deleting_the_lock_file_lets_nobody_in_and_the_owner_makes_it_again(tmp_path, capsys):
    with lock(tmp_path, "busy") as owner:
        owner.confirm()
        assert capsys.readouterr().err == ""
        (tmp_path / ".lock").unlink()
        with pytest.raises(UserError, match="busy"):
            lock(tmp_path, "busy").__enter__()
        owner.confirm()
        assert (tmp_path / ".lock").is_file()
        owner.confirm()
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_deleted_folder_is_owned_again(tmp_path, capsys):
    folder = tmp_path / "out"
    with lock(folder, "busy") as owner:
        shutil.rmtree(folder)
        owner.confirm()
        assert "made again" in capsys.readouterr().err
        with pytest.raises(UserError, match="busy"):
            lock(folder, "busy").__enter__()


def test_a_folder_that_another_has_taken_is_not_written_to_any_more(tmp_path):
    folder = tmp_path / "out"
    with lock(folder, "busy") as owner:
        shutil.rmtree(folder)
        with lock(folder, "busy"):
            for _ in range(2):
                with pytest.raises(UserError, match=r"another program has taken .*out: nothing of this one"):
                    owner.confirm()
        with pytest.raises(UserError, match="another program"):  # what it left there is not for this one
            owner.confirm()


def test_on_a_file_system_that_locks_no_folders_the_file_alone_is_locked(tmp_path, monkeypatch):
    real = fcntl.flock

    def refuse_folders(descriptor, how):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            raise OSError(errno.EBADF, "as NFS does")
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", refuse_folders)
    with lock(tmp_path, "busy") as owner:
        with pytest.raises(UserError, match="busy"):
            lock(tmp_path, "busy").__enter__()
        (tmp_path / ".lock").unlink()
        owner.confirm()
        with pytest.raises(UserError, match="busy"):
            lock(tmp_path, "busy").__enter__()


@pytest.mark.parametrize("name", [".lock", ".owner"])
def test_a_pipe_in_place_of_the_lock_is_one_line(tmp_path, no_locks, name):
    if name == ".owner":
        no_locks(errno.ENOTSUP)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="is not a file: delete it"):
        lock(tmp_path, "busy").__enter__()


def test_a_lock_that_fails_for_another_reason_is_an_error(tmp_path, no_locks):
    no_locks(errno.EIO)
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(tmp_path / "out").locked().__enter__()


# Looking


def test_who_looks_sees_an_owner_and_makes_nothing(tmp_path):
    folder = tmp_path / "out"
    assert not is_locked(folder)
    assert not folder.exists()
    with lock(folder, "busy"):
        assert is_locked(folder)
    assert not is_locked(folder)
    (folder / ".lock").unlink()
    os.mkfifo(folder / ".lock")
    assert not is_locked(folder)


def test_who_looks_sees_an_owner_without_locks(tmp_path, no_locks):
    no_locks(errno.ENOTSUP)
    with lock(tmp_path, "busy"):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


def test_who_looks_keeps_nobody_out(tmp_path, monkeypatch):
    """A look lasts an instant; however long that is, an owner who comes meanwhile waits."""
    monkeypatch.setattr(locking, "LOOK_SECONDS", 600.0)
    (tmp_path / ".lock").touch()
    look = locking.open_locked(tmp_path / ".lock", os.O_RDONLY, shared=True)
    assert not is_locked(tmp_path)  # another who looks is no owner
    threading.Timer(0.1, lambda: os.close(look)).start()
    with lock(tmp_path, "busy"):
        pass
