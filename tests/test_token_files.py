"""Bare tokens become what torch.save would have written; a preparation's state is its own or nothing."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from nanogpt.data.config import PrepareConfig
from nanogpt.data.scan import ScanResult
from nanogpt.data.token_writer import EncodingJob, write_tokens
from nanogpt.errors import UserError
from nanogpt.storage.seals import BLOCK_BYTES
from nanogpt.tokenizer.base import ByteTokenizer

DTYPES = {np.uint8: torch.uint8, np.uint16: torch.uint16, np.uint32: torch.uint32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 1000, 5_000_001])
def test_the_file_is_the_tensor_that_torch_saves(tmp_path, dtype, count):
    ids = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, count, dtype, endpoint=True)
    ids.tofile(tmp_path / "train.tokens")
    write_tokens(tmp_path / "train.tokens", tmp_path / "train.pt", dtype, 0, count)
    for mmap in (True, False):
        tensor = torch.load(tmp_path / "train.pt", mmap=mmap, weights_only=True)
        assert tensor.dtype == DTYPES[dtype]
        assert tensor.shape == (count,)
        assert np.array_equal(tensor.numpy(), ids)


@pytest.mark.parametrize("count", [1, 300_001])
def test_the_seal_is_taken_while_the_file_is_written(tmp_path, count):
    np.arange(count, dtype=np.uint32).tofile(tmp_path / "train.tokens")
    path = tmp_path / "train.pt"
    seal = write_tokens(tmp_path / "train.tokens", path, np.uint32, 0, count)
    raw = path.read_bytes()
    assert seal.sha256 == hashlib.sha256(raw).hexdigest()
    blocks = [
        hashlib.sha256(raw[start : start + BLOCK_BYTES]).digest() for start in range(0, len(raw), BLOCK_BYTES)
    ]
    assert (seal.blocks is None) == (len(blocks) == 1)
    assert seal.blocks is None or seal.blocks.tobytes() == b"".join(blocks)


def test_tokens_are_written_block_by_block(tmp_path, monkeypatch):
    """There may be more than fit into memory."""
    monkeypatch.setattr("nanogpt.data.token_writer.COPY_BYTES", 62)
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.tokens")
    write_tokens(tmp_path / "train.tokens", tmp_path / "train.pt", np.uint16, 100, 900)
    tensor = torch.load(tmp_path / "train.pt", weights_only=True)
    assert tensor.tolist() == list(range(100, 1000))


def test_tokens_that_were_cut_are_not_written_as_zeros(tmp_path):
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.tokens")
    with pytest.raises(UserError, match=r"train\.tokens was cut while it was being read"):
        write_tokens(tmp_path / "train.tokens", tmp_path / "train.pt", np.uint16, 500, 501)
    assert not (tmp_path / "train.pt").exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_of_the_tokens_is_a_file_too(tmp_path, dtype):
    ids = np.arange(200, dtype=dtype)
    ids.tofile(tmp_path / "train.tokens")
    for first, count in ((0, 1), (30, 70), (199, 1)):
        write_tokens(tmp_path / "train.tokens", tmp_path / "part.pt", dtype, first, count)
        tensor = torch.load(tmp_path / "part.pt", mmap=True, weights_only=True)
        assert np.array_equal(tensor.numpy(), ids[first : first + count])


def test_the_file_that_was_there_is_whole_until_the_new_one_is(tmp_path, monkeypatch):
    (tmp_path / "train.pt").write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    np.arange(10, dtype=np.uint8).tofile(tmp_path / "train.tokens")
    monkeypatch.setattr("nanogpt.data.token_writer.save", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_tokens(tmp_path / "train.tokens", tmp_path / "train.pt", np.uint8, 0, 10)
    assert (tmp_path / "train.pt").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"train.pt", "train.tokens"}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("text")
    return path


def begun(folder, config, text):
    """A preparation that has encoded seven tokens, and saved five of them."""
    work = EncodingJob(folder, config, [text])
    scanned = ScanResult(first_val=1)
    scanned.characters.extend([3, 4])
    scanned.digests.extend([2**64 - 1, 5])
    work.start(scanned, ByteTokenizer())
    with work.open_token_files() as files:
        for file, values, count in ((files[0], b"abcd", 3), (files[1], b"xyz", 2)):
            work.append(files, files.index(file), np.frombuffer(values[:count], np.uint8), count)
        work.batches = 1
        work.save_state(files)
        files[0].write(b"d")
        files[1].write(b"z")
    return work


def test_a_preparation_goes_on_from_what_was_saved(tmp_path, text):
    config = PrepareConfig(data_dir=str(tmp_path))
    begun(tmp_path / "preparing", config, text)
    again = EncodingJob(tmp_path / "preparing", config, [text])
    assert again.scanned is not None
    assert (again.tokens, again.bytes, again.batches) == ([3, 2], [3, 2], 1)
    assert list(again.scanned.characters) == [3, 4]
    assert list(again.scanned.digests) == [2**64 - 1, 5]
    assert again.scanned.first_val == 1
    with again.open_token_files() as files:
        files[0].write(b"!")
    assert again.token_path("train").read_bytes() == b"abc!"
    assert again.token_path("val").read_bytes() == b"xy"
    again.remove()
    assert not (tmp_path / "preparing").exists()


def test_whether_to_overwrite_makes_no_difference(tmp_path, text):
    config = PrepareConfig(data_dir=str(tmp_path))
    begun(tmp_path / "preparing", config, text)
    again = EncodingJob(tmp_path / "preparing", PrepareConfig(data_dir=str(tmp_path), overwrite=True), [text])
    assert again.tokens == [3, 2]


@pytest.mark.parametrize("change", ["settings", "files", "size", "time", "state", "tokens", "missing"])
def test_what_is_of_another_preparation_or_damaged_is_thrown_away(tmp_path, text, change):
    config, files = PrepareConfig(data_dir=str(tmp_path)), [text]
    folder = tmp_path / "preparing"
    begun(folder, config, text)
    if change == "settings":
        config = PrepareConfig(data_dir=str(tmp_path), train_split=0.8)
    elif change == "files":
        files = [text, text]
    elif change == "size":
        text.write_text("texts")
    elif change == "time":
        os.utime(text, ns=(0, 0))
    elif change == "state":
        (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:-100])
    elif change == "tokens":
        (folder / "val.tokens").write_bytes(b"x")
    else:
        (folder / "val.tokens").unlink()
    again = EncodingJob(folder, config, files)
    assert again.scanned is None
    assert again.tokens == [0, 0]
    assert not Path(folder, "train.tokens").exists()
