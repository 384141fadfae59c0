"""A sealed checkpoint with wrong content is one line, wherever it is read; a right one is never refused."""

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanogpt.checkpoint.format import Checkpoint, load_checkpoint, load_model, save_checkpoint, write_sealed
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.config import TrainConfig
from nanogpt.errors import UserError
from nanogpt.training.fit import fit
from nanogpt.training.setup import set_up


@pytest.fixture
def small(config: TrainConfig) -> TrainConfig:
    """The settings of a finished run, which has an average and two optimizers."""
    small = replace(
        config, n_layer=1, n_embd=16, max_iters=2, eval_interval=2, optimizer="muon", ema_decay=0.5
    )
    fit(small)
    return small


@pytest.fixture
def content(small: TrainConfig) -> dict[str, Any]:
    """What its last.pt holds."""
    return vars(load_checkpoint(Path(small.out_dir) / "last.pt"))


def drop(part: Any, key: Any) -> Any:
    del part[key]


def put(part: Any, key: Any, value: Any) -> Any:
    part[key] = value


WEIGHT = "blocks.0.mlp.fc.weight"

WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "progress {}": (lambda c: put(c, "progress", {}), "progress has no step"),
    "progress []": (lambda c: put(c, "progress", []), "progress is not a dictionary"),
    "unknown progress": (lambda c: put(c["progress"], "epoch", 1), "unknown number epoch"),
    "step a text": (lambda c: put(c["progress"], "step", "2"), "progress: step is '2'"),
    "step a float": (lambda c: put(c["progress"], "step", 2.5), "progress: step is 2.5"),
    "step negative": (lambda c: put(c["progress"], "step", -1), "progress: step is -1"),
    "loss a list": (lambda c: put(c["progress"], "best_val_loss", []), "best_val_loss is []"),
    "tokenizer {}": (lambda c: put(c, "tokenizer", {}), "the tokenizer does not work"),
    "tokenizer None": (lambda c: put(c, "tokenizer", None), "tokenizer is not a dictionary"),
    "characters a number": (lambda c: put(c["tokenizer"], "chars", 5), "the tokenizer does not work"),
    "bpe of nothing": (lambda c: put(c, "tokenizer", {"kind": "bpe"}), "the tokenizer does not work"),
    "bpe of garbage": (
        lambda c: put(c, "tokenizer", {"kind": "bpe", "tokenizer.json": "{"}),
        "the tokenizer does not work",
    ),
    "one character less": (lambda c: put(c["tokenizer"], "chars", "abc"), "but the tokenizer has"),
    "vocab_size huge": (lambda c: put(c, "vocab_size", 2**62), "but the tokenizer has"),
    "vocab_size None": (lambda c: put(c, "vocab_size", None), "vocab_size is None"),
    "optimizers []": (lambda c: put(c, "optimizers", []), "it has 0 optimizers, the run needs 2"),
    "optimizers None": (lambda c: put(c, "optimizers", None), "optimizers is not a list"),
    "optimizers [1]": (lambda c: put(c, "optimizers", [1]), "an optimizer has no state"),
    "one optimizer": (lambda c: drop(c["optimizers"], 1), "it has 1 optimizers"),
    "exchanged optimizers": (lambda c: c["optimizers"].reverse(), "optimizer has"),
    "no moment": (lambda c: drop(c["optimizers"][0]["state"][0], "exp_avg"), "has the moments"),
    "moment of another shape": (
        lambda c: put(c["optimizers"][0]["state"][0], "exp_avg", torch.zeros(3)),
        "exp_avg of parameter 0 is of shape (3,)",
    ),
    "moment a number": (lambda c: put(c["optimizers"][0]["state"][0], "exp_avg", 1.0), "is not a tensor"),
    "a tensor missing": (lambda c: drop(c["model"], WEIGHT), f"the tensor '{WEIGHT}' is missing"),
    "a tensor too many": (lambda c: put(c["model"], "more", torch.zeros(1)), "the tensor more is unknown"),
    "another shape": (lambda c: put(c["model"], WEIGHT, torch.zeros(3)), "is of shape (3,)"),
    "another dtype": (lambda c: put(c["model"], WEIGHT, c["model"][WEIGHT].half()), "torch.float16"),
    "sparse": (lambda c: put(c["model"], WEIGHT, c["model"][WEIGHT].to_sparse()), "is not a tensor"),
    "average cut": (lambda c: drop(c["average"], WEIGHT), "average: the tensor"),
    "model None": (lambda c: put(c, "model", None), "model is not a dictionary"),
    "config None": (lambda c: put(c, "config", None), "config is not a dictionary"),
    "config of another type": (lambda c: put(c["config"], "n_layer", "1"), "--n_layer '1' is of type str"),
    "endless layers": (lambda c: put(c["config"], "n_layer", 10**15), "layers do not fit"),
    "endless width": (lambda c: put(c["config"], "n_embd", 2**62), "a model that is too large"),
    "other width": (lambda c: put(c["config"], "n_embd", 32), "is of shape"),
    "shards a list": (lambda c: put(c, "shards", ["a"]), "shards is not a dictionary"),
    "shards elsewhere": (lambda c: put(c, "shards", {"../../etc/x": "0"}), "a shard has the name"),
    "shards without checksum": (lambda c: put(c, "shards", {"shards/1/.metadata": 0}), "has no checksum"),
    "format a text": (lambda c: put(c, "format", "new"), "has format new"),
    "scaler a text": (lambda c: put(c["scaler"], "scale", "much"), "scaler: scale is much"),
    "dtype unknown": (lambda c: put(c["precision"], "dtype", "int8"), "precision has the dtype int8"),
    "no device": (lambda c: drop(c["precision"], "device"), "precision has no device"),
    "no micro-batches": (
        lambda c: put(c["precision"], "num_micro_batches", 0),
        "precision has 0 micro-batches",
    ),
    "threads a text": (lambda c: put(c["precision"], "threads", "two"), "precision has the threads two"),
    "fingerprint a number": (lambda c: put(c, "fingerprint", 7), "the fingerprint is not a string"),
}


def use(small: TrainConfig, path: Path) -> None:
    """Sample from a checkpoint and resume it, as the commands do."""
    load_model(path, "cpu")
    folder = RunFolder(path.parent)
    folder.saved_config()
    run = set_up(replace(small, resume=True), folder)
    run.metrics.close()


def test_what_a_run_writes_is_right(small: TrainConfig) -> None:
    for name in ("last.pt", "ckpt.pt"):
        use(small, Path(small.out_dir) / name)


def test_every_wrong_part_is_one_line_that_names_it(small: TrainConfig, content: dict[str, Any]) -> None:
    path = Path(small.out_dir) / "last.pt"
    (Path(small.out_dir) / "ckpt.pt").unlink()
    for change, message in WRONG.values():
        wrong = copy.deepcopy(content)
        change(wrong)
        write_sealed(path, wrong)
        with pytest.raises(UserError) as raised:
            use(small, path)
        line = str(raised.value)
        assert message in line
        assert "malformed" in line or "has format" in line
        assert "\n" not in line


def places(part: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a nested content."""
    found: list[tuple[Any, Any]] = []
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for key, value in list(items):
        found += [(part, key), *places(value)]
    return found


VALUES = [
    None, {}, [], "", "x", 0, -1, 1, 2.5, float("nan"), float("inf"), 10**30, 2**62, True, (), b"x",
    {"state": {}}, {7: 7}, [1], torch.zeros(0), torch.zeros(3), torch.ones(2, 2, dtype=torch.int8),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_mutated_checkpoints_load_or_are_a_user_error(
    small: TrainConfig, content: dict[str, Any], seed: int, capsys
) -> None:
    chance = random.Random(seed)
    path = Path(small.out_dir) / "last.pt"
    (path.parent / "ckpt.pt").unlink()
    content["config"] = {**content["config"], "save_seconds": 1e9}
    for _ in range(40):
        mutated = copy.deepcopy(content)
        for _ in range(chance.choice((1, 1, 2))):
            top = chance.choice(list(mutated))
            part, key = chance.choice([(mutated, top), *places(mutated[top])])
            if chance.random() < 0.25 and isinstance(part, dict):
                del part[key]
            else:
                part[key] = chance.choice(VALUES)
        write_sealed(path, mutated)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                use(small, path)
            except UserError as error:
                assert "\n" not in str(error)  # noqa: PT017
        capsys.readouterr()


def test_what_would_not_load_again_is_not_written(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"the old file")
    for value in (np.int64(3), Path("a"), torch.bfloat16, {1, 2}, 2**3000, object()):
        wrong = Checkpoint(**{**content, "config": {**content["config"], "seed": value}})
        with pytest.raises(TypeError, match=r"checkpoint\[config\]\[seed\]"):
            save_checkpoint(path, wrong)
    assert path.read_bytes() == b"the old file"
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".part"] == []


def test_a_pickle_of_another_protocol_is_one_line_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save({"format": 2}, path, pickle_protocol=4, _use_new_zipfile_serialization=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=r"ckpt\.pt"):
            load_checkpoint(path)
        assert RunFolder(tmp_path).saved_config() is None
    write_sealed(path, {"format": 2})
    raw = path.read_bytes()
    torch.save({"format": 2}, path, pickle_protocol=4)
    assert raw != path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RunFolder(tmp_path).saved_config() is None


def test_a_file_system_that_maps_no_files_shows_the_settings_all_the_same(
    small: TrainConfig, monkeypatch
) -> None:
    real = torch.load

    def no_mmap(*args: Any, **options: Any) -> Any:
        if options.get("mmap"):
            raise RuntimeError("unable to mmap 100 bytes from file <last.pt>: No such device (19)")
        return real(*args, **options)

    monkeypatch.setattr(torch, "load", no_mmap)
    assert RunFolder(Path(small.out_dir)).saved_config() == small
