"""A preparation gives the tokens of the text, whole or not at all; killed, it goes on to the same files."""

import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import prepared
from filelock import FileLock

from nanogpt.data import prepare, scan, token_writer
from nanogpt.data.config import PrepareConfig
from nanogpt.data.dataset import load_dataset
from nanogpt.data.prepare import main
from nanogpt.errors import UserError
from nanogpt.storage import files
from nanogpt.tokenizer import bpe
from nanogpt.tokenizer.bpe import byte_level_json, gpt2_tokenizer

TEXT = "It was the best of times, it was the worst of times.\n" * 20
FILES = ["train.pt", "val.pt", "vocab.pt"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")

DOCUMENTS = [f"Document {i}: {'ein Wörtchen ' * (i % 7)}and so on.\n" for i in range(400)]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return PrepareConfig(input_file=(str(tmp_path / "text.txt"),), data_dir=str(tmp_path / "data"))


def write_lines(path, texts):
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def many(tmp_path):
    """A preparation of many documents."""
    file = write_lines(tmp_path / "many.jsonl", DOCUMENTS)
    return PrepareConfig(input_file=(file,), data_dir=str(tmp_path / "data"), tokenizer="byte")


def contents(folder):
    """What a data folder holds, without its lock."""
    files = (path for path in folder.iterdir() if not path.name.startswith("."))
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in files}


def whole_text(loaded):
    return loaded.tokenizer.decode(np.concatenate((loaded.train, loaded.val)).tolist())


def split_documents(loaded, ids):
    """The documents among tokens, as text; each must end."""
    end = loaded.tokenizer.end_of_text
    places = [-1, *np.flatnonzero(ids == end).tolist()]
    assert ids[-1] == end
    return [loaded.tokenizer.decode(ids[a + 1 : b].tolist()) for a, b in pairwise(places)]


# Tokens


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_the_tokens_are_the_text(tmp_path, tokenizer):
    text = TEXT + "Ünïcode 🙂"
    loaded = prepared(tmp_path / "data", text, tokenizer=tokenizer, vocab_size=270)
    end = loaded.tokenizer.end_of_text
    if tokenizer == "char":  # a single document needs no end
        assert end is None
        assert whole_text(loaded) == text
    else:
        assert loaded.val[-1] == end
        assert (loaded.train != end).all()
        assert loaded.tokenizer.decode([*loaded.train, *loaded.val[:-1]]) == text
    assert len(loaded.tokenizer.decode(loaded.train.tolist())) == int(len(text) * 0.9)


@pytest.mark.parametrize(("size", "dtype"), [(256, torch.uint8), (257, torch.uint16), (65537, torch.uint32)])
def test_tokens_have_the_narrowest_type(tmp_path, size, dtype):
    points = [point for point in range(1, size + 2100) if not 0xD800 <= point < 0xE000 and point != 13]
    text = "".join(map(chr, points[:size]))
    loaded = prepared(tmp_path / "data", text)
    for name, ids in (("train", loaded.train), ("val", loaded.val)):
        for mmap in (True, False):
            tensor = torch.load(tmp_path / f"data/{name}.pt", mmap=mmap, weights_only=True)
            assert tensor.dtype == dtype
            assert np.array_equal(tensor.numpy(), ids)
    assert np.array_equal(np.concatenate((loaded.train, loaded.val)), np.arange(size))


@pytest.mark.parametrize("split", [0.5, 0.9, 0.99, 1 / 3])
def test_sizes_of_the_splits_and_what_is_said(config, capsys, split):
    main(replace(config, train_split=split))
    loaded = load_dataset(Path(config.data_dir))
    assert len(loaded.train) == math.floor(len(TEXT) * split)
    assert len(loaded.train) + len(loaded.val) == len(TEXT)
    said = capsys.readouterr().out
    assert f"Characters: {len(TEXT):,}" in said
    assert f"Vocabulary: {len(set(TEXT))} " in said
    assert f"train.pt: {len(loaded.train):,} tokens" in said
    assert f"val.pt: {len(loaded.val):,} tokens" in said


@pytest.mark.parametrize(
    ("length", "split", "enough"),
    [
        (3, 0.5, False),
        (4, 0.5, True),
        (19, 0.9, True),
        (10, 0.9, False),
        (1000, 0.0015, False),
        (4, 0.9, False),
    ],
)
def test_both_splits_need_two_characters(tmp_path, length, split, enough):
    if enough:
        loaded = prepared(tmp_path / "data", TEXT[:length], train_split=split)
        assert min(len(loaded.train), len(loaded.val)) >= 2
    else:
        with pytest.raises(UserError, match=f"{length:,} characters .*: too short") as raised:
            prepared(tmp_path / "data", TEXT[:length], train_split=split)
        assert "\n" not in str(raised.value)
        assert contents(tmp_path / "data") == {}


@pytest.mark.parametrize("raw", [b"", b" \n\t\r\n  ", b"\xef\xbb\xbf", b"\xff\xfe", "\u2003\n".encode()])
def test_nothing_but_white_space_is_empty(config, raw):
    Path(config.input_file[0]).write_bytes(raw)
    with pytest.raises(UserError, match="is empty") as raised:
        main(config)
    assert "\n" not in str(raised.value)
    assert contents(Path(config.data_dir)) == {}


@posix
def test_what_cannot_be_read_is_said_each_time_and_refused_when_strict(tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"caf\xe9")  # not UTF-8
    folder.mkdir()
    (folder / "one.txt").write_text(TEXT)
    (folder / "dangling").symlink_to("nowhere")
    config = PrepareConfig((str(folder),), str(tmp_path / "data"))
    for _ in range(2):  # the second time, all is prepared
        main(config)
        assert "dangling: a link to a file that is not there" in capsys.readouterr().err
    assert len((tmp_path / "data/broken.txt").read_text().splitlines()) == 1
    with pytest.raises(UserError, match=r"dangling: a link to .*--strict"):
        main(replace(config, strict=True))


def test_a_text_field_that_does_nothing_is_said_before_anything_else(tmp_path, capsys):
    for number in range(9):
        (tmp_path / f"{number}.txt").write_bytes(b"a line\r\nand one more\r\n" * 9)
    main(PrepareConfig((str(tmp_path / "*.txt"),), str(tmp_path / "data"), text_field="body"))
    assert capsys.readouterr().out.startswith("--text_field body does nothing: ")


def test_nothing_but_broken_records_says_what_is_broken(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "turns": [{"who": "x", "said": ["y"]}], "meta": {}}\n' * 3)
    with pytest.raises(
        UserError,
        match=r"a\.jsonl has no text that can be read: 3 broken records, the first: .*a\.jsonl:1: "
        r"no text in the field 'text' \(it has id, turns\.who, turns\.said, meta\): give --text_field$",
    ):
        main(PrepareConfig(input_file=(str(tmp_path / "a.jsonl"),), data_dir=str(tmp_path / "data")))


def test_broken_records_are_shown_and_listed(many, tmp_path, capsys):
    with open(many.input_file[0], "a") as file:
        file.write("no\n" * 20 + "{}\n7\n")
        file.writelines(f'{{"{"x" * number}": 1}}\n' for number in range(1, 12))
    main(many)
    said = capsys.readouterr().err.splitlines()
    path = many.input_file[0]
    broken = f"{path}:401: not JSON (Expecting value: line 1 column 1 (char 0))"
    assert said[0] == f"left out: {broken} (and 19 more like this)"
    assert said[1] == f"left out: {path}:421: no text in the field 'text'"
    assert len(said) == prepare.MAX_SHOWN + 2
    assert said[-2:] == [
        "... and 4 more lines",
        f"Broken records or files left out: 33, listed in {tmp_path / 'data' / 'broken.txt'}",
    ]
    listed = (tmp_path / "data/broken.txt").read_text().splitlines()
    assert len(listed) == 33
    assert listed[0] == broken
    loaded = load_dataset(tmp_path / "data")
    assert split_documents(loaded, np.concatenate((loaded.train, loaded.val))) == DOCUMENTS
    with pytest.raises(UserError, match="--strict"):
        main(replace(many, strict=True, data_dir=str(tmp_path / "strict")))


# Documents and splits


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_every_document_ends_and_nothing_else_does(many, tokenizer):
    main(replace(many, tokenizer=tokenizer, vocab_size=300))
    loaded = load_dataset(Path(many.data_dir))
    ids = np.concatenate((loaded.train, loaded.val))
    assert split_documents(loaded, ids) == DOCUMENTS
    before = loaded.tokenizer.decode(loaded.train[loaded.train != loaded.tokenizer.end_of_text].tolist())
    assert len(before) == int(sum(map(len, DOCUMENTS)) * many.train_split)


def test_documents_of_white_space_alone_are_left_out(many):
    texts = [text for document in DOCUMENTS for text in (document, " \n\t", "")]
    write_lines(Path(many.input_file[0]), texts)
    main(many)
    loaded = load_dataset(Path(many.data_dir))
    assert split_documents(loaded, np.concatenate((loaded.train, loaded.val))) == DOCUMENTS


def by_document(config, texts):
    """The documents of the two splits, drawn document by document."""
    write_lines(Path(config.input_file[0]), texts)
    main(replace(config, split="documents", overwrite=True))
    loaded = load_dataset(Path(config.data_dir))
    return split_documents(loaded, loaded.train), split_documents(loaded, loaded.val)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_whole_documents_keep_their_side_when_the_corpus_grows(many, share):
    many = replace(many, train_split=share)
    texts = [f"{i} times" for i in range(3000)]
    train, val = by_document(many, texts[:2000])
    assert sorted(train + val) == sorted(texts[:2000])
    assert abs(len(train) / 2000 - share) < 0.03
    more_train, more_val = by_document(many, [*reversed(texts), *texts[:50]])
    assert set(train) <= set(more_train)
    assert set(val) <= set(more_val)
    assert not set(more_train) & set(more_val)  # copies are on one side
    assert len(more_train) + len(more_val) == 3050


def test_validation_files_validate_and_nothing_else_does(many, tmp_path):
    (tmp_path / "val.txt").write_text("Something else.")
    main(replace(many, val_file=(str(tmp_path / "val.txt"),)))
    loaded = load_dataset(Path(many.data_dir))
    assert split_documents(loaded, loaded.train) == DOCUMENTS
    assert split_documents(loaded, loaded.val) == ["Something else."]
    assert loaded.val_bytes == len("Something else.")


def test_documents_on_both_sides_are_counted_and_said(many, tmp_path, capsys):
    write_lines(Path(many.input_file[0]), [*DOCUMENTS, *DOCUMENTS[:30]])
    main(replace(many, train_split=0.5))
    ends = np.cumsum([len(text) for text in [*DOCUMENTS, *DOCUMENTS[:30]]])
    whole = int((ends - [len(text) for text in [*DOCUMENTS, *DOCUMENTS[:30]]] >= int(ends[-1] * 0.5)).sum())
    assert f"30 of {whole} documents for validation are also in the training split" in capsys.readouterr().err
    main(replace(many, split="documents", overwrite=True))
    assert "documents for validation are also" not in capsys.readouterr().err


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_bytes_are_counted_in_utf8(tmp_path, tokenizer):
    text = "ä🙂 word " * 50
    loaded = prepared(tmp_path / "data", text, tokenizer=tokenizer, vocab_size=261)
    boundary = int(len(text) * 0.9)
    facts = torch.load(tmp_path / "data/vocab.pt", weights_only=True)
    assert facts["bytes"] == {"train": len(text[:boundary].encode()), "val": len(text[boundary:].encode())}
    assert facts["characters"] == len(text)
    assert loaded.val_bytes == facts["bytes"]["val"]


def test_bpe_learns_from_the_training_split_alone(tmp_path):
    text = "".join(f"{word} " for word in ("the", "other", "then", "there") * 300)
    loaded = prepared(
        tmp_path / "data", text + "zqzqzq " * 100, train_split=0.8, tokenizer="bpe", vocab_size=263
    )
    assert not any(b"z" in token or b"q" in token for token in loaded.tokenizer.tokens if len(token) > 1)
    assert any(token == b"the" for token in loaded.tokenizer.tokens)


def test_gpt2s_tokenizer_is_fetched_and_checked(tmp_path, monkeypatch):
    merges = "#version: 0.2\nt h\nth e\nĠ the\n".encode()
    monkeypatch.setattr(bpe, "download", lambda url: merges)
    with pytest.raises(UserError, match="arrived damaged"):
        prepared(tmp_path / "data", TEXT, tokenizer="gpt2")
    monkeypatch.setattr(bpe, "GPT2_SHA256", hashlib.sha256(merges).hexdigest())
    loaded = prepared(tmp_path / "data", TEXT, tokenizer="gpt2")
    assert loaded.tokenizer.to_dict() == gpt2_tokenizer(merges.decode()).to_dict()

    def unreachable(url):
        raise ConnectionError("no network")

    monkeypatch.setattr(bpe, "download", unreachable)
    with pytest.raises(UserError, match="cannot be fetched") as raised:
        prepared(tmp_path / "other", TEXT, tokenizer="gpt2")
    assert "\n" not in str(raised.value)


# The folder


def test_the_same_text_again_is_recognised_and_not_rewritten(config, tmp_path, capsys):
    main(config)
    folder = Path(config.data_dir)
    before = {name: (folder / name).stat().st_mtime_ns for name in FILES}
    capsys.readouterr()
    (tmp_path / "another name.txt").write_text(TEXT)
    main(replace(config, input_file=(str(tmp_path / "another name.txt"),)))
    assert "already prepared" in capsys.readouterr().out
    assert before == {name: (folder / name).stat().st_mtime_ns for name in FILES}
    assert set(contents(folder)) == set(FILES)


CHANGES = {
    "text": {},
    "train_split": {"train_split": 0.8},
    "tokenizer": {"tokenizer": "byte"},
    "split": {"val_file": True},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_data_set_is_not_overwritten_unless_told(config, tmp_path, change):
    main(config)
    folder, text = Path(config.data_dir), TEXT
    values = dict(CHANGES[change])
    if values.get("val_file"):
        (tmp_path / "val.txt").write_text(TEXT[:100])
        values["val_file"] = (str(tmp_path / "val.txt"),)
    if change == "text":
        text = TEXT[:-1] + "!"
        Path(config.input_file[0]).write_text(text)
    config = replace(config, **values)
    before = contents(folder)
    with pytest.raises(UserError, match="--overwrite") as raised:
        main(config)
    assert "\n" not in str(raised.value)
    assert contents(folder) == before
    main(replace(config, overwrite=True))
    assert load_dataset(folder).tokenizer.decode(load_dataset(folder).train[:-1].tolist()) in text
    assert contents(folder) != before
    assert set(contents(folder)) == set(FILES)


def test_another_tokenizer_file_of_the_same_name_is_another_data_set(config, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_level_json([(b"t", b"h")]))
    config = replace(config, tokenizer=str(path))
    main(config)
    path.write_text(byte_level_json([(b"i", b"t")]))
    with pytest.raises(UserError, match="--overwrite"):
        main(config)
    main(replace(config, overwrite=True))
    assert b"it" in load_dataset(Path(config.data_dir)).tokenizer.tokens


def test_two_preparations_in_one_folder_are_refused(config):
    Path(config.data_dir).mkdir()
    with (
        FileLock(Path(config.data_dir) / ".lock"),
        pytest.raises(UserError, match="another program is writing to"),
    ):
        main(config)


def test_main_reads_a_file_and_says_what_it_did(config, capsys):
    Path(config.input_file[0]).write_bytes(TEXT.replace("\n", "\r\n").encode())
    assert main(config) == 0
    assert "20 Windows line ends" in capsys.readouterr().out
    assert whole_text(load_dataset(Path(config.data_dir))) == TEXT


# Cut short


@pytest.mark.parametrize("done", ["train.tokens", "train.pt", "val.pt", "vocab.pt", "preparing"])
@pytest.mark.parametrize("over_another", [False, True])
def test_a_preparation_cut_short_is_seen_and_done_again(config, tmp_path, monkeypatch, done, over_another):
    folder = Path(config.data_dir)
    if over_another:
        prepared(folder, "quite another text " * 9)
        config = replace(config, overwrite=True)
    old = contents(folder) if over_another else {}

    monkeypatch.setattr(prepare, "SAVE_SECONDS", -1.0)

    def stop(*_):
        raise KeyboardInterrupt

    def stop_at(function):
        def until(*arguments):
            if any(isinstance(value, Path) and value.name == done for value in arguments):
                raise KeyboardInterrupt
            return function(*arguments)

        return until

    with monkeypatch.context() as patch:
        if done == "train.tokens":
            patch.setattr(prepare, "encode_batch", stop)
        elif done == "preparing":
            patch.setattr(token_writer.EncodingJob, "remove", stop)
        else:
            patch.setattr(prepare, "write_tokens", stop_at(token_writer.write_tokens))
            patch.setattr(prepare, "save_with_checksum", stop_at(prepare.save_with_checksum))
        with pytest.raises(KeyboardInterrupt):
            main(config)
    if done == "train.tokens" or (over_another and done != "preparing"):
        # The old data set is there until the new one is ready.
        assert {name: raw for name, raw in contents(folder).items() if name in FILES} == old
    elif done == "preparing":
        assert whole_text(load_dataset(folder)) == TEXT
    else:
        with pytest.raises(UserError, match=r"vocab.pt is missing"):
            load_dataset(folder)
    main(config)
    assert whole_text(load_dataset(folder)) == TEXT
    assert set(contents(folder)) == set(FILES)


@pytest.fixture
def small_batches(monkeypatch):
    """Text in many small batches, saved after each."""
    monkeypatch.setattr(scan, "BATCH_BYTES", 500)
    monkeypatch.setattr(prepare, "SAVE_SECONDS", -1.0)


def stop_after(monkeypatch, count):
    """Cut a preparation short in the encoding, after so many batches."""
    really, left = token_writer.EncodingJob.save_state, iter(range(count))

    def save(work, files):
        really(work, files)
        if next(left, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(token_writer.EncodingJob, "save_state", save)


SETTINGS = {
    "char": {"tokenizer": "char"},
    "byte": {"tokenizer": "byte", "split": "documents"},
    "bpe": {"tokenizer": "bpe", "vocab_size": 300},
}


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_preparation_that_is_cut_short_goes_on_to_the_same_files(many, tmp_path, monkeypatch, capsys, kind):
    many = replace(many, **SETTINGS[kind])
    main(replace(many, data_dir=str(tmp_path / "never")))
    expected = contents(tmp_path / "never")
    for count in (0, 3, 3, 5):
        with monkeypatch.context() as patch:
            stop_after(patch, count)
            with pytest.raises(KeyboardInterrupt):
                main(many)
    for name in ("train", "val"):  # what was written after the last save is done again
        with open(tmp_path / f"data/preparing/{name}.tokens", "ab") as file:
            file.write(b"torn!")
    capsys.readouterr()
    main(many)
    assert "Going on with the preparation that was cut short" in capsys.readouterr().out
    assert contents(tmp_path / "data") == expected


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("change", ["file", "vocab_size", "train_split", "damage", "flip", "tokens", "bits"])
def test_anything_changed_since_starts_afresh(many, tmp_path, monkeypatch, capsys, change):
    many = replace(many, **SETTINGS["bpe"])
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            main(many)
    if change == "file":
        write_lines(Path(many.input_file[0]), [text.upper() for text in DOCUMENTS])
    elif change == "damage":
        (tmp_path / "data/preparing/state.pt").write_bytes(b"damage")
    elif change == "tokens":
        (tmp_path / "data/preparing/train.tokens").write_bytes(b"")
    elif change in ("flip", "bits"):
        path = tmp_path / "data/preparing" / ("state.pt" if change == "flip" else "train.tokens")
        raw = path.read_bytes()
        middle = len(raw) // 2
        path.write_bytes(raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :])
    else:
        many = replace(many, **{"vocab_size": 280} if change == "vocab_size" else {"train_split": 0.7})
    capsys.readouterr()
    main(many)
    assert "Going on" not in capsys.readouterr().out
    main(replace(many, data_dir=str(tmp_path / "never")))
    assert contents(tmp_path / "data") == contents(tmp_path / "never")


@pytest.mark.usefixtures("small_batches")
def test_overwriting_that_is_cut_short_leaves_the_old_data_set(many, tmp_path, monkeypatch):
    old = prepared(tmp_path / "data", TEXT).fingerprint
    many = replace(many, overwrite=True)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            main(many)
    assert load_dataset(tmp_path / "data").fingerprint == old
    main(many)
    assert load_dataset(tmp_path / "data").fingerprint != old


@posix
def test_a_preparation_that_is_killed_goes_on_to_the_same_files(tmp_path):
    write_lines(tmp_path / "a.jsonl", [f"{i} {text}" for i in range(40) for text in DOCUMENTS])
    code = (
        "import sys, time; from nanogpt.data import prepare, scan\n"
        "from nanogpt.data.config import PrepareConfig\n"
        "scan.BATCH_BYTES, prepare.SAVE_SECONDS = 20_000, -1.0\n"
        "prepare.main(PrepareConfig(input_file=(sys.argv[1],), data_dir=sys.argv[2], tokenizer='byte'))"
    )

    def start(folder):
        command = [sys.executable, "-c", code, str(tmp_path / "a.jsonl"), str(tmp_path / folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    kills = 0
    for wait in (0.0, 0.05, 0.01):
        process = start("killed")
        state = tmp_path / "killed/preparing/state.pt"
        before = state.stat().st_mtime_ns if state.exists() else 0
        while process.poll() is None and not (state.exists() and state.stat().st_mtime_ns > before):
            time.sleep(0.002)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills
    outputs = [process.communicate()[0] for process in (start("killed"), start("never"))]
    assert "Going on" in outputs[0] or "already prepared" in outputs[0]
    assert contents(tmp_path / "killed") == contents(tmp_path / "never")


@posix
@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("name", ["state.pt", "train.tokens", "val.tokens"])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_pipe_or_a_link_in_an_unfinished_preparation_is_neither_waited_for_nor_written_to(
    many, tmp_path, monkeypatch, name, kind
):
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            main(many)
    path = tmp_path / "data/preparing" / name
    path.rename(tmp_path / "kept")
    before = (tmp_path / "kept").read_bytes()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "kept")
    main(many)
    assert (tmp_path / "kept").read_bytes() == before
    main(replace(many, data_dir=str(tmp_path / "never")))
    assert contents(tmp_path / "data") == contents(tmp_path / "never")


@pytest.mark.parametrize("name", ["preparing", "broken.txt"])
def test_a_file_or_folder_in_the_way_is_one_line_or_replaced(config, tmp_path, name):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text("mine")
    if name == "preparing":
        with pytest.raises(UserError, match="move it away"):
            main(config)
        assert (tmp_path / "data/preparing").read_text() == "mine"
    else:
        assert main(config) == 0


# Full disks


class FullDisk:
    """Lets so many writes through; then the disk is full."""

    def __init__(self):
        self.left = 0

    def open(self, path, mode):
        """As open does."""
        disk = self

        class File(io.FileIO):
            def write(self, data):
                disk.left -= 1
                if disk.left < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return super().write(data)

        if mode == "rb":
            return open(path, mode)
        raw = File(path, mode.replace("b", ""))
        return io.BufferedWriter(raw) if mode == "ab" else io.BufferedRandom(raw)


class Standard:
    """Standard input with a text."""

    def __init__(self, raw):
        self.buffer = io.BytesIO(raw)


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_a_full_disk_at_any_write_is_one_line_and_loses_nothing(tmp_path, monkeypatch, source):
    text = "quite another text\n" * 30 + "no\n"
    file = write_lines(tmp_path / "a.jsonl", text.splitlines())
    with open(file, "a") as lines:
        lines.write("broken\n")
    folder, name = tmp_path / "data", "-" if source == "standard input" else file
    prepared(folder, TEXT)
    config = PrepareConfig(input_file=(name,), data_dir=str(folder), overwrite=True)
    disk = FullDisk()
    monkeypatch.setattr(prepare, "SAVE_SECONDS", -1.0)
    for module in (files, token_writer):
        monkeypatch.setattr(module, "open", disk.open, raising=False)
    limit, messages = 0, set()
    while True:
        disk.left = limit
        monkeypatch.setattr(sys, "stdin", Standard(text.encode()))
        try:
            main(config)
            break
        except UserError as error:
            message = str(error)
        assert "\n" not in message
        assert "No space left on device" in message
        messages.add(re.split("[: ]", message.partition(str(folder))[2])[0].strip("/"))
        shutil.rmtree(folder / "preparing", ignore_errors=True)  # from the first write on
        assert whole_text(load_dataset(folder)) == TEXT
        limit += 1
    assert "another" in whole_text(load_dataset(folder))
    expected = {"preparing", "preparing/state.pt", "preparing/swap.json"}
    expected |= {f"preparing/new/{name}" for name in FILES}
    expected.add("stdin.txt" if source == "standard input" else "broken.txt")
    assert messages == expected


# Memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((3,), np.dtype(np.uint8)),
        RuntimeError("can't start new thread"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 5 bytes"),
        ImportError("libx.so: failed to map segment from shared object"),
    ],
)
def test_too_little_memory_is_one_line(config, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(prepare, "encode_batch", fail)
    with pytest.raises(UserError, match="not enough memory") as raised:
        main(config)
    assert "\n" not in str(raised.value)
    monkeypatch.setattr(prepare, "encode_batch", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        main(config)


def test_too_many_files_are_refused_before_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_FILES", 50)
    old = prepared(tmp_path / "data", TEXT)
    with pytest.raises(UserError, match=r"--shard_tokens 1 makes more than 50 files: give a larger one"):
        prepared(tmp_path / "data", TEXT + "!", shard_tokens=1, overwrite=True)
    assert load_dataset(tmp_path / "data").fingerprint == old.fingerprint
    assert len(prepared(tmp_path / "data", TEXT + "!", shard_tokens=22, overwrite=True).train.parts) == 44


@posix
def test_a_name_that_is_not_utf8_is_a_name(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n.txt")
    try:
        with open(path, "w") as file:
            file.write(TEXT)
    except OSError:
        pytest.skip("a file system of UTF-8 alone")
    folder = tmp_path / "data"
    main(PrepareConfig(input_file=(path,), data_dir=str(folder)))
    assert whole_text(load_dataset(folder)) == TEXT
    (folder / "train.pt").unlink()
    with pytest.raises(
        UserError, match=r"prepare it with: python data\.py --input_file .*caf.*--data_dir"
    ) as raised:
        load_dataset(folder)
    assert "\n" not in str(raised.value)


def test_one_of_a_thing_is_not_several(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("It was")
    (tmp_path / "b.txt").write_text("The")
    main(
        PrepareConfig(
            input_file=(str(tmp_path / "a.txt"),),
            val_file=(str(tmp_path / "b.txt"),),
            data_dir=str(tmp_path / "data"),
            shard_tokens=100,
        )
    )
    said = capsys.readouterr().out
    assert "train-*.pt (1 file): 7 tokens (64%)" in said


# Standard input


def test_a_closed_standard_input_is_one_line(tmp_path, monkeypatch):
    config = PrepareConfig(input_file=("-",), data_dir=str(tmp_path / "data"))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="--input_file - is standard input, which is closed"):
        main(config)
    assert contents(tmp_path / "data") == {}


def test_a_standard_input_that_cannot_be_read_is_not_a_full_disk(tmp_path, monkeypatch):
    class Folder(io.RawIOBase):
        def read(self, _):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))

    monkeypatch.setattr(sys, "stdin", Standard(b""))
    sys.stdin.buffer = Folder()
    with pytest.raises(UserError, match="--input_file - cannot be read: Is a directory"):
        main(PrepareConfig(input_file=("-",), data_dir=str(tmp_path / "data")))


def test_a_program_that_is_kept_out_leaves_the_other_ones_standard_input(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / prepare.STDIN_FILE).write_text(TEXT)
    with FileLock(folder / ".lock"), pytest.raises(UserError, match="another program is writing to"):
        main(PrepareConfig(input_file=("-",), data_dir=str(folder)))
    assert (folder / prepare.STDIN_FILE).read_text() == TEXT


def pipe(tmp_path, text, *more):
    """Prepare from standard input, as a process."""
    command = [
        sys.executable,
        "-m",
        "nanogpt",
        "data",
        "--input_file",
        "-",
        "--data_dir",
        str(tmp_path / "data"),
    ]
    done = subprocess.run([*command, *more], input=text.encode(), capture_output=True, check=False)
    return done.returncode, done.stderr.decode()


def test_standard_input_is_a_text_and_leaves_no_copy(tmp_path):
    assert pipe(tmp_path, TEXT) == (0, "")
    assert whole_text(load_dataset(tmp_path / "data")) == TEXT
    assert set(contents(tmp_path / "data")) == set(FILES)
    assert pipe(tmp_path, TEXT) == (0, "")  # already prepared
    assert set(contents(tmp_path / "data")) == set(FILES)


def test_standard_input_that_is_refused_leaves_no_copy(tmp_path):
    code, said = pipe(tmp_path, " \n")
    assert code == 2
    assert said.startswith("error: ")
    assert contents(tmp_path / "data") == {}


@posix
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_pipe_in_place_of_a_file_is_read_once_or_refused(tmp_path):
    """As the shell's <(zcat x) gives it: it cannot be read a second time."""
    reading, writing = os.pipe()
    os.write(writing, TEXT.encode())
    os.close(writing)
    try:
        main(PrepareConfig(input_file=(f"/dev/fd/{reading}",), data_dir=str(tmp_path / "data")))
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either is right
    else:
        assert whole_text(load_dataset(tmp_path / "data")) == TEXT
    finally:
        os.close(reading)


def test_a_folder_that_cannot_be_made_is_named(many, tmp_path):
    (tmp_path / "file").write_text("x")
    folder = tmp_path / "file" / "data"
    with pytest.raises(UserError, match=rf"^--data_dir {folder} cannot be written \(.+\): give another$"):
        main(replace(many, data_dir=str(folder)))
