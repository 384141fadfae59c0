"""What is written without PyTorch is, for PyTorch, what torch.save would have written."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.data.token_map import open_tokens
from nanogpt.storage import pt_files
from nanogpt.storage.pt_files import Stream, save

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
    ),
    max_leaves=20,
)
DTYPES = ["uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float32", "bool"]


def saved(value: object) -> io.BytesIO:
    """The file that `save` writes."""
    file = io.BytesIO()
    save(value, file)
    return io.BytesIO(file.getvalue())


@given(PLAIN)
def test_plain_values_are_those_that_were_saved(value: object) -> None:
    assert torch.load(saved(value), weights_only=True) == value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (2, 3), (2, 0, 3), (2, 3, 4, 5)])
def test_an_array_is_the_tensor_that_torch_saves(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).integers(0, 2, shape).astype(dtype)
    file = io.BytesIO()
    torch.save({"a": [torch.from_numpy(array.copy())], "b": torch.arange(3)}, file)
    ours = torch.load(saved({"a": [array], "b": np.arange(3)}), weights_only=True)
    theirs = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    (tensor,), (expected,) = ours["a"], theirs["a"]
    assert tensor.dtype == expected.dtype
    assert tensor.shape == expected.shape
    assert not array.size or tensor.stride() == expected.stride()
    assert torch.equal(tensor, expected)
    assert torch.equal(ours["b"], theirs["b"])


@pytest.mark.parametrize("large", [False, True])
def test_storages_are_aligned_and_can_be_mapped(tmp_path: Path, monkeypatch: Any, large: bool) -> None:
    """Also behind the headers of files of more than 2 GiB."""
    monkeypatch.setattr(pt_files, "ZIP64_MIN", 0 if large else 1 << 30)
    path, blocks = tmp_path / "tokens.pt", [bytes(range(200)), bytes(range(56))]
    with open(path, "wb") as file:
        save({"x": np.arange(3), "y": Stream(np.dtype(np.uint16), 128, iter(blocks))}, file)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    reader = torch._C.PyTorchFileReader(str(path))
    assert [reader.get_record_offset(f"data/{number}") % 64 for number in range(2)] == [0, 0]
    for mmap in (True, False):
        found = torch.load(path, mmap=mmap, weights_only=True)
        assert found["x"].tolist() == [0, 1, 2]
        assert found["y"].numpy().tobytes() == b"".join(blocks)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_the_memory_map_of_tokens_reads_both(
    tmp_path: Path, monkeypatch: Any, dtype: str, large: bool
) -> None:
    monkeypatch.setattr(pt_files, "ZIP64_MIN", 0 if large else 1 << 30)
    tokens = np.arange(1000).astype(dtype)
    with open(tmp_path / "ours.pt", "wb") as file:
        save(tokens, file)
    torch.save(torch.from_numpy(tokens), tmp_path / "theirs.pt")
    for name in ("ours.pt", "theirs.pt"):
        found = open_tokens(tmp_path / name)
        assert found.dtype == tokens.dtype
        assert np.array_equal(found, tokens)


def test_the_same_value_is_the_same_bytes() -> None:
    value = {"characters": "abc", "table": np.arange(7)}
    assert saved(value).getvalue() == saved(value).getvalue()


@pytest.mark.parametrize("value", [torch.zeros(1), {1, 2}, np.int64(3), b"raw", Path("a"), {"a": [object()]}])
def test_nothing_else_is_written(value: object) -> None:
    with pytest.raises(TypeError, match="is no plain type"):
        saved(value)
