"""Pairs of prompt and completion: read from any format, and trained on with the loss on completions alone."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from torch.nn import functional as F

from nanogpt.checkpoint.format import load_checkpoint, load_model
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.cli.main import run_command
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.data import prepare as preparing
from nanogpt.data.batches import BatchLoader
from nanogpt.data.config import PrepareConfig
from nanogpt.data.dataset import Dataset, load_dataset
from nanogpt.data.prepare import main as prepare
from nanogpt.data.swap import WORK
from nanogpt.distributed.world import World
from nanogpt.errors import UserError
from nanogpt.evaluation import evaluate
from nanogpt.machine import device
from nanogpt.model import kernels
from nanogpt.model.gpt import GPT
from nanogpt.model.kernels import IGNORED
from nanogpt.storage.seals import load_with_checksum, save_with_checksum
from nanogpt.training import trainer
from nanogpt.training.fit import fit
from nanogpt.training.setup import set_up

FIELDS = {"prompt_field": "q", "completion_field": "a"}

NUMBERS = [(f"What is {a} and {b}?", str(a + b)) for a in range(12) for b in range(12)]

WORDS = [
    ("Größe?\nOder?", "« très grande »"),
    ("日本", "にほん\n\tにっぽん"),
    ("q", "a"),
    ("😀 how", " with a space "),
]


def written(path: Path, pairs: list[tuple[str, str]]) -> Path:
    """A file of JSON Lines."""
    path.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in pairs), "utf-8")
    return path


def data_of(folder: Path, pairs: list[tuple[str, str]] = NUMBERS, **settings: Any) -> Dataset:
    """A prepared data folder of pairs."""
    path = written(folder.with_name(f"{folder.name}.jsonl"), pairs)
    prepare(PrepareConfig((str(path),), str(folder), **{**FIELDS, **settings}))
    return load_dataset(folder)


def pairs_in(data: Dataset) -> list[tuple[str, str]]:
    """The text before each run of tokens that count, and the text of these: prompts and completions."""
    found: list[tuple[str, str]] = []
    for tokens, mask in ((data.train, data.train_mask), (data.val, data.val_mask)):
        assert mask is not None
        assert mask[:].dtype == np.uint8
        ends = np.flatnonzero(np.diff(mask[:].astype(int)) < 0) + 1
        for ids, counts in zip(np.split(tokens[:], ends), np.split(mask[:], ends), strict=True):
            found.append(tuple(data.tokenizer.decode(ids[counts == of].tolist()) for of in (0, 1)))
    return found


# Preparing


@pytest.mark.parametrize("separator", ["\\n", "", "\\nAnswer:"])
@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_the_mask_is_on_completions_and_the_tokens_that_end_them(tmp_path, tokenizer, separator, monkeypatch):
    monkeypatch.setattr("nanogpt.data.scan.BATCH_DOCUMENTS", 3)  # a pair may be in two batches
    data = data_of(tmp_path / "data", WORDS * 5, tokenizer=tokenizer, vocab_size=300, separator=separator)
    between = separator.replace("\\n", "\n")
    end = "<|endoftext|>"
    assert pairs_in(data) == [(q + between, a + end) for q, a in WORDS * 5]
    assert data.counted == {"train": int(data.train_mask[:].sum()), "val": int(data.val_mask[:].sum())}
    assert sum(data.counted_bytes.values()) == 5 * sum(len(a.encode()) for _, a in WORDS)
    bits = data.counted["val"] / data.counted_bytes["val"] / math.log(2)
    assert data.bits_per_byte(1.0) == pytest.approx(bits)
    prompt = data.tokenizer.encode(WORDS[0][0] + between)
    assert data.train[: len(prompt)].tolist() == prompt.tolist()  # as sampling encodes it


def test_long_texts_are_one_pair(tmp_path, monkeypatch):
    monkeypatch.setattr("nanogpt.text.documents.CHUNK_BYTES", 40)
    monkeypatch.setattr("nanogpt.text.documents.CUT_MARGIN_BYTES", 10)
    pairs = [("many words " * 20, "and " * 30), ("few", "words")] * 3
    assert pairs_in(data_of(tmp_path / "data", pairs, tokenizer="byte")) == [
        (f"{q}\n", f"{a}<|endoftext|>") for q, a in pairs
    ]


def table(path: Path, pairs: list[tuple[str, str]]) -> None:
    path.write_text("id;a;q\n" + "".join(f'1;"{a}";"{q}"\n' for q, a in pairs), "utf-8")


def parquet(path: Path, pairs: list[tuple[str, str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"a": [a for _, a in pairs], "n": [1] * len(pairs), "q": [q for q, _ in pairs]}), path
    )


def array(path: Path, pairs: list[tuple[str, str]]) -> None:
    path.write_text(json.dumps([{"q": q, "a": a} for q, a in pairs]), "utf-8")


@pytest.mark.parametrize(
    ("name", "write", "settings"),
    [
        ("x.csv", table, {}),
        ("x.parquet", parquet, {}),
        ("x.json", array, {}),
        ("x.txt", written, {"input_format": "jsonl"}),
    ],
)
def test_other_formats_give_the_same_pairs(tmp_path, name, write, settings):
    write(tmp_path / name, WORDS * 5)
    prepare(PrepareConfig((str(tmp_path / name),), str(tmp_path / "other"), **FIELDS, **settings))
    data, other = data_of(tmp_path / "data", WORDS * 5), load_dataset(tmp_path / "other")
    assert pairs_in(other) == pairs_in(data)
    assert other.fingerprint == data.fingerprint


def test_several_files_nested_fields_and_validation_of_its_own(tmp_path, capsys):
    nested = [{"data": {"q": q, "answers": [{"a": a}]}} for q, a in NUMBERS[:50]]
    for i, part in enumerate((nested[:20], nested[20:])):
        (tmp_path / f"{i}.jsonl").write_text("\n".join(map(json.dumps, part)), "utf-8")
    written(tmp_path / "val.jsonl", NUMBERS[50:60])
    (tmp_path / "notes.txt").write_text("some notes", "utf-8")
    files = [str(tmp_path / name) for name in ("0.jsonl", "notes.txt", "1.jsonl")]
    fields = {"prompt_field": "data.q", "completion_field": "data.answers.a"}
    prepare(PrepareConfig(tuple(files), str(tmp_path / "data"), **fields))
    said = capsys.readouterr()
    assert "notes.txt: is read as plain text, which has no pairs" in said.err
    assert 'To sample, end the prompt in the separator, as here: --prompt "...\\n"\n' in said.out
    assert [q for q, _ in pairs_in(load_dataset(tmp_path / "data"))] == [f"{q}\n" for q, _ in NUMBERS[:50]]
    own = replace(
        PrepareConfig((str(tmp_path / "val.jsonl"),), str(tmp_path / "own"), **FIELDS),
        val_file=(str(tmp_path / "data.jsonl"),),
    )
    written(tmp_path / "data.jsonl", NUMBERS[:3])
    prepare(own)
    assert [q for q, _ in pairs_in(load_dataset(tmp_path / "own"))[-3:]] == [f"{q}\n" for q, _ in NUMBERS[:3]]


BROKEN = {
    '{"q": "x"}': "no text in the field 'a' (it has q): give --completion_field",
    '{"question": "x", "a": "y"}': "no text in the field 'q' (it has question, a): give --prompt_field",
    '{"q": "x", "a": ""}': "the field 'a' is empty",
    '{"q": " \\n", "a": "y"}': "the field 'q' is empty",
    '{"q": "x", "a": 7}': "the field 'a' holds a number (7), not text",
    '{"q": "x", "a": null}': "the field 'a' is null",
    '{"q": "x", "a": {"b": "c"}}': "the field 'a' holds an object (it has b), not text",
    '{"q": "x", "a": ["y", "z"]}': "the field 'a' holds 2 values, a pair has one",
    '{"q": "x", "a": []}': "the field 'a' holds 0 values, a pair has one",
    '"text"': "a text, not a record with the field 'q'",
    "5": "a number (5), neither text nor a record with the field 'q'",
    "{": "not JSON",
}  # fmt: skip


@pytest.mark.parametrize("record", BROKEN)
def test_what_is_no_pair_is_reported_with_file_and_line(tmp_path, record, capsys):
    path = written(tmp_path / "x.jsonl", NUMBERS[:20])
    path.write_text(f"{path.read_text('utf-8')}{record}\n", "utf-8")
    config = PrepareConfig((str(path),), str(tmp_path / "data"), **FIELDS)
    prepare(config)
    assert f"left out: {path}:21: {BROKEN[record]}" in capsys.readouterr().err
    assert len(pairs_in(load_dataset(tmp_path / "data"))) == 20
    with pytest.raises(UserError, match=r"x\.jsonl:21: .*--strict stops"):
        prepare(replace(config, strict=True, data_dir=str(tmp_path / "strict")))
    path.write_text(record, "utf-8")
    with pytest.raises(
        UserError, match=r"has no text that can be read: 1 broken record, the first: .*x\.jsonl:1"
    ):
        prepare(replace(config, data_dir=str(tmp_path / "none")))


def test_mistakes_are_one_line(tmp_path):
    for settings, says in (
        ({"prompt_field": "q"}, "--prompt_field and --completion_field belong together: give both"),
        ({"completion_field": "a"}, "--prompt_field and --completion_field belong together"),
        ({**FIELDS, "text_field": "body"}, "--text_field body and --prompt_field q are two ways"),
    ):
        with pytest.raises(UserError, match=says):
            PrepareConfig(**settings)
    (tmp_path / "x.csv").write_text("q,answer\n1,2\n")
    for name in ("x.txt", "x.html"):
        (tmp_path / name).write_text("q,answer\n1,2\n")
    for name, says in (
        ("x.csv", r"x\.csv has no column 'a': give --completion_field, one of q, answer$"),
        ("x.txt", r"x\.txt is read as plain text, which has no pairs: give JSON Lines, JSON, CSV, TSV or"),
        ("x.html", r"x\.html is read as HTML, which has no pairs"),
    ):
        with pytest.raises(UserError, match=says):
            prepare(PrepareConfig((str(tmp_path / name),), str(tmp_path / "data"), **FIELDS))


@pytest.mark.parametrize("split", ["tail", "documents"])
def test_a_split_does_not_cut_a_pair(tmp_path, split):
    data = data_of(tmp_path / "data", NUMBERS, train_split=0.5, split=split)
    assert sorted(pairs_in(data)) == sorted((f"{q}\n", f"{a}<|endoftext|>") for q, a in NUMBERS)
    assert 0.3 < len(data.train) / (len(data.train) + len(data.val)) < 0.7
    assert data.train_mask[:1].tolist() == data.val_mask[:1].tolist() == [0]


def test_texts_have_no_mask_and_a_set_takes_the_place_of_the_other(tmp_path):
    folder = tmp_path / "data"
    pairs = data_of(folder, shard_tokens=700)
    assert {path.name for path in folder.glob("*mask*")} == {
        *(f"train_mask-{i:05}.pt" for i in range(4)), "val_mask-00000.pt",
    }  # fmt: skip
    assert pairs_in(pairs) == pairs_in(data_of(tmp_path / "one"))
    with pytest.raises(UserError, match="holds another data set: give --overwrite"):
        data_of(folder)
    texts = data_of(folder, prompt_field=None, completion_field=None, text_field="q", overwrite=True)
    assert texts.train_mask is texts.val_mask is texts.counted is None
    assert {path.name for path in folder.iterdir()} - {".lock"} == {"train.pt", "val.pt", "vocab.pt"}
    assert load_with_checksum(folder / "vocab.pt")[0]["format"] == 2
    data_of(folder, overwrite=True)
    assert {path.name for path in folder.glob("*_mask.pt")} == {"train_mask.pt", "val_mask.pt"}


def test_a_preparation_that_was_killed_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("nanogpt.data.scan.BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(preparing, "SAVE_SECONDS", 0.0)
    really, calls = preparing.EncodingJob.save_state, []

    def save_state(work, files):
        really(work, files)
        calls.append(work.batches)
        if len(calls) == 5:
            work.append_mask(files, 0, np.ones(3, np.bool_), 3)  # what comes after the save is lost
            raise KeyboardInterrupt

    monkeypatch.setattr(preparing.EncodingJob, "save_state", save_state)
    path = written(tmp_path / "x.jsonl", NUMBERS)
    config = PrepareConfig((str(path),), str(tmp_path / "data"), **FIELDS)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    assert (tmp_path / "data" / WORK / "train_mask.tokens").is_file()
    prepare(config)
    again, whole = load_dataset(tmp_path / "data"), data_of(tmp_path / "whole")
    assert calls[5] == 6  # it went on behind the fifth batch
    assert pairs_in(again) == pairs_in(whole)
    assert (again.counted, again.counted_bytes) == (whole.counted, whole.counted_bytes)


# The folder


@pytest.mark.parametrize("name", ["train_mask.pt", "val_mask.pt"])
def test_a_damaged_mask_is_refused(tmp_path, name):
    data_of(tmp_path / "data")
    path = tmp_path / "data" / name
    raw = path.read_bytes()
    values = torch.load(path, weights_only=True)
    for content, says in (
        (raw[:700] + bytes([raw[700] ^ 1]) + raw[701:], "is damaged (its checksum does not match)"),
        (raw[:400], "is damaged"),
        (None, "is missing"),
    ):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError) as raised:
            load_dataset(tmp_path / "data")
        assert str(raised.value).startswith(f"{path} {says}")
        flags = "--prompt_field q --completion_field a"
        assert flags in str(raised.value)  # the advice prepares pairs again
    vocabulary, _ = load_with_checksum(tmp_path / "data/vocab.pt")
    plain = {key: value for key, value in vocabulary.items() if key not in ("sha256", "blocks")}
    for changed, says in ((values + 1, "has the id 2"), (values[1:].clone(), "do not belong together")):
        torch.save(changed, path)
        save_with_checksum(tmp_path / "data/vocab.pt", plain)
        with pytest.raises(UserError, match=says):
            load_dataset(tmp_path / "data")
    torch.save(values, path)
    for changed in ({"counted": None}, {"counted_bytes": 3}, {"counted": {"train": -1, "val": 1}}):
        save_with_checksum(tmp_path / "data/vocab.pt", {**plain, **changed})
        with pytest.raises(UserError, match=r"vocab\.pt is malformed \((no )?counted"):
            load_dataset(tmp_path / "data")


def test_data_info_says_what_counts(tmp_path, capsys):
    data = data_of(tmp_path / "data")
    assert run_command("data info", ["--data_dir", str(tmp_path / "data")], "data info") == 0
    counted, tokens = sum(data.counted.values()), len(data.train) + len(data.val)
    assert (
        f"Loss: on completions alone, {counted:,} of the tokens ({counted / tokens:.0%})"
        in capsys.readouterr().out
    )


# The loss


@pytest.mark.parametrize("min_vocab", [10**6, 1], ids=["whole", "in chunks"])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_the_loss_is_the_mean_over_the_targets_that_count(monkeypatch, min_vocab, cap):
    monkeypatch.setattr(kernels, "CHUNKED_LOSS_MIN_VOCAB", min_vocab)
    monkeypatch.setattr(device.CPU, "logits_per_chunk", 7 * 50)
    torch.manual_seed(1)
    model = GPT(
        GPTConfig(vocab_size=50, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.0, logit_cap=cap)
    )
    model.head.weight.data.mul_(20)
    x, y = torch.randint(50, (2, 4, 8))
    counts = torch.rand(4, 8) < 0.4
    counts[0] = False
    logits, _ = model(x)
    expected = F.cross_entropy(logits[counts].float(), y[counts])
    found = model.loss(x, torch.where(counts, y, IGNORED))
    torch.testing.assert_close(found, expected)
    weights = list(model.parameters())
    gradients = [torch.autograd.grad(2 * loss, weights) for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
    nothing = model.loss(x, torch.full_like(y, IGNORED))
    assert nothing.item() == 0
    assert not any(bool(gradient.any()) for gradient in torch.autograd.grad(nothing, weights))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_targets_that_do_not_count_are_ignored_and_inputs_are_whole(dtype):
    random = np.random.default_rng(1)
    tokens, mask = random.integers(250, size=100).astype(dtype), random.integers(2, size=100).astype(np.uint8)
    cpu = torch.device("cpu")
    plain, masked, resident = BatchLoader(tokens, cpu), *(BatchLoader(tokens, cpu, mask) for _ in range(2))
    resident.make_resident()
    starts = np.array([0, 7, 91])
    x, y = plain(starts, 8)
    counts = torch.from_numpy(mask[starts[:, None] + np.arange(1, 9)])
    for loader in (masked, resident):
        found = loader(starts, 8)
        assert torch.equal(found[0], x)
        assert torch.equal(found[1], torch.where(counts > 0, y, IGNORED))


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A tiny run on pairs, without dropout."""
    data_of(tmp_path / "data")
    folders = {"data_dir": str(tmp_path / "data"), "out_dir": str(tmp_path / "out")}
    return TrainConfig(
        **{**TINY, "dropout": 0.0, "batch_size": 9, "max_iters": 6, "eval_interval": 3}, **folders
    )


def gradient_and_loss(run) -> list[torch.Tensor]:
    loss = trainer.forward_backward(run, sync=False)
    gradients = [parameter.grad.clone() for parameter in run.model.parameters()]
    run.model.zero_grad()
    return [loss, *gradients]


def sparse(run) -> None:
    """Nothing counts but in the first two windows, and in these a few tokens."""
    starts = run.sampler(0)
    mask = np.zeros(len(run.dataset.train), np.uint8)
    mask[starts[0] + 3 : starts[0] + 9] = mask[starts[1] + 5] = 1
    run.train_loader = BatchLoader(run.dataset.train, run.device, mask)


@pytest.mark.parametrize("few", [False, True])
def test_micro_batches_and_processes_add_up_to_the_whole(config, few, monkeypatch):
    run = set_up(config, RunFolder(Path(config.out_dir)))
    if few:
        sparse(run)
    x, y = trainer.next_batch(run)
    counts = y != IGNORED
    loss = F.cross_entropy(run.model(x)[0][counts], y[counts])
    expected = [loss.detach(), *torch.autograd.grad(loss, list(run.model.parameters()))]
    for pieces in (1, 2, 4, 9):
        run.num_micro_batches = pieces
        torch.testing.assert_close(gradient_and_loss(run), expected)
    monkeypatch.setattr(World, "all_reduce_sum", lambda _world, _mine: counts.sum())
    parts = []
    for rank in range(2):
        run.world, run.num_micro_batches = World(rank, 2), 2
        parts.append(gradient_and_loss(run))
    for whole, first, second in zip(expected, *parts, strict=True):
        factor = 1 if whole.dim() == 0 else 2  # DDP averages gradients
        torch.testing.assert_close((first + second) / factor, whole)
    run.metrics.close()


def test_a_batch_in_which_nothing_counts_changes_no_number_to_nan(config):
    run = set_up(config, RunFolder(Path(config.out_dir)))
    run.train_loader = BatchLoader(run.dataset.train, run.device, np.zeros(len(run.dataset.train), np.uint8))
    loss, norm = trainer.update(run).tolist()
    assert (loss, norm) == (0, 0)
    assert all(bool(parameter.isfinite().all()) for parameter in run.model.parameters())
    windows = run.validation_windows(None)
    none = BatchLoader(run.dataset.val, run.device, np.zeros(len(run.dataset.val), np.uint8))
    with pytest.raises(UserError, match="no token of the validation batches counts"):
        evaluate(run.model, none, windows, dtype=torch.float32)
    run.metrics.close()


# Training


def test_the_validation_loss_is_that_of_completions_and_eval_agrees(config, tmp_path, capsys, monkeypatch):
    fit(config)
    said = capsys.readouterr().out
    data = load_dataset(Path(config.data_dir))
    assert f"Loss: on completions alone, {data.counted['train']:,} of the training tokens" in said
    assert "    What is " in said  # the sample begins with a prompt
    model, _ = load_model(config.out_dir, "cpu")
    losses = []
    for start in range(0, len(data.val) - 1, 16):
        ids = torch.from_numpy(data.val[start : start + 17].astype(np.int64))
        each = F.cross_entropy(model(ids[None, :-1])[0][0], ids[1:], reduction="none")
        losses += each[torch.from_numpy(data.val_mask[start + 1 : start + 17] > 0)].tolist()
    best = load_checkpoint(Path(config.out_dir) / "ckpt.pt").progress["best_val_loss"]
    assert best == pytest.approx(np.mean(losses), rel=1e-5)

    command = ["--checkpoint", config.out_dir, "--data_dir", config.data_dir, "--device", "cpu"]
    assert run_command("eval", [*command, "--json"], "eval") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(best, rel=1e-5)
    assert (found["tokens"], found["bytes"]) == (data.counted["val"], data.counted_bytes["val"])
    assert found["bits_per_byte"] == pytest.approx(data.bits_per_byte(best), rel=1e-5)
    assert run_command("eval", command, "eval") == 0
    assert f"{data.counted['val']:,} tokens of completions, " in capsys.readouterr().out

    data_of(tmp_path / "bytes", tokenizer="byte")  # the other model's split, decoded and encoded anew
    fit(replace(config, data_dir=str(tmp_path / "bytes"), out_dir=str(tmp_path / "other"), max_iters=2))
    capsys.readouterr()
    assert run_command("eval", [*command, "--json", "--against", str(tmp_path / "other")], "eval") == 0
    against = json.loads(capsys.readouterr().out)
    assert against["against"]["bytes"] == found["bytes"]
    assert against["against"]["tokens"] == found["tokens"]
    assert against["loss"] == found["loss"]


def test_a_resumed_run_ends_as_one_that_never_stopped(config):
    config = replace(config, dropout=0.1, gradient_accumulation_steps=2)
    never = replace(config, out_dir=f"{config.out_dir}-never")
    fit(never)
    fit(config, keep_going=lambda step, loss: step < 3)
    fit(replace(config, resume=True))
    one, other = (load_checkpoint(Path(run.out_dir) / "last.pt") for run in (never, config))
    assert all(torch.equal(weight, other.model[name]) for name, weight in one.model.items())
    assert one.progress["best_val_loss"] == other.progress["best_val_loss"]


def test_a_trained_model_answers_and_ends(tmp_path, capsys):
    pairs = [(f"{letter}{other}", letter.upper()) for letter in "abcdefgh" for other in "uvwxyz"]
    data_of(tmp_path / "data", pairs * 3)
    settings = {**TINY, "dropout": 0.0, "max_iters": 300, "eval_interval": 300, "learning_rate": 3e-3}
    out = str(tmp_path / "out")
    fit(TrainConfig(**settings, data_dir=str(tmp_path / "data"), out_dir=out))
    for letter in "adh":
        capsys.readouterr()
        prompt = ["--prompt", rf"{letter}z\n", "--temperature", "0", "--device", "cpu"]
        assert run_command("sample", ["--checkpoint", out, *prompt], "sample") == 0
        assert capsys.readouterr().out == f"{letter}z\n{letter.upper()}\n"
