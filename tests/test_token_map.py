"""Token files are mapped where they can be; memory, the file system and damage are told apart."""

import errno
import io
import mmap
import os
import pickle
import resource
import zipfile

import numpy as np
import pytest
import torch

from nanogpt.data import token_map
from nanogpt.data.token_map import TokenFile, open_tokens
from nanogpt.errors import UserError
from nanogpt.storage.seals import DamageError

DTYPES = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]


def saved(tmp_path, value, name="train.pt"):
    torch.save(value, tmp_path / name)
    return tmp_path / name


def tokens(dtype=np.uint16, count=5000):
    return np.random.default_rng(1).integers(0, 100, count).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 5000])
def test_what_torch_saves_is_mapped_as_torch_loads_it(tmp_path, dtype, count):
    ids = tokens(dtype, count)
    path = saved(tmp_path, torch.from_numpy(ids))
    found = open_tokens(path)
    assert isinstance(found, TokenFile)
    assert found.dtype == dtype
    assert np.array_equal(found, torch.load(path, weights_only=True).numpy())
    assert not found.flags.writeable
    places = np.array([[0, count - 1], [count // 2, 0]])
    for index in (slice(0, 3), places, -1):
        selected = found[index]
        assert not isinstance(selected, TokenFile)
        assert np.array_equal(selected, ids[index])


def test_a_part_of_a_longer_tensor_is_that_part(tmp_path):
    ids = torch.arange(100, dtype=torch.int32)
    assert open_tokens(saved(tmp_path, ids[20:50])).tolist() == list(range(20, 50))


MALFORMED = {
    "matrix": torch.zeros(4, 4, dtype=torch.uint8),
    "floats": torch.zeros(100),
    "booleans": torch.zeros(100, dtype=torch.bool),
    "sparse": torch.arange(10).to_sparse(),
    "every other": torch.arange(10)[::2],
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, dtype=torch.uint8),
    "parameter": torch.nn.Parameter(torch.zeros(4)),
    "list": [torch.zeros(4, dtype=torch.uint8)],
    "dictionary": {"a": torch.zeros(4, dtype=torch.uint8)},
    "number": 4,
    "nothing": None,
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_anything_but_a_vector_of_integers_is_refused(tmp_path, kind):
    with pytest.raises(DamageError, match="does not hold tokens"):
        open_tokens(saved(tmp_path, MALFORMED[kind]))


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_file_is_damaged_or_reads_as_numbers(tmp_path, seed):
    """Flips, zero runs and cuts anywhere in a file without a seal: one kind of error, or a vector."""
    random = np.random.default_rng(seed)
    raw = saved(tmp_path, torch.from_numpy(tokens(np.uint8, 300))).read_bytes()
    for _ in range(40):
        changed = bytearray(raw)
        place = int(random.integers(len(raw)))
        match random.integers(3):
            case 0:
                changed[place] ^= 1 << random.integers(8)
            case 1:
                changed[place : place + 30] = bytes(len(changed[place : place + 30]))
            case _:
                del changed[place:]
        (tmp_path / "changed.pt").write_bytes(changed)
        try:
            found = open_tokens(tmp_path / "changed.pt")
        except DamageError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either is right
        else:
            assert found.ndim == 1
            int(found.sum())


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("made by a pickle",)


@pytest.mark.parametrize("content", ["call", "deep", "memo", "not a pickle"])
def test_a_hostile_header_does_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    raws = {
        "call": pickle.dumps(Hostile(), protocol=2),
        "deep": b"\x80\x02" + b"(" * 60_000 + b"t" * 60_000 + b".",
        "memo": b"\x80\x02)r\xff\xff\xff\xff.",
        "not a pickle": b"\xff" * 100,
    }
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("train/data.pkl", raws[content][: token_map.MAX_HEADER_BYTES])
        archive.writestr("train/data/0", bytes(100))
    (tmp_path / "train.pt").write_bytes(raw.getvalue())
    with pytest.raises(DamageError):
        open_tokens(tmp_path / "train.pt")
    assert not (tmp_path / "made by a pickle").exists()


def refusing(monkeypatch, number, times=10**9):
    """Make mmap fail with an error of the system, so many times."""
    really, left = token_map.map_region, iter(range(times))

    def refuse(*arguments):
        if next(left, None) is None:
            return really(*arguments)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(token_map, "map_region", refuse)


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_files_cannot_be_mapped_they_are_read(tmp_path, monkeypatch, capsys, number):
    ids = tokens()
    path = saved(tmp_path, torch.from_numpy(ids))
    refusing(monkeypatch, number)
    found = open_tokens(path)
    assert np.array_equal(found, ids)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot be mapped here" in said


def test_too_little_memory_to_map_is_no_damage(tmp_path, monkeypatch):
    path = saved(tmp_path, torch.from_numpy(tokens()))
    refusing(monkeypatch, errno.ENOMEM)
    with pytest.raises(UserError, match=r"not enough memory to map .*train.pt") as raised:
        open_tokens(path)
    assert not isinstance(raised.value, DamageError)


def test_too_little_memory_to_read_is_no_damage(tmp_path, monkeypatch):
    path = saved(tmp_path, torch.from_numpy(tokens()))
    refusing(monkeypatch, errno.ENODEV)

    def refuse(*_, **__):
        raise MemoryError

    monkeypatch.setattr(token_map.np, "fromfile", refuse)
    with pytest.raises(UserError, match=r"not enough memory for .*copy the folder") as raised:
        open_tokens(path)
    assert not isinstance(raised.value, DamageError)


def test_too_many_open_files_are_allowed_or_said(tmp_path, monkeypatch):
    path = saved(tmp_path, torch.from_numpy(tokens()))
    monkeypatch.setattr(token_map, "allow_more_files", lambda: True)
    refusing(monkeypatch, errno.EMFILE, times=1)
    assert len(open_tokens(path)) == 5000
    monkeypatch.undo()
    monkeypatch.setattr(token_map, "allow_more_files", lambda: False)
    refusing(monkeypatch, errno.EMFILE)
    with pytest.raises(UserError, match="ulimit -n"):
        open_tokens(path)


def test_the_limit_of_open_files_is_raised_once(monkeypatch):
    limits = [(100, 1000)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.append(new))
    assert token_map.allow_more_files()
    assert limits[-1] == (1000, 1000)
    assert not token_map.allow_more_files()


def test_a_map_is_not_charged_as_memory(tmp_path):
    """Read-only and shared: the system need not keep memory or swap for it, whatever its size."""
    path = saved(tmp_path, torch.from_numpy(tokens(np.uint8, 1 << 20)))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        really = mmap.mmap
        patch.setattr(token_map.mmap, "mmap", lambda *a, **k: seen.append(k) or really(*a, **k))
        open_tokens(path)
    assert seen[0]["access"] == mmap.ACCESS_READ


# Changed while it is in use


def change(path, how):
    raw = path.read_bytes()
    stat = path.stat()
    if how == "cut":
        os.truncate(path, len(raw) // 2)
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "rewritten":
        with open(path, "r+b") as file:
            file.write(bytes(len(raw)))
    elif how == "replaced":
        path.with_name("other").write_bytes(bytes(10))
        os.replace(path.with_name("other"), path)
    elif how == "deleted":
        path.unlink()
    if path.exists() and how != "replaced":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 5_000_000_000))


@pytest.mark.parametrize("index", [slice(0, 10), np.array([[4999, 2]]), -1])
@pytest.mark.parametrize("how", ["cut", "emptied", "rewritten"])
def test_a_file_that_was_changed_in_place_is_no_longer_read(tmp_path, how, index):
    path = saved(tmp_path, torch.from_numpy(tokens()))
    found = open_tokens(path)
    found[index]
    change(path, how)
    with pytest.raises(UserError, match=r"train.pt was changed while it was in use"):
        found[index]


@pytest.mark.parametrize("how", ["replaced", "deleted"])
def test_a_file_whose_name_is_gone_is_read_on(tmp_path, how):
    ids = tokens()
    path = saved(tmp_path, torch.from_numpy(ids))
    found = open_tokens(path)
    change(path, how)
    assert np.array_equal(found[10:20], ids[10:20])


@pytest.mark.parametrize("same", [True, False])
def test_another_time_alone_is_no_harm_if_a_seal_says_so(tmp_path, same):
    path = saved(tmp_path, torch.from_numpy(tokens()))
    found = open_tokens(path)
    asked = []

    def verify():
        asked.append(1)
        if not same:
            raise DamageError("changed")

    found.guard.verify = verify
    change(path, "touched")
    if same:
        assert len(found[0:3]) == 3
        assert len(found[0:3]) == 3
        assert asked == [1]
    else:
        with pytest.raises(UserError, match="was changed"):
            found[0:3]


def test_ids_beyond_the_vocabulary_are_seen_where_they_are_read(tmp_path):
    path = saved(tmp_path, torch.from_numpy(np.array([1, 2, 70, 3], np.uint16)))
    found = open_tokens(path)
    found.guard.vocab_size = 70
    assert found[np.array([0, 1, 3])].tolist() == [1, 2, 3]
    with pytest.raises(UserError, match="id 70"):
        found[np.array([0, 2])]
