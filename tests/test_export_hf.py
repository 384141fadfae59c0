"""Exports as Hugging Face folders: transformers computes our logits, and reads and writes our tokens."""

import platform
import re
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import GPT2_SHAPES, LETTERS, QWEN3, SHAPES, TEXTS, TOKENIZERS, checkpoint, source, word_probe
from hypothesis import given, settings

from nanogpt.checkpoint.format import build_model
from nanogpt.cli.parse import parse
from nanogpt.config import TrainConfig
from nanogpt.export.card import NO_RECIPE, model_card
from nanogpt.export.hf import FILES
from nanogpt.export.registry import export
from nanogpt.export.source import Evaluation, TrainedModel
from nanogpt.inference.generate import generate
from nanogpt.tokenizer.base import END_OF_TEXT, CharTokenizer, Tokenizer

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
SAME = 0.0 if platform.machine() == "x86_64" else 1e-5
"""How far the logits of GPT-2 are from ours: elsewhere the product behind Conv1D may round otherwise."""


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no bars."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.utils.logging.disable_progress_bar()


def loaded(folder: Path) -> Any:
    """The model in a folder. Every weight of the file is used, and none is made up."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("name", SHAPES)
def test_the_logits_are_ours(name: str, tmp_path: Path) -> None:
    exported = source(**SHAPES[name])
    export(exported, "hf", tmp_path / "model")
    ours, theirs = build_model(exported.saved, CPU)[0], loaded(tmp_path / "model")
    assert type(theirs).__name__ == ("GPT2LMHeadModel" if name in GPT2_SHAPES else "Qwen3ForCausalLM")
    ids = torch.randint(len(LETTERS.chars), (3, 64), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        difference = (ours(ids)[0] - theirs(ids).logits).abs().max().item()
    assert difference <= (SAME if name in GPT2_SHAPES else 1e-5)


@pytest.mark.parametrize("shape", ["gpt2", "qwen3"])
@pytest.mark.parametrize(("dtype", "torch_dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_is_the_weights_rounded(shape: str, dtype: str, torch_dtype, tmp_path: Path) -> None:
    for name in ("f32", dtype):
        export(source(**SHAPES[shape]), "hf", tmp_path / name, dtype=name)
    full, half = loaded(tmp_path / "f32"), loaded(tmp_path / dtype)
    assert half.dtype == torch_dtype
    for name, weight in full.state_dict().items():
        torch.testing.assert_close(half.state_dict()[name], weight.to(torch_dtype), atol=0, rtol=0)


def test_weights_that_a_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    exported = source()
    exported.saved.model["blocks.0.mlp.fc.weight"][0, 0] = 70_000
    with pytest.raises(
        Exception, match=r"--dtype f16 cannot hold .*h.0.mlp.c_fc.weight.* 70000: use --dtype"
    ):
        export(exported, "hf", tmp_path / "model", dtype="f16")
    assert not [*tmp_path.iterdir()]


def test_greedy_tokens_are_ours(tmp_path: Path) -> None:
    exported = source(**QWEN3)
    export(exported, "hf", tmp_path / "model")
    prompt = LETTERS.encode("abc").tolist()
    theirs = loaded(tmp_path / "model").generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
    ours = generate(build_model(exported.saved, CPU)[0], torch.tensor([prompt]), num_tokens=40, temperature=0)
    assert theirs[0, len(prompt) :].tolist() == [int(token) for token in ours]


# Tokenizers


@pytest.fixture(scope="module", params=[(n, s) for n in TOKENIZERS for s in ("gpt2", "qwen3")], ids=" ".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """One of our tokenizers, and transformers' from its export."""
    tokenizer, folder = TOKENIZERS[request.param[0]], tmp_path_factory.mktemp("export") / "model"
    export(source(tokenizer, **SHAPES[request.param[1]]), "hf", folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.model_max_length = 10**9  # or it warns of long texts
    return tokenizer, theirs


@given(text=TEXTS)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_every_text_has_our_ids_and_comes_back(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = pair
    known = "".join(char for char in text if not ours.unknown_characters(char))
    ids = theirs(text, split_special_tokens=True)["input_ids"]  # characters that are not known are left out
    assert ids == ours.encode(known).tolist()
    assert theirs.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize("kind", ["bpe", "qwen3"])
def test_words_are_split_alike_beside_characters_of_every_kind(kind: str, tmp_path: Path) -> None:
    tokenizer, texts = word_probe(kind)
    export(source(tokenizer), "hf", tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model", model_max_length=10**9)
    for text in texts:
        assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()


def test_the_end_of_text_is_the_same_token(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    assert theirs.eos_token_id == ours.end_of_text
    assert len(theirs) == ours.vocab_size
    if ours.end_of_text is not None:
        assert theirs.decode([ours.end_of_text]) == ours.decode([ours.end_of_text]) == END_OF_TEXT
        assert theirs(END_OF_TEXT)["input_ids"] == [ours.end_of_text]


# The model card


def card_of(**named: Any) -> tuple[TrainedModel, str]:
    """A source, and its card."""
    exported = replace(source(max_iters=20, seed=7, log_to=("jsonl", "tensorboard"), bias=False), **named)
    return exported, model_card(exported, "f32")


def test_the_card_has_the_recipe_as_a_command() -> None:
    exported, card = card_of()
    name, command, *arguments = shlex.split(re.findall(r"```bash\n(.*)\n```", card)[0])
    assert [name, command] == ["nanogpt", "train"]
    parsed, config = parse(TrainConfig, arguments, "nanogpt train"), exported.saved.train_config
    names = [field.name for field in fields(TrainConfig) if field.name not in NO_RECIPE]
    assert [getattr(parsed, name) for name in names] == [getattr(config, name) for name in names]


def test_the_card_says_what_is_known_and_no_more() -> None:
    exported, card = card_of()
    assert f"{exported.num_weights:,} parameters" in card
    assert "Validation loss: 2.5000 nats per token." in card
    assert "| step |" not in card
    assert "from step 12 of the 20 that were planned" in card
    assert "f" * 64 in card
    assert not re.search("license|language:|datasets|epochs|split:", card)
    _, card = card_of(curve=[Evaluation(6, 3.0, 4.0), Evaluation(12, 2.5, 3.25)])
    assert (
        "| step | validation loss | bits per byte |\n| --- | --- | --- |\n| 6 | 3.0000 | 4.0000 |\n" in card
    )


def test_the_card_names_no_folder_of_the_machine() -> None:
    folders = {name: f"/home/somebody/secret/{name}" for name in ("data_dir", "out_dir", "init_from")}
    card = model_card(TrainedModel("small", checkpoint(**folders), LETTERS), "f32")
    assert "somebody" not in card
    assert "secret" not in card


def test_a_fine_tuned_model_is_not_said_to_be_trained_from_scratch() -> None:
    scratch, tuned = (
        model_card(TrainedModel("small", checkpoint(init_from=base), LETTERS), "f32")
        for base in (None, "runs/base")
    )
    assert "trained from scratch with NanoGPT" in scratch
    assert "--init_from" not in scratch
    assert "fine-tuned from another model with NanoGPT" in tuned
    assert "from scratch" not in tuned
    assert "--init_from MODEL" in tuned


@pytest.mark.parametrize(
    ("progress", "says"),
    [
        ({"step": 12, "best_val_loss": float("inf")}, "It was not evaluated."),
        ({"step": 12, "best_val_loss": 2.0, "evaluated_at": 9}, "Lowest validation loss of the run"),
        ({"step": 12, "best_val_loss": 2.0, "evaluated_at": 12, "worse_evaluations": 1}, "Lowest validation"),
    ],
)
def test_the_loss_is_that_of_the_weights_or_said_to_be_another(progress: dict[str, Any], says: str) -> None:
    assert says in model_card(TrainedModel("small", replace(checkpoint(), progress=progress), LETTERS), "f32")


@pytest.mark.parametrize(
    "tokenizer", [LETTERS, CharTokenizer.train("abc"), TOKENIZERS["bpe"]], ids=["", "abc", "bpe"]
)
def test_the_python_of_the_card_runs(tokenizer: Tokenizer, tmp_path: Path, monkeypatch, capsys) -> None:
    export(source(tokenizer), "hf", tmp_path / "small")
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == sorted(FILES)
    monkeypatch.chdir(tmp_path)
    code = re.findall(
        r"```python\n(.*?)```", (tmp_path / "small" / "README.md").read_text("utf-8"), re.DOTALL
    )[0]
    exec(code, {})
    assert capsys.readouterr().out.strip()
