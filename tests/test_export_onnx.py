"""Exports as ONNX: onnxruntime computes our logits in any steps and batches, transformers.js our texts."""

import itertools
import json
import os
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import ALPHABET, EVERY_SHAPE, LETTERS, SHAPES, TOKENIZERS, source
from torch import Tensor

from nanogpt.checkpoint.format import build_model
from nanogpt.errors import UserError
from nanogpt.export import onnx as exporter
from nanogpt.export.html import rounded
from nanogpt.export.registry import export
from nanogpt.export.source import TrainedModel
from nanogpt.inference.generate import generate
from nanogpt.model.gpt import GPT
from nanogpt.tokenizer.base import Tokenizer

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

CPU = torch.device("cpu")
CONTEXT = 128
JS = os.environ.get("TRANSFORMERS_JS", "")
"""A folder in which transformers.js is installed, as tests/transformers_js.mjs says."""

each_shape = pytest.mark.parametrize("shape", EVERY_SHAPE)


class Session:
    """An exported model in onnxruntime, and what it has read: a batch of texts."""

    def __init__(self, folder: Path, batch: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.model = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", options)
        sizes = {"batch_size": batch, "past_sequence_length": 0}
        self.past = {
            described.name: np.zeros([sizes.get(size, size) for size in described.shape], np.float32)
            for described in self.model.get_inputs()
            if described.name.startswith("past")
        }
        self.mask = np.ones((batch, 0), np.int64)

    def read(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The logits after each of these tokens, (B, T) -> (B, T, V). mask: 0 for padding."""
        new = np.ones(ids.shape, np.int64) if mask is None else mask.numpy()
        self.mask = np.concatenate((self.mask, new), axis=1)
        positions = (self.mask.cumsum(axis=1) - 1).clip(0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids.numpy(), "attention_mask": self.mask, "position_ids": positions}
        logits, *present = self.model.run(None, inputs | self.past)
        self.past = dict(zip(self.past, present, strict=True))
        return torch.from_numpy(logits)

    def continue_greedily(self, prompt: Tensor, count: int) -> list[int]:
        """The likeliest token after another."""
        tokens, ids = list[int](), prompt
        for _ in range(count):
            tokens.append(int(self.read(ids)[0, -1].argmax()))
            ids = torch.tensor([tokens[-1:]])
        return tokens


def exported(folder: Path, shape: str, **settings: Any) -> tuple[TrainedModel, GPT]:
    """A model that is exported to a folder; its source and itself."""
    made = source(**EVERY_SHAPE[shape] | {"block_size": CONTEXT} | settings)
    export(made, "onnx", folder)
    return made, build_model(made.saved, CPU)[0]


def random_ids(*size: int) -> Tensor:
    """Any tokens of LETTERS."""
    return torch.randint(len(LETTERS.chars), size, generator=torch.Generator().manual_seed(3))


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@each_shape
def test_100_greedy_tokens_are_ours(shape: str, tmp_path: Path) -> None:
    _, model = exported(tmp_path / "model", shape)
    prompt = random_ids(1, 9)
    ours = [int(token) for token in generate(model, prompt, num_tokens=100, temperature=0)]
    assert Session(tmp_path / "model").continue_greedily(prompt, 100) == ours


@each_shape
@torch.no_grad()
def test_logits_are_ours_in_steps_of_any_length(shape: str, tmp_path: Path) -> None:
    _, model = exported(tmp_path / "model", shape)
    ids = random_ids(3, CONTEXT)
    choose = random.Random(shape)
    cuts = sorted({0, 1, 2, CONTEXT, *(choose.randrange(3, CONTEXT) for _ in range(8))})
    session = Session(tmp_path / "model", batch=3)
    found = [session.read(ids[:, start:end]) for start, end in itertools.pairwise(cuts)]
    close(torch.cat(found, dim=1), model(ids)[0])


@each_shape
@torch.no_grad()
def test_texts_of_different_lengths_share_a_batch_with_padding_before_them(
    shape: str, tmp_path: Path
) -> None:
    _, model = exported(tmp_path / "model", shape)
    ids, lengths, more = random_ids(4, 20), (20, 7, 1, 13), 5
    mask = torch.stack([torch.arange(20) >= 20 - length for length in lengths]).long()
    session = Session(tmp_path / "model", batch=4)
    found = [session.read(ids, mask), *(session.read(ids[:, i : i + 1]) for i in range(more))]
    for row, length in enumerate(lengths):
        text = torch.cat((ids[row, 20 - length :], ids[row, :more]))
        close(torch.cat(found, dim=1)[row, 20 - length :], model(text[None])[0][0])


@pytest.mark.parametrize("dtype", ["f16", "bf16", "int8"])
@pytest.mark.parametrize("shape", ["gpt2", "qwen3", "preset cpu"])
@torch.no_grad()
def test_smaller_files_are_the_rounded_weights(dtype: str, shape: str, tmp_path: Path) -> None:
    made, model = exported(tmp_path / "full", shape)
    export(made, "onnx", tmp_path / "model", dtype=dtype)
    full, size = ((tmp_path / name / "onnx" / "model.onnx").stat().st_size for name in ("full", "model"))
    assert size < full * (0.4 if dtype == "int8" else 0.6)
    for weight in model.parameters():
        if dtype == "int8":
            weight.copy_(rounded(weight))
        elif weight.dim() > 1:
            weight.copy_(weight.to({"f16": torch.float16, "bf16": torch.bfloat16}[dtype]))
    ids = random_ids(2, 40)
    close(Session(tmp_path / "model", batch=2).read(ids), model(ids)[0])


@torch.no_grad()
def test_beyond_the_context_rope_goes_on_and_learned_positions_fail(tmp_path: Path) -> None:
    made, _ = exported(tmp_path / "rope", "qwen3")
    longer = GPT(replace(made.config, block_size=2 * CONTEXT)).eval()
    longer.load_state_dict(made.weights)
    ids = random_ids(1, CONTEXT + 40)
    close(Session(tmp_path / "rope").read(ids), longer(ids)[0])
    exported(tmp_path / "learned", "gpt2")
    session = Session(tmp_path / "learned")
    session.read(ids[:, :CONTEXT])
    with pytest.raises(Exception, match=f"out of data bounds, idx={CONTEXT}"):
        session.read(ids[:, CONTEXT:])


@pytest.mark.parametrize("shape", ["gpt2", "qwen3", "preset cpu", "hashed pairs"])
@torch.no_grad()
def test_the_standard_defines_the_same_numbers(shape: str, tmp_path: Path) -> None:
    """In onnx's own evaluator, which shares no code with onnxruntime."""
    from onnx.reference import ReferenceEvaluator

    _, model = exported(tmp_path / "model", shape)
    path, ids = tmp_path / "model" / "onnx" / "model.onnx", random_ids(1, 6)
    onnx.checker.check_model(path, full_check=True)
    inputs = {
        "input_ids": ids.numpy(),
        "attention_mask": np.ones((1, 6), np.int64),
        "position_ids": np.arange(6)[None],
    }
    with np.errstate(over="ignore"):  # hashes do
        logits, *_ = ReferenceEvaluator(str(path)).run(None, inputs | Session(tmp_path / "model").past)
    close(torch.from_numpy(logits), model(ids)[0])


@pytest.mark.parametrize(
    ("shape", "model_type", "layers"),
    [("gpt2", "gpt2", 2), ("qwen3", "qwen3", 2), ("--mlp relu2", "qwen3", 2), ("preset cpu", "qwen3", 3)],
)
def test_the_cache_is_as_config_json_says(shape: str, model_type: str, layers: int, tmp_path: Path) -> None:
    made, _ = exported(tmp_path / "model", shape)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == model_type
    assert config.get("n_layer", config.get("num_hidden_layers")) == layers
    assert (config["vocab_size"], config["eos_token_id"]) == (made.config.vocab_size, None)
    described = Session(tmp_path / "model").model.get_inputs()
    names = [f"past_key_values.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    assert [each.name for each in described] == ["input_ids", "attention_mask", "position_ids", *names]
    heads = config.get("num_key_value_heads", config.get("n_head"))
    width = made.config.head_width
    assert described[-1].shape == ["batch_size", heads, "past_sequence_length", width]


def test_a_file_that_would_be_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = source()
    monkeypatch.setattr(exporter, "MAX_BYTES", 2 * made.num_weights)
    with pytest.raises(UserError, match=r"--format onnx holds [\d,]+ bytes, and in f32 these weights have 4"):
        export(made, "onnx", tmp_path / "model")
    assert not [*tmp_path.iterdir()]
    export(made, "onnx", tmp_path / "model", dtype="f16")


# In transformers.js


needs_js = pytest.mark.skipif(
    not JS or shutil.which("node") is None, reason="TRANSFORMERS_JS names no folder with transformers.js"
)


def in_transformers_js(folder: Path, prompts: list[str], count: int, texts: list[str]) -> dict[str, Any]:
    """What tests/transformers_js.mjs answers."""
    done = subprocess.run(
        ["node", str(Path(__file__).parent / "transformers_js.mjs"), JS],
        input=json.dumps({"model": str(folder), "prompts": prompts, "count": count, "texts": texts}).encode(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@needs_js
@each_shape
def test_texts_in_transformers_js_are_ours(shape: str, tmp_path: Path) -> None:
    _, model = exported(tmp_path / "model", shape)
    prompts = ["A", "It is a dog"]
    ours = [
        prompt + LETTERS.decode([int(token) for token in generate(model, ids, num_tokens=100, temperature=0)])
        for prompt in prompts
        for ids in [torch.from_numpy(LETTERS.encode(prompt).astype(np.int64))[None]]
    ]
    assert in_transformers_js(tmp_path / "model", prompts, 100, [])["written"] == ours


@needs_js
@pytest.mark.parametrize("shape", ["gpt2", "qwen3"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_in_transformers_js_are_ours(name: str, shape: str, tmp_path: Path) -> None:
    tokenizer: Tokenizer = TOKENIZERS[name]
    export(source(tokenizer, **SHAPES[shape]), "onnx", tmp_path / "model")
    choose = random.Random(1)
    texts = ["".join(choose.choices(ALPHABET, k=choose.randrange(1, 20))) for _ in range(200)]
    found = in_transformers_js(tmp_path / "model", [], 0, texts)
    ids = [tokenizer.encode(text).tolist() for text in texts]
    assert found == {"written": [], "ids": ids, "decoded": [tokenizer.decode(each) for each in ids]}
