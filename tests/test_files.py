"""atomic_write writes the whole file or leaves the old one, whatever goes wrong; the user gets one line."""

import errno
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from nanogpt.errors import UserError
from nanogpt.storage import files
from nanogpt.storage.files import atomic_output, atomic_write

OLD = b"the old file, whole"
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")


@pytest.fixture
def path(tmp_path):
    """A file that is already there."""
    path = tmp_path / "file.bin"
    path.write_bytes(OLD)
    return path


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def one_line(raised):
    message = str(raised.value)
    assert message.startswith("cannot write ")
    assert "\n" not in message
    return message


@contextmanager
def disk_of(size):
    """Let no file grow beyond `size` bytes: writing fails as it does on a full disk."""
    resource = pytest.importorskip("resource")  # CPython ignores the signal SIGXFSZ; the write fails
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_writes_a_new_file_and_the_folders_above_it(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file.bin"]


def test_the_old_file_stays_until_the_block_ends(path):
    with atomic_write(path) as file:
        file.write(b"new" * 100_000)
        file.flush()
        assert path.read_bytes() == OLD
    assert path.read_bytes() == b"new" * 100_000
    assert names(path.parent) == ["file.bin"]


def raise_after_half(path, error):
    with atomic_write(path) as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_a_block_that_raises_leaves_the_old_file_and_no_other(path, error):
    with pytest.raises(error):
        raise_after_half(path, error)
    assert path.read_bytes() == OLD
    assert names(path.parent) == ["file.bin"]


def test_a_block_that_raises_makes_no_new_file(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        raise_after_half(tmp_path / "file.bin", KeyboardInterrupt)
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_that_was_being_handled_outside_is_not_taken_for_the_cause(path, error):
    """Python chains it to whatever is raised meanwhile: a bug or a Ctrl-C must stay what it is."""
    try:
        raise FileNotFoundError(2, "No such file or directory")
    except FileNotFoundError:
        with pytest.raises(error):
            raise_after_half(path, error)
    assert path.read_bytes() == OLD
    assert names(path.parent) == ["file.bin"]


def test_the_bytes_are_synced_before_they_take_the_name_and_the_folder_after(path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (events.append("sync"), fsync(fd))[1])
    monkeypatch.setattr(files.os, "replace", lambda a, b: (events.append("rename"), replace(a, b))[1])
    with atomic_write(path) as file:
        file.write(b"new")
    assert events == (["sync", "rename", "sync"] if os.name == "posix" else ["sync", "rename"])


def test_what_a_killed_writer_left_is_written_over(path):
    (path.parent / (path.name + files.TEMPORARY_SUFFIX)).write_bytes(
        b"left by a killed process, longer than new"
    )
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file.bin"]


def test_below_a_file_instead_of_a_folder(path):
    with pytest.raises(UserError) as raised, atomic_write(path / "inside.bin") as file:
        file.write(b"new")
    one_line(raised)
    assert path.read_bytes() == OLD


def test_deep_below_a_file_instead_of_a_folder(path):
    with pytest.raises(UserError) as raised, atomic_write(path / "deep" / "inside.bin") as file:
        file.write(b"new")
    one_line(raised)
    assert path.read_bytes() == OLD


def test_a_folder_has_the_name(tmp_path):
    (tmp_path / "file.bin").mkdir()
    with pytest.raises(UserError) as raised, atomic_write(tmp_path / "file.bin") as file:
        file.write(b"new")
    one_line(raised)
    assert names(tmp_path) == ["file.bin"]


def test_a_folder_has_the_temporary_name(path):
    (path.parent / (path.name + files.TEMPORARY_SUFFIX)).mkdir()
    with pytest.raises(UserError) as raised, atomic_write(path) as file:
        file.write(b"new")
    one_line(raised)
    assert path.read_bytes() == OLD


def test_a_folder_that_may_not_be_written(path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(UserError, match="Permission denied") as raised, atomic_write(path) as file:
        file.write(b"new")
    assert str(path) in one_line(raised)
    assert path.read_bytes() == OLD
    assert names(path.parent) == ["file.bin"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_file_system_that_cannot_be_written():
    with pytest.raises(UserError) as raised, atomic_write(Path("/proc/nanogpt.bin")) as file:
        file.write(b"new")
    assert "/proc/nanogpt.bin" in one_line(raised)


@posix
@pytest.mark.parametrize("size", [0, 1, 4096, 100_000])
def test_a_full_disk_and_a_plain_write(path, size):
    with pytest.raises(UserError) as raised, disk_of(size), atomic_write(path) as file:
        file.write(b"x" * 1_000_000)
    assert "File too large" in one_line(raised)  # the limit's name for "no space left"
    assert path.read_bytes() == OLD
    assert names(path.parent) == ["file.bin"]


@posix
def test_a_disk_that_is_full_only_at_the_last_flush(path):
    with pytest.raises(UserError) as raised, disk_of(4), atomic_write(path) as file:
        file.write(b"12345")  # stays in Python's buffer until the block has ended
    one_line(raised)
    assert path.read_bytes() == OLD
    assert names(path.parent) == ["file.bin"]


@posix
@pytest.mark.parametrize("size", [0, 100, 4096, 1_000_000, 3_999_000, 4_000_500])
def test_a_full_disk_and_torch_save(path, size):
    content = {"tensor": torch.zeros(1_000_000), "after": [1, 2, 3]}
    with pytest.raises(UserError) as raised, disk_of(size), atomic_write(path) as file:
        torch.save(content, file)
    assert "File too large" in one_line(raised)
    assert path.read_bytes() == OLD
    assert names(path.parent) == ["file.bin"]


@posix
def test_the_limit_of_these_tests_lets_smaller_files_through(path):
    with disk_of(5_000_000), atomic_write(path) as file:
        torch.save({"tensor": torch.zeros(1_000_000)}, file)
    assert torch.load(path, weights_only=True)["tensor"].shape == (1_000_000,)


def test_two_files_in_one_folder_do_not_disturb_each_other(tmp_path):
    with atomic_write(tmp_path / "one") as one, atomic_write(tmp_path / "two") as two:
        one.write(b"1")
        two.write(b"2")
    assert (tmp_path / "one").read_bytes() == b"1"
    assert (tmp_path / "two").read_bytes() == b"2"


@posix
def test_a_process_killed_while_writing_leaves_the_old_file(path):
    child = os.posix_spawn(
        sys.executable,
        [
            sys.executable,
            "-c",
            "import sys, time; sys.modules['torch'] = None\n"  # files.py needs none, and starts at once
            "from pathlib import Path; from nanogpt.storage.files import atomic_write\n"
            "with atomic_write(Path(sys.argv[1])) as file:\n"
            "    file.write(b'half'); file.flush(); time.sleep(60)",
            str(path),
        ],
        os.environ,
    )
    temporary = path.with_name(path.name + files.TEMPORARY_SUFFIX)
    deadline = time.monotonic() + 300
    while not (temporary.exists() and temporary.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert temporary.read_bytes() == b"half"
    assert path.read_bytes() == OLD


# File systems that lack something


@pytest.fixture
def poor(monkeypatch):
    """Make a call of the operating system fail; none has been reported yet, and no pause takes time."""
    monkeypatch.setattr(files, "warned", set())
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)

    def fail(name, number, where=lambda *args: True, times=1000):
        real, left = getattr(os, name), [times]

        def call(*args, **kwargs):
            if left[0] and where(*args):
                left[0] -= 1
                raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        monkeypatch.setattr(files.os, name, call)

    return fail


def of_a_folder(descriptor):
    return os.path.isdir(f"/proc/self/fd/{descriptor}")  # noqa: PTH112


def write_twice(path):
    for content in (b"one", b"two"):
        with atomic_write(path) as file:
            file.write(content)
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["file.bin"]


@posix
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS])
@pytest.mark.parametrize("of", ["folder", "file"])
def test_without_a_sync_the_file_is_written_and_that_is_said_once(path, poor, capsys, number, of):
    poor("fsync", number, lambda fd: of_a_folder(fd) == (of == "folder"))
    write_twice(path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"The file system of {path.parent} cannot sync a {of}: a power cut may ")


@posix
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES, errno.EISDIR, errno.ENOTSUP])
def test_a_folder_that_cannot_be_opened_is_not_synced(path, poor, capsys, number):
    poor("open", number)
    write_twice(path)
    assert len(capsys.readouterr().err.splitlines()) == 1


@posix
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_sync_that_fails_on_a_broken_or_full_disk_is_an_error(path, poor, number):
    poor("fsync", number)
    with pytest.raises(UserError, match=os.strerror(number)), atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == OLD
    assert names(path.parent) == ["file.bin"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EBUSY])
def test_a_file_that_others_have_open_is_replaced_as_soon_as_they_let_go(path, poor, number):
    poor("replace", number, times=5)
    write_twice(path)


def test_a_file_that_others_never_let_go_stays_as_it_was(path, poor):
    poor("replace", errno.EACCES)
    with pytest.raises(UserError, match="Permission denied"), atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == OLD
    assert names(path.parent) == ["file.bin"]


@posix
def test_a_pipe_under_the_temporary_name_is_not_written_to(path):
    os.mkfifo(path.with_name(path.name + files.TEMPORARY_SUFFIX))
    with atomic_write(path) as file:
        file.write(b"x" * 1_000_000)
    assert path.read_bytes() == b"x" * 1_000_000


@posix
def test_a_link_under_the_temporary_name_leads_nowhere(path, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    path.with_name(path.name + files.TEMPORARY_SUFFIX).symlink_to(other)
    with atomic_write(path) as file:
        file.write(b"new")
    assert (path.read_bytes(), other.read_bytes()) == (b"new", b"precious")


@posix
def test_new_folders_are_synced_into_those_above(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "fsync_folder", synced.append)
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path / "a", tmp_path]


# A file or a folder that a library writes by itself


def write_output(path, content):
    """Write a file, or a folder of two if `content` is a dictionary."""
    with atomic_output(path) as temporary:
        assert not temporary.exists()
        if isinstance(content, dict):
            temporary.mkdir()
            for name, data in content.items():
                (temporary / name).write_bytes(data)
        else:
            temporary.write_bytes(content)


def test_an_output_is_a_file_or_a_folder_and_replaces_either(tmp_path):
    path = tmp_path / "new" / "output"
    for content in (b"a file", {"a": b"1", "b": b"2"}, {"c": b"3"}):
        if path.is_file():
            path.unlink()
        write_output(path, content)
        found = (
            {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else path.read_bytes()
        )
        assert found == content
        assert names(path.parent) == ["output"]
    assert names(tmp_path) == ["new"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_output_that_fails_leaves_the_old_folder(tmp_path, error):
    path = tmp_path / "output"
    write_output(path, {"old": OLD})

    def fail():
        with atomic_output(path) as temporary:
            temporary.mkdir()
            (temporary / "half").write_bytes(b"half")
            raise error

    with pytest.raises((UserError, KeyboardInterrupt)) as raised:
        fail()
    if isinstance(error, OSError):
        assert one_line(raised) == f"cannot write {path}: No space left on device"
    assert names(tmp_path) == ["output"]
    assert names(path) == ["old"]


def test_a_folder_with_folders_in_it_is_nothing_that_was_left_and_stays(tmp_path):
    (tmp_path / ".output.part" / "precious").mkdir(parents=True)
    (tmp_path / ".output.part" / "letter").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"the folder .*/.output.part is in the way: move it away"):
        write_output(tmp_path / "output", {"a": b"1"})
    assert names(tmp_path / ".output.part") == ["letter", "precious"]


def test_an_output_may_have_folders_that_are_named(tmp_path):
    for content in (b"1", b"2"):
        with atomic_output(tmp_path / "output", ["inner"]) as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "inner" / "a").write_bytes(content)
            (temporary / "b").write_bytes(content)
    assert names(tmp_path) == ["output"]
    assert (tmp_path / "output" / "inner" / "a").read_bytes() == b"2"
    for deep in ("other", "inner/deeper"):
        (tmp_path / ".output.part" / deep).mkdir(parents=True)
        (tmp_path / ".output.part" / "letter").write_bytes(b"precious")
        with pytest.raises(UserError, match="is in the way: move it away"):
            files.remove(tmp_path / ".output.part", ["inner"])
        assert (tmp_path / ".output.part" / "letter").read_bytes() == b"precious"
        (tmp_path / ".output.part" / deep).rmdir()


def test_every_file_of_an_output_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(files, "fsync", lambda *_: events.append("sync"))
    monkeypatch.setattr(files, "rename", lambda old, new: (events.append("rename"), os.replace(old, new)))
    write_output(tmp_path / "output", {"a": b"1", "b": b"2"})
    assert events == ["sync", "sync", "rename"]
