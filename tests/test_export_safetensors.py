"""Exports as safetensors: others find weights, settings and tokenizer; nothing is rounded."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from exported import LETTERS, REFUSED, SHAPES, TOKENIZERS, checkpoint, source

from nanogpt.checkpoint.format import build_model
from nanogpt.config import GPTConfig, from_dict
from nanogpt.export.registry import export
from nanogpt.export.source import TrainedModel
from nanogpt.model.gpt import GPT
from nanogpt.tokenizer.registry import from_dict as tokenizer_from_dict

safetensors = pytest.importorskip("safetensors")


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors in a file, and what its metadata say."""
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        return tensors, json.loads(file.metadata()["nanogpt"])


@pytest.mark.parametrize("settings", [*SHAPES.values(), *REFUSED.values()], ids=[*SHAPES, *REFUSED])
def test_every_model_comes_back_bit_for_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    exported = source(**settings)
    export(exported, "safetensors", tmp_path / "model.safetensors")
    weights, metadata = read(tmp_path / "model.safetensors")
    config = from_dict(GPTConfig, metadata["config"])
    assert config == exported.config
    model = GPT(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["head.weight"] if config.tied else [], [])
    original, _ = build_model(exported.saved, torch.device("cpu"))
    for name, weight in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_is_in_the_file_twice(name: str, tmp_path: Path) -> None:
    """As we save it, and as Hugging Face's library reads it."""
    tokenizer = TOKENIZERS[name]
    export(source(tokenizer), "safetensors", tmp_path / "model.safetensors")
    _, metadata = read(tmp_path / "model.safetensors")
    text = "It's a dog's life, 12 \u00e9\n"
    expected = tokenizer.encode(text).tolist()
    assert tokenizer_from_dict(metadata["tokenizer"]).encode(text).tolist() == expected
    theirs = tokenizers.Tokenizer.from_str(json.dumps(metadata["tokenizer.json"]))
    assert theirs.encode(text).ids == expected
    assert theirs.decode(expected) == text


def test_the_recipe_and_the_loss_are_in_the_file_but_no_folders(tmp_path: Path) -> None:
    saved = checkpoint(data_dir="/home/somebody/letters", init_from="/home/somebody/base", seed=7)
    export(TrainedModel("small", saved, LETTERS), "safetensors", tmp_path / "model.safetensors")
    _, metadata = read(tmp_path / "model.safetensors")
    assert (metadata["training"]["seed"], metadata["training"]["init_from"]) == (7, "MODEL")
    assert (metadata["step"], metadata["val_loss"], metadata["version"]) == (12, 2.5, 1)
    assert b"somebody" not in (tmp_path / "model.safetensors").read_bytes()


def test_a_smaller_dtype_is_the_weights_rounded(tmp_path: Path) -> None:
    exported = source()
    export(exported, "safetensors", tmp_path / "model.safetensors", dtype="bf16")
    weights, _ = read(tmp_path / "model.safetensors")
    for name, weight in exported.weights.items():
        assert torch.equal(weights[name], weight.bfloat16())
