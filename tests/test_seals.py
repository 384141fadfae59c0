"""A seal matches the file that was written and no other; a look at some blocks sees each of them in time."""

import hashlib

import numpy as np
import pytest
import torch

from nanogpt.storage import seals
from nanogpt.storage.seals import BlockHasher, DamageError, load_with_checksum, save_with_checksum, verify


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(seals, "BLOCK_BYTES", 64)


def sealed(folder, **contents):
    """Files, and their seals."""
    found = {}
    for name, raw in contents.items():
        (folder / name).write_bytes(raw)
        sealing = BlockHasher()
        for start in range(0, len(raw), 37):
            sealing.update(raw[start : start + 37])
        found[name] = sealing.checksum()
    return found


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 1000])
def test_the_digests_are_those_of_the_whole_and_of_each_block(tmp_path, size):
    raw = np.random.default_rng(size).bytes(size)
    seal = sealed(tmp_path, a=raw)["a"]
    assert seal.sha256 == hashlib.sha256(raw).hexdigest()
    blocks = [hashlib.sha256(raw[start : start + 64]).digest() for start in range(0, size, 64)]
    if size <= 64:
        assert seal.blocks is None
    else:
        assert seal.blocks.tobytes() == b"".join(blocks)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("most", [None, 1 << 30, 64 * 40])
@pytest.mark.parametrize("change", ["nothing", "flip", "zeros", "longer", "shorter", "exchanged"])
def test_what_was_changed_is_told_from_what_was_not(tmp_path, change, most):
    """64 * 40 bytes are fewer than there are, but all blocks at the ends of files."""
    random = np.random.default_rng(7)
    files = {f"f{i}": random.bytes(200) for i in range(20)}
    found = sealed(tmp_path, **files)
    if change == "flip":  # in the last block of one
        (tmp_path / "f7").write_bytes(files["f7"][:-1] + bytes([files["f7"][-1] ^ 1]))
    elif change == "zeros":
        (tmp_path / "f7").write_bytes(bytes(20) + files["f7"][20:])
    elif change == "longer":
        (tmp_path / "f7").write_bytes(files["f7"] + bytes(100))
    elif change == "shorter":
        (tmp_path / "f7").write_bytes(files["f7"][:-1])
    elif change == "exchanged":
        (tmp_path / "f7").write_bytes(files["f8"])
        (tmp_path / "f8").write_bytes(files["f7"])
    if change == "nothing":
        verify(tmp_path, found, max_bytes=most)
    else:
        with pytest.raises(DamageError, match=r"f[78] is damaged \(its checksum does not match\)"):
            verify(tmp_path, found, max_bytes=most)


@pytest.mark.usefixtures("small_blocks")
def test_a_look_at_some_blocks_sees_each_of_them_in_the_end_and_no_more_than_it_may(tmp_path):
    found = sealed(tmp_path, a=bytes(64 * 50), b=bytes(10))
    sizes = {"a": 64 * 50, "b": 10}
    seen = set()
    for _ in range(300):
        blocks = list(seals.pick_blocks(found, sizes, 8))
        assert len(blocks) <= 8
        assert {("a", 0), ("b", 0), ("a", 49)} <= set(blocks)
        seen |= set(blocks)
    assert seen == {("a", i) for i in range(50)} | {("b", 0)}


def test_every_flip_in_a_sealed_file_is_seen(tmp_path):
    path = tmp_path / "vocab.pt"
    content = {"format": 2, "tokenizer": {"kind": "char", "chars": "abc"}, "table": np.arange(3)}
    save_with_checksum(path, content)
    found, whole = load_with_checksum(path)
    assert whole
    assert found["tokenizer"] == content["tokenizer"]
    assert torch.load(path, weights_only=True)["tokenizer"] == content["tokenizer"]  # by PyTorch alone, too
    raw = path.read_bytes()
    for place in range(len(raw)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1 << place % 8]) + raw[place + 1 :])
        try:
            _, whole = load_with_checksum(path)
        except DamageError:
            continue
        assert not whole  # the mark itself: it is taken for an older file, which has no digests


def test_a_file_of_torch_save_has_no_seal(tmp_path):
    torch.save({"format": 2}, tmp_path / "old.pt")
    assert load_with_checksum(tmp_path / "old.pt") == ({"format": 2}, False)
