"""Exports as GGUF: the file says what llama.cpp asks for, and llama.cpp computes our numbers."""

import json
import sys
import unicodedata
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VERSE
from exported import LETTERS, QWEN3, SHAPES, TEXTS, TOKENIZERS, source, trained, word_probe
from hypothesis import given, settings
from llama import Llama

from nanogpt.checkpoint.format import build_model
from nanogpt.errors import UserError
from nanogpt.export.gguf_vocabulary import CONTROL, vocabulary
from nanogpt.export.registry import export
from nanogpt.export.source import TrainedModel
from nanogpt.inference.generate import generate
from nanogpt.model.gpt import GPT
from nanogpt.tokenizer.base import END_OF_TEXT, CharTokenizer, Tokenizer
from nanogpt.tokenizer.bpe import BPETokenizer, ForeignTokenizer

gguf = pytest.importorskip("gguf")
runs = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp (xllamacpp) is not installed")

CPU = torch.device("cpu")
ADDED = len(LETTERS.chars)
"""Id of the end of a text, which LETTERS does not have."""


def tensors(path: Path) -> dict[str, Any]:
    """The tensors of a file by name."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(path: Path) -> dict[str, Any]:
    """The header of a file."""
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_every_weight_is_in_the_file_once(name: str, tmp_path: Path) -> None:
    exported = source(**SHAPES[name])
    export(exported, "gguf", tmp_path / "model.gguf")
    found = tensors(tmp_path / "model.gguf")
    stored = sum(tensor.n_elements for tensor in found.values())
    tables = ["token_embd.weight", *(["output.weight"] if "output.weight" in found else [])]
    zeros = sum(int(tensor.n_elements) for tensor in found.values() if not tensor.data.any())
    added = exported.config.n_embd * len(tables)
    assert stored == exported.num_weights + zeros + added
    assert bool(zeros) == (name == "gpt2 no bias")
    table = exported.weights["token_embedding.weight"].numpy()
    np.testing.assert_array_equal(found["token_embd.weight"].data[:-1], table)
    np.testing.assert_allclose(found["token_embd.weight"].data[-1], table.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize(("dtype", "error"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127)])
def test_matrices_are_rounded_and_the_rest_is_exact(dtype: str, error: float, tmp_path: Path) -> None:
    for name in ("f32", dtype):
        export(source(), "gguf", tmp_path / name, dtype=name)
    full, small = tensors(tmp_path / "f32"), tensors(tmp_path / dtype)
    for name, tensor in small.items():
        exact = full[name].data
        kept = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(exact.shape)
        if name.endswith("bias") or "norm" in name or name == "position_embd.weight":
            np.testing.assert_array_equal(kept, exact)
        else:
            assert tensor.tensor_type.name.lower() == dtype
            assert np.abs(kept - exact).max() <= error * np.abs(exact).max()


def test_rows_that_no_block_divides_stay_in_16_bits(tmp_path: Path) -> None:
    export(source(n_embd=40), "gguf", tmp_path / "model", dtype="q8_0")
    found = tensors(tmp_path / "model")
    assert found["blk.0.attn_qkv.weight"].tensor_type.name == "F16"  # rows of 40
    assert found["blk.0.ffn_down.weight"].tensor_type.name == "Q8_0"  # rows of 160


def test_the_header_says_what_is_known(tmp_path: Path) -> None:
    export(source(**QWEN3), "gguf", tmp_path / "model.gguf", dtype="q8_0")
    found = values(tmp_path / "model.gguf")
    assert found["general.architecture"] == "qwen3"
    assert found["general.name"] == "small"
    assert found["general.file_type"] == 7
    assert "12 updates, best validation loss 2.5000" in found["general.description"]
    assert found["qwen3.attention.key_length"] == found["qwen3.rope.dimension_count"] == 16
    assert found["qwen3.attention.head_count_kv"] == 2
    assert found["tokenizer.ggml.suppress_tokens"] == [ADDED]


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "tokenizer.json"])
def test_a_vocabulary_ends_a_text_with_a_control_token(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    found = vocabulary(tokenizer)
    assert found.tokens[found.end_of_text] == END_OF_TEXT
    assert found.types[found.end_of_text] == CONTROL
    assert len(found.tokens) == len(found.types) == len(set(found.tokens))
    assert found.added_end == (tokenizer.end_of_text is None)
    assert len(found.tokens) == tokenizer.vocab_size + found.added_end
    assert found.added_end or found.end_of_text == tokenizer.end_of_text


def splitting_digits() -> Tokenizer:
    """A tokenizer.json that is byte-level BPE, but splits a text by another rule."""
    bpe = TOKENIZERS["bpe"]
    assert isinstance(bpe, BPETokenizer)
    described = json.loads(bpe.source)
    described["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, described["pre_tokenizer"]],
    }
    tokenizer = BPETokenizer(bpe.source)
    tokenizer.source = json.dumps(described)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (TOKENIZERS["tokenizer.json"], "other than byte-level BPE"),
        (splitting_digits(), "unlike GPT-2 and Qwen2"),
    ],
    ids=["normalizer", "words"],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(tokenizer, reason: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=f"--format gguf cannot carry a tokenizer.json .*{reason}: use --format hf"
    ):
        export(source(tokenizer), "gguf", tmp_path / "model.gguf")
    assert isinstance(tokenizer, ForeignTokenizer) == (reason == "other than byte-level BPE")


# In llama.cpp


@pytest.fixture(scope="module", params=[name for name in TOKENIZERS if name != "tokenizer.json"])
def pair(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tokenizer, Llama]]:
    """One of our tokenizers, and llama.cpp with its export."""
    path = tmp_path_factory.mktemp("export") / "model.gguf"
    export(source(TOKENIZERS[request.param]), "gguf", path)
    with Llama(path) as llama:
        yield TOKENIZERS[request.param], llama


def composed(tokenizer: Tokenizer, text: str) -> str:
    """A text as a tokenizer's normalizer leaves it: llama.cpp has none."""
    return text if tokenizer.keeps_text else unicodedata.normalize("NFC", text)


@runs
@given(text=TEXTS)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_every_text_has_our_ids_and_comes_back(pair: tuple[Tokenizer, Llama], text: str) -> None:
    ours, llama = pair
    text = composed(ours, text)
    known = "".join(char for char in text if not ours.unknown_characters(char))
    ids = ours.encode(known).tolist()
    assert llama.encode(text) == ids  # characters that are not known are left out
    assert llama.decode(ids) == known


@runs
@pytest.mark.parametrize("kind", ["bpe", "qwen3"])
def test_words_are_split_alike_beside_characters_of_every_kind(kind: str, tmp_path: Path) -> None:
    tokenizer, texts = word_probe(kind)
    export(source(tokenizer), "gguf", tmp_path / "model.gguf")
    with Llama(tmp_path / "model.gguf") as llama:
        for text in texts:
            normal = composed(tokenizer, text)
            assert llama.encode(normal) == tokenizer.encode(text).tolist()


@pytest.fixture(
    scope="module",
    params=["gpt2", "gpt2 tanh", "gpt2 no bias", "gpt2 untied", "qwen3", "qwen3 tied", "qwen3 published"],
)
def learned(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, GPT, Llama]]:
    """The name of a shape, a model of it that knows VERSE by heart, and the model in llama.cpp."""
    torch.set_num_threads(1)
    saved = trained(VERSE * 40, block_size=256, **SHAPES[request.param])
    path = tmp_path_factory.mktemp("export") / "model.gguf"
    export(TrainedModel("verse", saved, CharTokenizer.train(VERSE)), "gguf", path)
    with Llama(path) as llama:
        yield request.param, build_model(saved, CPU)[0], llama


PROMPT = CharTokenizer.train(VERSE).encode("From ").tolist()


@runs
def test_200_greedy_tokens_are_ours(learned: tuple[str, GPT, Llama]) -> None:
    _, model, llama = learned
    ours = [int(token) for token in generate(model, torch.tensor([PROMPT]), num_tokens=200, temperature=0)]
    assert llama.continue_greedily(PROMPT, 200)["tokens"] == ours


@runs
def test_probabilities_are_ours(learned: tuple[str, GPT, Llama]) -> None:
    """But for GELU, which llama.cpp looks up in a table of f16, and for the token that it has in addition."""
    name, model, llama = learned
    added = model.config.vocab_size
    answer = llama.continue_greedily(PROMPT, 1, n_probs=added + 1)
    theirs = {
        token["id"]: token["logprob"] for token in answer["completion_probabilities"][0]["top_logprobs"]
    }
    assert sorted(theirs) == [*range(added + 1)]
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT]))[0][0, -1]
    extended = torch.cat((logits, logits.mean(dim=0, keepdim=True))).log_softmax(dim=0)
    expected = torch.tensor([theirs[i] for i in range(added + 1)])
    torch.testing.assert_close(extended, expected, atol=1e-4 if "qwen3" in name else 0.02, rtol=0)


@runs
def test_no_token_of_ours_ends_a_text_and_the_one_that_does_is_never_sampled(learned) -> None:
    """Without a word on it llama.cpp would end a text at token 11."""
    _, _, llama = learned
    answer = llama.continue_greedily(PROMPT, 5, logit_bias=[[11, 1000]])
    assert (answer["tokens"], answer["stop_type"]) == ([11] * 5, "limit")
    forced = len(CharTokenizer.train(VERSE).chars)
    answer = llama.continue_greedily(PROMPT, 5, logit_bias=[[forced, 1000]])
    assert forced not in answer["tokens"]
    assert (len(answer["tokens"]), answer["stop_type"]) == (5, "limit")


@runs
@pytest.mark.skipif(sys.platform == "win32", reason="paths of Windows")
@pytest.mark.parametrize(("dtype", "error"), [("f16", 0.02), ("bf16", 0.05), ("q8_0", 0.1)])
@pytest.mark.parametrize("shape", ["gpt2", "qwen3"])
def test_smaller_files_run(dtype: str, error: float, shape: str, tmp_path: Path) -> None:
    exported = source(**SHAPES[shape])
    export(exported, "gguf", tmp_path / "model.gguf", dtype=dtype)
    prompt = LETTERS.encode("abc").tolist()
    with Llama(tmp_path / "model.gguf") as llama:
        answer = llama.continue_greedily(prompt, 1, n_probs=ADDED)
    theirs = {
        token["id"]: token["logprob"] for token in answer["completion_probabilities"][0]["top_logprobs"]
    }
    with torch.no_grad():
        logits = build_model(exported.saved, CPU)[0](torch.tensor([prompt]))[0][0, -1]
    ours = torch.cat((logits, logits.mean(dim=0, keepdim=True))).log_softmax(dim=0)
    for i, logprob in theirs.items():
        assert logprob == pytest.approx(ours[i].item(), abs=error)
