"""A data folder loads whole or not at all; batches are pure, and repeat nothing within an epoch."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import TINY, prepared
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.checkpoint.format import load_checkpoint, save_checkpoint
from nanogpt.cli import sample
from nanogpt.config import TrainConfig
from nanogpt.data.batches import BatchLoader, BatchSampler, evaluation_batches
from nanogpt.data.dataset import Dataset, load_dataset
from nanogpt.data.vocab_file import FORMAT_VERSION, MASKED_VERSION, SPLITS
from nanogpt.errors import UserError
from nanogpt.inference.config import SampleConfig
from nanogpt.tokenizer.base import ByteTokenizer, CharTokenizer
from nanogpt.training.fit import fit

quick = settings(deadline=None, derandomize=True, max_examples=100)
TEXT = "It was the best of times, it was the worst of times.\n" * 20
FILES = ["train.pt", "val.pt", "vocab.pt"]


@pytest.fixture
def folder(tmp_path):
    """A prepared data folder."""
    prepared(tmp_path / "data", TEXT)
    return tmp_path / "data"


def one_line(raised):
    assert "\n" not in str(raised.value)
    return str(raised.value)


# The folder


def test_the_files_and_what_they_hold(folder):
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == set(FILES)
    train, val = (torch.load(folder / f"{name}.pt", mmap=True, weights_only=True) for name in SPLITS)
    vocabulary = torch.load(folder / "vocab.pt", weights_only=True)
    assert train.dim() == val.dim() == 1
    assert train.dtype == val.dtype == torch.uint8
    tokenizer = CharTokenizer(vocabulary["tokenizer"]["chars"])
    assert tokenizer.decode(train.tolist()) + tokenizer.decode(val.tolist()) == TEXT
    assert vocabulary["format"] == FORMAT_VERSION


def test_load_gives_back_the_text(folder):
    loaded = load_dataset(folder)
    ids = np.concatenate((loaded.train, loaded.val))
    assert loaded.tokenizer.decode(ids) == TEXT


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError) as raised:
        load_dataset(folder)
    source = "YOUR_TEXT" if name == "vocab.pt" else f"{folder}.txt"  # vocab.pt knows how it was made
    command = f"python data.py --input_file {source} --data_dir {folder}"
    assert f"{name} is missing: prepare it with: {command}" in one_line(raised)


def test_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match="prepare it with"):
        load_dataset(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 1, 30, 0.3, 0.9, -1])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file(folder, name, keep):
    before = load_dataset(folder).fingerprint
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=rf"{name} is damaged( \(its checksum.*\))?: .*--overwrite") as raised:
        load_dataset(folder)
    one_line(raised)
    with pytest.raises(UserError, match="damaged data set: give --overwrite"):
        prepared(folder, TEXT)
    assert prepared(folder, TEXT, overwrite=True).fingerprint == before


FOREIGN = {
    "list": [1, 2, 3],
    "tensor": torch.arange(5),
    "model": {"model": {"weight": torch.zeros(2)}, "format": 1},
    "empty": {"format": 1},
    "matrix": torch.zeros(4, 4, dtype=torch.uint8),
    "floats": torch.zeros(100),
}


@pytest.mark.parametrize("kind", ["list", "tensor", "model", "empty"])
def test_a_foreign_vocabulary(folder, kind):
    torch.save(FOREIGN[kind], folder / "vocab.pt")
    with pytest.raises(UserError) as raised:
        load_dataset(folder)
    one_line(raised)


@pytest.mark.parametrize("kind", ["list", "model", "matrix", "floats"])
@pytest.mark.parametrize("name", SPLITS)
def test_foreign_tokens(folder, name, kind):
    torch.save(FOREIGN[kind], folder / f"{name}.pt")
    with pytest.raises(UserError) as raised:
        load_dataset(folder)
    one_line(raised)


def test_a_folder_of_another_version(folder):
    vocabulary = torch.load(folder / "vocab.pt", weights_only=True)
    torch.save({**vocabulary, "format": MASKED_VERSION + 1}, folder / "vocab.pt")
    with pytest.raises(UserError, match="has format 4") as raised:
        load_dataset(folder)
    one_line(raised)


# Format 1: what the first release wrote, letter by letter


@pytest.fixture
def old_folder(tmp_path):
    """A data folder of format 1."""
    folder = tmp_path / "old"
    folder.mkdir()
    chars = "".join(sorted(set(TEXT)))
    ids = np.array([chars.index(char) for char in TEXT], dtype=np.uint8)
    boundary = int(len(TEXT) * 0.9)
    parts = {"train": ids[:boundary], "val": ids[boundary:]}
    for name, part in parts.items():
        torch.save(torch.from_numpy(part), folder / f"{name}.pt")
    vocabulary = {
        "format": 1,
        "tokenizer": {"kind": "char", "chars": chars},
        "fingerprint": "f" * 64,
        "source": "times.txt",
        "train_split": 0.9,
        "tokens": {name: len(part) for name, part in parts.items()},
    }
    torch.save(vocabulary, folder / "vocab.pt")
    return folder


def test_a_folder_of_format_1_loads(old_folder):
    loaded = load_dataset(old_folder)
    assert loaded.tokenizer.decode(np.concatenate((loaded.train, loaded.val))) == TEXT
    assert loaded.fingerprint == "f" * 64
    assert loaded.tokenizer.end_of_text is None
    assert loaded.bits_per_byte(1.0) is None  # bytes were not counted


def test_a_folder_of_format_1_says_how_it_was_prepared(old_folder):
    (old_folder / "val.pt").unlink()
    with pytest.raises(UserError, match=r"--input_file times\.txt --data_dir"):
        load_dataset(old_folder)


def test_a_folder_of_format_1_is_not_overwritten_unless_told(old_folder):
    with pytest.raises(UserError, match="--overwrite"):
        prepared(old_folder, TEXT)
    assert load_dataset(old_folder).fingerprint == "f" * 64
    assert prepared(old_folder, TEXT, overwrite=True).fingerprint != "f" * 64


def test_training_on_a_folder_of_format_1_and_sampling_from_its_checkpoint(old_folder, tmp_path, capsys):
    config = TrainConfig(**TINY, data_dir=str(old_folder), out_dir=str(tmp_path / "out"))
    assert fit(config).reason == "finished"
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert any("val_loss" in json.loads(line) for line in lines)
    assert not any("val_bits_per_byte" in json.loads(line) for line in lines)
    path = tmp_path / "out/ckpt.pt"
    saved = load_checkpoint(path)
    save_checkpoint(path, replace(saved, tokenizer={"kind": "char", "chars": saved.tokenizer["chars"]}))
    capsys.readouterr()
    sample.main(SampleConfig(checkpoint=str(path), prompt="It", num_tokens=20, seed=1, device="cpu"))
    printed = capsys.readouterr().out
    assert len(printed) == len("It") + 20 + len("\n")


# Bits a byte


def dataset(tokenizer, text, **values):
    ids = tokenizer.encode(text)
    return Dataset(**{"train": ids, "val": ids, "tokenizer": tokenizer, "fingerprint": "", **values})


def test_bits_a_byte_of_a_known_loss():
    """A model of bytes that gives each of 4 the probability 1/4 needs 2 bits a byte, whatever a token is."""
    text = "häuser"
    size = len(text.encode())
    bytes_alone = dataset(ByteTokenizer(), text, val_bytes=size)
    assert bytes_alone.bits_per_byte(math.log(4)) == pytest.approx(2)
    # Six characters: the first of one byte is not predicted, five tokens stand for the other six bytes.
    chars = dataset(CharTokenizer.train(text), text, val_bytes=size)
    assert chars.bits_per_byte(math.log(4)) == pytest.approx(2 * 5 / 6)
    # If the first is the one of two bytes, five remain.
    chars = dataset(CharTokenizer.train(text), "ä" + text[2:], val_bytes=6)
    assert chars.bits_per_byte(math.log(4)) == pytest.approx(2 * 4 / 4)


def test_a_first_token_that_ends_a_document_stands_for_no_bytes():
    tokenizer = ByteTokenizer()
    val = np.array([255, *b"abcd"], np.uint8)
    loaded = dataset(tokenizer, "abcd", val=val, val_bytes=4)
    assert loaded.bits_per_byte(math.log(2)) == pytest.approx(1)


def test_bits_a_byte_without_a_count():
    assert dataset(ByteTokenizer(), "abcd").bits_per_byte(1.0) is None


# Training batches


def starts_of(batches, steps, order=0):
    """Where the windows of these steps begin, told from tokens that are their own positions."""
    firsts = []
    for step in steps:
        x, y = BatchLoader(batches.tokens, torch.device("cpu"))(batches(step, order), batches.block_size)
        assert torch.equal(x, x[:, :1] + torch.arange(batches.block_size))  # unbroken windows
        assert torch.equal(y, x + 1)  # targets are the inputs one further
        firsts += x[:, 0].tolist()
    return firsts


def counting(n, *, block_size, batch_size, seed=1):
    """Batches of the tokens 0, 1, ..., n - 1."""
    return BatchSampler(
        np.arange(n, dtype=np.uint32), block_size=block_size, batch_size=batch_size, seed=seed
    )


def test_shapes_types_and_values():
    tokens = np.arange(100, dtype=np.uint8)
    x, y = BatchLoader(tokens, torch.device("cpu"))(
        BatchSampler(tokens, block_size=8, batch_size=5, seed=1)(0), 8
    )
    assert x.shape == y.shape == (5, 8)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])


@quick
@given(st.integers(2, 200), st.data(), st.integers(1, 9), st.integers(0, 99), st.integers(0, 3))
def test_an_epoch_is_disjoint_windows_each_once_whatever_the_size(n, draw, batch_size, seed, epoch):
    T = draw.draw(st.integers(1, n - 1))
    batches = counting(n, block_size=T, batch_size=batch_size, seed=seed)
    W = batches.windows
    assert W >= 1
    assert batches.steps_per_epoch == W / batch_size
    first, last = epoch * W // batch_size, ((epoch + 1) * W - 1) // batch_size
    visits = starts_of(batches, range(first, last + 1))
    skip = epoch * W - first * batch_size
    windows = sorted(visits[skip : skip + W])
    assert len(windows) == W
    assert windows[0] >= 0
    assert windows[-1] + T < n  # the last target is inside
    assert all(b - a == T for a, b in pairwise(windows))  # no token is predicted twice


@quick
@given(st.integers(2, 200), st.data())
def test_an_epoch_leaves_out_less_than_two_windows(n, draw):
    T = draw.draw(st.integers(1, n - 1))
    batches = counting(n, block_size=T, batch_size=1)
    assert n - 1 - batches.windows * T < 2 * T


def test_batches_are_a_pure_function_of_seed_order_and_step():
    def make(seed=1):
        return counting(500, block_size=7, batch_size=16, seed=seed)

    plan = [(step, order) for step in (0, 1, 5, 4, 40, 1000, 3) for order in (0, 1)]
    long_lived = make()
    seen = {key: long_lived(*key).tolist() for key in plan}
    for key in reversed(plan):
        assert make()(*key).tolist() == seen[key]  # no state: neither history nor order of asking matters
    assert make(2)(0).tolist() != seen[0, 0]
    assert seen[0, 1] != seen[0, 0]


def test_another_order_visits_the_same_number_of_windows_otherwise_shuffled():
    batches = counting(401, block_size=10, batch_size=13)
    plain, other = (starts_of(batches, range(3), order) for order in (0, 1))
    assert batches.windows == 39
    assert len(set(plain)) == len(set(other)) == 39
    assert plain != other


def test_epochs_differ_in_shuffle_and_offset():
    batches = counting(401, block_size=10, batch_size=39)
    epochs = [starts_of(batches, [epoch]) for epoch in range(20)]
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert len({min(epoch) for epoch in epochs}) > 5  # other offsets: other cuts of the text
    assert all(min(epoch) >= 0 and max(epoch) + 10 < 401 for epoch in epochs)


def test_the_shuffle_is_a_shuffle():
    starts = starts_of(counting(401, block_size=10, batch_size=39), [0])
    assert starts != sorted(starts)
    assert starts != sorted(starts, reverse=True)


@pytest.mark.parametrize("batch_size", [5, 39, 40, 100])
def test_a_batch_straddles_epochs_without_losing_or_repeating(batch_size):
    batches = counting(401, block_size=10, batch_size=batch_size)
    W, epochs = batches.windows, 6
    steps = math.ceil(epochs * W / batch_size)
    visits = starts_of(batches, range(steps))
    for epoch in range(epochs):
        windows = visits[epoch * W : (epoch + 1) * W]
        assert len(set(windows)) == W
        assert windows == starts_of(counting(401, block_size=10, batch_size=W), [epoch])  # whatever the batch


def test_every_token_is_seen_in_the_long_run():
    batches = counting(60, block_size=10, batch_size=4)
    seen = {start + i for start in starts_of(batches, range(200)) for i in range(11)}
    assert seen == set(range(60))


def test_a_block_size_too_long_for_the_split():
    tokens = np.zeros(10, dtype=np.uint8)
    with pytest.raises(UserError, match=r"--block_size 10 .* 10 tokens: use at most 9") as raised:
        BatchSampler(tokens, block_size=10, batch_size=1, seed=1)
    one_line(raised)
    assert BatchSampler(tokens, block_size=9, batch_size=3, seed=1)(0).tolist() == [0, 0, 0]


def test_late_steps_do_not_overflow():
    starts = starts_of(counting(401, block_size=10, batch_size=64), [10**12])
    assert len(starts) == 64


# Evaluation batches


@quick
@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 7))
def test_evaluation_predicts_every_token_but_the_first_once_in_order(n, block_size, batch_size):
    predicted = []
    for starts, length in evaluation_batches(np.zeros(n), block_size=block_size, batch_size=batch_size):
        x, y = BatchLoader(np.arange(n), torch.device("cpu"))(starts, length)
        assert torch.equal(y, x + 1)
        assert len(starts) <= batch_size
        assert length <= block_size
        predicted += y.flatten().tolist()
    assert predicted == list(range(1, n))


@quick
@given(st.integers(2, 300), st.integers(1, 20), st.integers(1, 4), st.integers(1, 40))
def test_most_is_an_even_fixed_subset(n, block_size, batch_size, most):
    def starts(most=None):
        batches = evaluation_batches(
            np.zeros(n), block_size=block_size, batch_size=batch_size, max_batches=most
        )
        return [(tuple(starts.tolist()), length) for starts, length in batches]

    whole, some = starts(), starts(most)
    assert some == starts(most)
    assert len(some) == min(most, len(whole))
    places = [whole.index(batch) for batch in some]
    gaps = np.diff([*places, len(whole)])
    assert places[0] == 0
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1  # evenly spread


def test_evaluation_of_a_split_shorter_than_a_block():
    ((starts, length),) = evaluation_batches(np.zeros(5), block_size=100, batch_size=8)
    assert (starts.tolist(), length) == ([0], 4)
