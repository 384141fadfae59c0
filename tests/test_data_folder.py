"""Whatever is in a data folder: it loads whole, or one line says what is wrong; nothing waits."""

import json
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, prepared

from nanogpt.config import TrainConfig
from nanogpt.data import dataset
from nanogpt.data.batches import BatchLoader
from nanogpt.data.dataset import load_dataset
from nanogpt.errors import UserError
from nanogpt.storage import seals
from nanogpt.storage.seals import load_with_checksum, save_with_checksum
from nanogpt.training import trainer
from nanogpt.training.fit import fit

TEXT = "It was the best of times, it was the worst of times.\n" * 20
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")


@pytest.fixture
def folder(tmp_path):
    """A prepared data folder."""
    prepared(tmp_path / "data", TEXT)
    return tmp_path / "data"


def refused(folder, match=None, **values):
    """One line, with advice."""
    with pytest.raises(UserError, match=match) as raised:
        load_dataset(folder, **values)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 1500
    return message


def loads(folder, most):
    """Whether it does."""
    try:
        load_dataset(folder, verify_bytes=most)
    except UserError:
        return False
    return True


# Damage


@pytest.fixture
def sharded(tmp_path):
    """A prepared data folder of several shards."""
    prepared(tmp_path / "data", TEXT, shard_tokens=200)
    return tmp_path / "data"


@pytest.mark.parametrize("name", ["train-00001.pt", "val-00000.pt"])
@pytest.mark.parametrize("change", ["flip", "zeros"])
def test_flipped_bits_and_zeros_in_the_tokens_are_seen(sharded, name, change):
    raw = bytearray((sharded / name).read_bytes())
    place = 600
    raw[place : place + 8] = (
        bytes(8) if change == "zeros" else bytes([raw[place] ^ 16, *raw[place + 1 : place + 8]])
    )
    (sharded / name).write_bytes(raw)
    refused(sharded, rf"{name} is damaged \(its checksum does not match\): prepare it with: .*--overwrite")


def test_a_file_of_another_text_of_the_same_length_is_seen(folder, tmp_path):
    prepared(tmp_path / "other", TEXT.replace("best", "most").replace("worst", "wasps"))
    assert (tmp_path / "other/train.pt").stat().st_size == (folder / "train.pt").stat().st_size
    shutil.copy(tmp_path / "other/train.pt", folder / "train.pt")
    refused(folder, r"train\.pt is damaged \(its checksum")


def test_exchanged_shards_are_seen(sharded):
    (sharded / "train-00000.pt").rename(sharded / "x")
    (sharded / "train-00001.pt").rename(sharded / "train-00000.pt")
    (sharded / "x").rename(sharded / "train-00001.pt")
    refused(sharded, r"train-0000.\.pt is damaged \(its checksum")


def test_every_changed_byte_of_the_vocabulary_is_seen(folder):
    raw = (folder / "vocab.pt").read_bytes()
    whole = load_dataset(folder)
    for place in range(0, len(raw), 7):
        (folder / "vocab.pt").write_bytes(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
        refused(folder, r"vocab\.pt is damaged")
    (folder / "vocab.pt").write_bytes(raw)
    assert load_dataset(folder).fingerprint == whole.fingerprint


def test_a_resume_sees_damage_and_goes_on_when_it_is_mended(folder, tmp_path):
    config = TrainConfig(**{**TINY, "max_iters": 4}, data_dir=str(folder), out_dir=str(tmp_path / "out"))
    fit(config)
    raw = (folder / "train.pt").read_bytes()
    (folder / "train.pt").write_bytes(raw[:700] + bytes(30) + raw[730:])
    again = replace(config, resume=True, max_iters=6)
    with pytest.raises(UserError, match=r"train\.pt is damaged"):
        fit(again)
    (folder / "train.pt").write_bytes(raw)
    assert fit(again).step == 6


def test_of_a_large_folder_some_blocks_are_compared_and_data_info_compares_all(tmp_path, monkeypatch):
    monkeypatch.setattr(seals, "BLOCK_BYTES", 64)
    prepared(tmp_path / "data", TEXT)
    path = tmp_path / "data/train.pt"
    raw = path.read_bytes()
    size = len(raw) + (tmp_path / "data/val.pt").stat().st_size
    path.write_bytes(raw[:-1] + b"\x01")  # in the last block
    refused(tmp_path / "data", "checksum", verify_bytes=size // 2)
    path.write_bytes(raw[:800] + bytes([raw[800] ^ 1]) + raw[801:])
    assert {loads(tmp_path / "data", size // 2) for _ in range(60)} == {True, False}
    refused(tmp_path / "data", "checksum", verify_bytes=None)


# Changed during a training


@pytest.mark.parametrize("name", ["train", "val"])
@pytest.mark.parametrize("change", ["cut", "rewritten"])
def test_a_file_changed_during_a_training_ends_it_and_no_wrong_loss_is_recorded(
    folder, tmp_path, monkeypatch, name, change
):
    config = TrainConfig(**TINY, data_dir=str(folder), out_dir=str(tmp_path / "out"))
    path, really = folder / f"{name}.pt", trainer.train_step

    def step(run):
        if run.progress.step == 12:
            stat = path.stat()
            if change == "cut":
                os.truncate(path, 100)
            else:
                with open(path, "r+b") as file:
                    file.seek(600)
                    file.write(bytes(range(40)))
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
        return really(run)

    monkeypatch.setattr(trainer, "train_step", step)
    with pytest.raises(UserError, match=rf"{name}\.pt was changed while it was in use"):
        fit(config)
    lines = map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "val_loss" in line] == [10]  # none at 20


def test_a_new_set_beside_a_training_disturbs_it_in_nothing(folder, tmp_path):
    before = load_dataset(folder)
    first = before.train[:50].tolist()
    prepared(folder, "Something else entirely, and longer.\n" * 60, overwrite=True)
    assert before.train[:50].tolist() == first
    assert before.train[np.arange(50)].tolist() == first
    assert load_dataset(folder).train[:50].tolist() != first


# Malformed content


VALUES = [
    None,
    0,
    -1,
    1.5,
    True,
    "x",
    "",
    [],
    ["x"],
    {},
    {"train": 1},
    {"train": 0, "val": 0},
    torch.zeros(2),
    b"x",
]
KEYS = [
    "format",
    "tokenizer",
    "fingerprint",
    "arguments",
    "characters",
    "documents",
    "tokens",
    "bytes",
    "shards",
]
KEYS += ["sha256", "blocks", "source"]
TOKENIZERS = [
    {"kind": "char"},
    {"kind": "char", "chars": 5},
    {"kind": "char", "chars": "ab"},
    {"kind": "char", "chars": ["a", 7]},
    {"kind": "bpe"},
    {"kind": "bpe", "tokenizer.json": "{}"},
    {"kind": "bpe", "tokenizer.json": "no"},
    {"kind": "bpe", "tokenizer.json": '{"model": {"vocab": {"a": -5}, "merges": []}}'},
    {"kind": "bpe", "tokenizer.json": '{"model": {"vocab": {"a": 99999999999999}, "merges": []}}'},
    {"kind": "tokenizer.json", "tokenizer.json": "[]"},
    {"kind": "tokenizer.json", "tokenizer.json": 7},
    {"kind": ["char"], "chars": "ab"},
    {"kind": "w\nx"},
]
DICTIONARIES = [
    ("shards", {"train": 0}),
    ("shards", {"train": 0, "val": 1}),
    ("shards", {"train": 2.0, "val": 1}),
    ("shards", {"train": 10**12, "val": 1}),
    ("tokens", {"train": "954", "val": 106}),
    ("tokens", {"train": 954, "val": 107}),
    ("bytes", {"train": 954}),
    ("bytes", {"train": None, "val": None}),
    ("sha256", {"train.pt": "0" * 64}),
    ("sha256", {"train.pt": "0" * 64, "val.pt": "no"}),
    ("sha256", {"train.pt": "0" * 64, "val.pt": 3}),
    ("sha256", {"../x": "0" * 64, "val.pt": "0" * 64}),
    ("blocks", {"train.pt": torch.zeros(2)}),
    ("blocks", {"train.pt": torch.zeros(2, 32)}),
    ("blocks", {"other.pt": torch.zeros(2, 32, dtype=torch.uint8)}),
]
CHANGES = [(key, value) for key in KEYS for value in VALUES]
CHANGES += [("tokenizer", value) for value in TOKENIZERS] + DICTIONARIES


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("key", [*KEYS, "nothing"])
def test_a_vocabulary_with_wrong_content_loads_whole_or_is_one_line(folder, key, sealed):
    content, _ = load_with_checksum(folder / "vocab.pt")
    if not sealed:
        content = {name: value for name, value in content.items() if name not in ("sha256", "blocks")}
    write = (
        partial(save_with_checksum, save=torch.save)
        if sealed
        else lambda path, value: torch.save(value, path)
    )
    changes = [{**content, name: value} for name, value in CHANGES if name == key]
    changes.append({name: value for name, value in content.items() if name != key})
    loaded = 0
    for changed in changes:
        write(folder / "vocab.pt", changed)
        try:
            found = load_dataset(folder)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either is right
        else:
            loaded += 1
            assert found.tokenizer.decode(np.concatenate((found.train, found.val)).tolist()) == TEXT
            assert found.bits_per_byte(1.0) is None or found.bits_per_byte(1.0) > 0
    assert loaded < len(changes) or key in ("arguments", "documents", "source", "nothing")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"fingerprint": None}, r"fingerprint: None"),
        ({"tokenizer": None}, "tokenizer"),
        ({"tokenizer": {}}, "unknown tokenizer"),
        ({"shards": {"train": 0}}, r"shards: \{'train': 0\}"),
        ({"tokenizer": {"kind": "char"}}, "malformed tokenizer of kind char"),
    ],
)
def test_what_is_malformed_is_named(folder, change, what):
    content, _ = load_with_checksum(folder / "vocab.pt")
    save_with_checksum(folder / "vocab.pt", {**content, **change}, save=torch.save)
    message = refused(folder, what)
    assert "malformed" in message or "unknown tokenizer" in message


TOKENS = {
    "negative": torch.full((954,), -1),
    "one negative": torch.cat([torch.zeros(953, dtype=torch.int64), torch.tensor([-7])]),
    "beyond": torch.full((954,), 200, dtype=torch.uint8),
    "far beyond": torch.full((954,), 2**40),
    "one beyond": torch.cat([torch.zeros(953, dtype=torch.uint8), torch.tensor([255], dtype=torch.uint8)]),
    "sparse": torch.arange(954).to_sparse(),
    "matrix": torch.zeros(2, 477, dtype=torch.uint8),
    "floats": torch.zeros(954),
    "half": torch.zeros(954, dtype=torch.bfloat16),
    "complex": torch.zeros(954, dtype=torch.complex64),
    "booleans": torch.zeros(954, dtype=torch.bool),
    "too many": torch.zeros(955, dtype=torch.uint8),
    "none": torch.zeros(0, dtype=torch.uint8),
    "dictionary": {"tokens": torch.zeros(954, dtype=torch.uint8)},
}


def unsealed(folder):
    """Make it a folder of an earlier version."""
    content, _ = load_with_checksum(folder / "vocab.pt")
    torch.save(
        {key: value for key, value in content.items() if key not in ("sha256", "blocks")}, folder / "vocab.pt"
    )


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("name", ["train", "val"])
def test_token_files_with_wrong_content_are_one_line(folder, kind, name):
    unsealed(folder)
    value = TOKENS[kind]
    if name == "val" and isinstance(value, torch.Tensor) and value.dim() == 1 and not value.is_sparse:
        value = value[-107 if kind == "too many" else -106 :].clone()
    torch.save(value, folder / f"{name}.pt")
    message = refused(folder, "--overwrite")
    assert "malformed" in message or "does not hold" in message or "do not belong" in message


def test_folders_of_earlier_versions_load_and_their_ids_are_watched(folder, monkeypatch):
    unsealed(folder)
    assert not load_dataset(folder).sealed
    torch.save(TOKENS["one beyond"], folder / "train.pt")
    loaded = load_dataset(folder, verify_bytes=100)  # as if it were too large to be looked at
    windows = BatchLoader(loaded.train, torch.device("cpu"))
    windows(np.array([0, 5]), 8)
    with pytest.raises(UserError, match=r"train\.pt is malformed \(it has the id 255"):
        windows(np.array([0, 940]), 13)


def test_shards_of_different_types_are_malformed(sharded):
    unsealed(sharded)
    tokens = torch.load(sharded / "train-00001.pt", weights_only=True)
    torch.save(tokens.long(), sharded / "train-00001.pt")
    refused(sharded, r"train-00001\.pt is malformed \(int64")


# Pipes, links, folders, devices


@posix
@pytest.mark.parametrize("name", ["train.pt", "val.pt", "vocab.pt"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "dangling", "loop"])
def test_what_is_no_file_is_named_and_nothing_waits_for_it(folder, name, kind):
    path = folder / name
    path.unlink()
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "dangling":
            path.symlink_to(folder / "nowhere")
        case _:
            path.symlink_to(path)
    refused(folder, rf"{name} is (not a file|missing)")


@posix
def test_a_link_to_a_file_is_that_file(folder, tmp_path):
    (folder / "train.pt").rename(tmp_path / "elsewhere.pt")
    (folder / "train.pt").symlink_to(tmp_path / "elsewhere.pt")
    assert len(load_dataset(folder).train) == 954


def test_a_missing_folder_advises_to_name_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(Path("data")) == (
        "data/vocab.pt is missing: prepare it with: python data.py "
        "(or give --data_dir the folder that you prepared)"
    )


def test_a_file_that_must_not_be_read_is_one_line(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(dataset, "open_tokens", refuse)
    refused(folder, r"train\.pt cannot be read: Permission denied")


def test_lack_of_memory_is_no_damage(folder, monkeypatch):
    def refuse(path):
        raise MemoryError

    monkeypatch.setattr(dataset, "load_with_checksum", refuse)
    assert "damaged" not in refused(folder, "not enough memory")
