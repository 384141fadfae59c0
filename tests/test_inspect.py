"""What data info says of a folder, of one that cannot be written too; it compares every byte."""

import numpy as np
import pytest
import torch
from conftest import prepared

from nanogpt.data import inspect
from nanogpt.data.config import InspectConfig
from nanogpt.data.dataset import load_dataset
from nanogpt.data.inspect import main
from nanogpt.errors import UserError
from nanogpt.storage.seals import load_with_checksum

TEXT = "It was the best of times, it was the worst of times.\n" * 20


@pytest.fixture
def folder(tmp_path, capsys):
    """A prepared data folder."""
    prepared(tmp_path / "data", TEXT)
    capsys.readouterr()
    return tmp_path / "data"


def test_a_folder_that_is_only_to_be_read_is_described_all_the_same(folder, monkeypatch, capsys):
    def refuse(path):
        raise UserError(f"cannot write {path}: Read-only file system")

    monkeypatch.setattr(inspect, "atomic_write", refuse)
    assert main(InspectConfig(data_dir=str(folder))) == 0
    said = capsys.readouterr()
    assert "Tokens: 954 to train on, 106 to validate" in said.out
    assert said.err == f"No picture: cannot write {folder / 'info.png'}: Read-only file system\n"


def test_damage_anywhere_is_found(folder):
    raw = bytearray((folder / "val.pt").read_bytes())
    raw[-1] ^= 1
    (folder / "val.pt").write_bytes(raw)
    with pytest.raises(UserError, match=r"val\.pt is damaged \(its checksum"):
        main(InspectConfig(data_dir=str(folder)))


def test_a_folder_without_checksums_is_said_to_have_none(folder, capsys):
    main(InspectConfig(data_dir=str(folder)))
    assert "Checksums" not in capsys.readouterr().out
    content, _ = load_with_checksum(folder / "vocab.pt")
    torch.save(
        {key: value for key, value in content.items() if key not in ("sha256", "blocks")}, folder / "vocab.pt"
    )
    main(InspectConfig(data_dir=str(folder)))
    assert "Checksums: none" in capsys.readouterr().out


def test_the_counts_are_those_of_the_text(folder):
    loaded = load_dataset(folder)
    counts = inspect.count_tokens(loaded)
    expected = np.bincount(
        [loaded.tokenizer.chars.index(char) for char in TEXT], minlength=loaded.tokenizer.vocab_size
    )
    assert np.array_equal(counts.frequencies, expected)
