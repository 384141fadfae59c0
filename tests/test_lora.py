"""LoRA: adapters alone are trained; merged equals unmerged, resumed never stopped; peft computes the same."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_initialize import PUBLISHED_QWEN3, same_logits, tokens_of, transformers_model

from nanogpt.checkpoint.format import load_checkpoint, load_model
from nanogpt.cli.main import run_command
from nanogpt.config import TrainConfig, model_config
from nanogpt.errors import UserError
from nanogpt.initialize.registry import open_source
from nanogpt.machine.device import pick_device
from nanogpt.model.gpt import GPT
from nanogpt.model.lora import adapter_scale, add_adapters, is_adapter, merged
from nanogpt.model.size import flops_per_token, meta_model
from nanogpt.training import memory_estimate
from nanogpt.training.fit import fit


@pytest.fixture
def base(config: TrainConfig) -> TrainConfig:
    """A finished training, whose folder is the source of others."""
    fit(replace(config, max_iters=4, eval_interval=2))
    return config


def adapted(base: TrainConfig, out_dir: Path, **settings: Any) -> TrainConfig:
    """A training of adapters beside its weights."""
    options = {
        "init_from": base.out_dir,
        "lora_rank": 2,
        "lora_dropout": 0.1,
        "max_iters": 6,
        "eval_interval": 3,
    }
    return replace(base, **{**options, "out_dir": str(out_dir), **settings})


def test_adapters_alone_are_trained_and_merged_equals_unmerged(
    base: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = adapted(base, tmp_path / "tuned")
    fit(config)
    assert "LoRA: 2,048 parameters in adapters are trained" in capsys.readouterr().out
    before = load_checkpoint(Path(base.out_dir) / "ckpt.pt")
    saved = load_checkpoint(tmp_path / "tuned" / "ckpt.pt")
    for name, weight in before.model.items():
        assert torch.equal(weight, saved.model[name]), name
    adapters = {name: weight for name, weight in saved.model.items() if name not in before.model}
    assert len(adapters) == 2 * 4 * 2
    assert all(map(is_adapter, adapters))
    assert all(bool(weight.any()) for weight in adapters.values())
    indices = {index for optimizer in saved.optimizers for index in optimizer["state"]}
    assert len(indices) == len(adapters)

    model, _ = load_model(tmp_path / "tuned" / "ckpt.pt")
    unmerged = GPT(saved.model_config)
    add_adapters(unmerged, config)
    unmerged.load_state_dict(saved.model)
    assert not any(is_adapter(name) for name in model.state_dict())
    same_logits(model, lambda idx: unmerged.eval()(idx)[0])


def test_a_model_with_new_adapters_is_the_model(base: TrainConfig) -> None:
    model, tokenizer = load_model(Path(base.out_dir) / "ckpt.pt")
    config = adapted(base, Path("out"))
    other = GPT(model_config(config, tokenizer.vocab_size))
    other.load_state_dict(model.state_dict())
    add_adapters(other, config)
    same_logits(model, lambda idx: other.eval()(idx)[0])
    trained = {name for name, parameter in other.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in other.state_dict() if is_adapter(name)}
    plain = merged(other.state_dict(), adapter_scale(config))
    assert all(torch.equal(weight, plain[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    "settings", [{}, {"optimizer": "muon", "ema_decay": 0.9}], ids=["adamw", "muon, ema"]
)
def test_resume_is_exact(
    settings: dict[str, Any], base: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(adapted(base, tmp_path / "whole", **settings))
    half = adapted(base, tmp_path / "half", **settings)
    fit(half, keep_going=lambda step, loss: step < 3)
    Path(base.out_dir).rename(tmp_path / "gone")
    fit(replace(half, resume=True))
    ends = [load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "half")]
    for field in ("model", "average"):
        first, second = (getattr(end, field) for end in ends)
        assert first.keys() == second.keys()
        assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    capsys.readouterr()
    for flags in (("--lora_rank", "3"), ("--lora_alpha", "1")):
        assert run_command("train", ["--resume", "--out_dir", half.out_dir, *flags], "train") == 2
        assert f"{flags[0]} " in capsys.readouterr().err


def test_commands_take_a_checkpoint_with_adapters(base: TrainConfig, tmp_path: Path) -> None:
    fit(adapted(base, tmp_path / "tuned"))
    path = str(tmp_path / "tuned" / "ckpt.pt")
    sample = ["--checkpoint", path, "--num_tokens", "5", "--device", "cpu"]
    for extra in ([], ["--quantize", "int8"]):
        assert run_command("sample", [*sample, *extra], "sample") == 0
    assert (
        run_command("eval", ["--checkpoint", path, "--data_dir", base.data_dir, "--device", "cpu"], "eval")
        == 0
    )
    model, _ = load_model(path)
    again = replace(base, init_from=path, out_dir=str(tmp_path / "again"), max_iters=1)
    fit(again, keep_going=lambda step, loss: False)
    first = load_checkpoint(tmp_path / "again" / "last.pt")
    assert first.model.keys() == model.state_dict().keys()


def test_a_folder_of_adapters_is_no_model_and_the_line_names_their_run(tmp_path: Path, capsys) -> None:
    folder, checkpoint = tmp_path / "tuned" / "adapter", tmp_path / "tuned" / "ckpt.pt"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    for advice in (
        "merge them into their model first (peft)",
        f"give the checkpoint of their run, {checkpoint}",
    ):
        for command, flag in (("sample", "--checkpoint"), ("eval", "--checkpoint"), ("train", "--init_from")):
            assert run_command(command, [flag, str(folder)], command) == 2
            line = f"error: {flag} {folder} holds adapters alone (LoRA), no whole model: {advice}\n"
            assert capsys.readouterr().err == line
        checkpoint.touch()


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft asks for it
@pytest.mark.parametrize(
    ("kind", "settings"), [("gpt2", {}), ("qwen3", {}), ("qwen3", PUBLISHED_QWEN3)], ids=str
)
def test_peft_loads_the_adapters(
    kind: str, settings: dict[str, Any], tmp_path: Path, text: str, config: TrainConfig
) -> None:
    peft = pytest.importorskip("peft")
    import transformers

    tokens_of(tmp_path / "hf", text)
    transformers_model(kind, **settings).save_pretrained(tmp_path / "hf")
    source = open_source(str(tmp_path / "hf"))
    shape = {**source.settings, "block_size": 16}
    data = {
        "data_dir": str(tmp_path / "bpe_data"),
        "init_from": source.name,
        "lora_rank": 4,
        "lora_alpha": 12.0,
    }
    fit(replace(config, **shape, **data, max_iters=10, out_dir=str(tmp_path / "tuned")))
    model, _ = load_model(tmp_path / "tuned" / "ckpt.pt")
    folder = tmp_path / "tuned" / "adapter"
    described = json.loads((folder / "adapter_config.json").read_text())
    assert described["fan_in_fan_out"] is (kind == "gpt2")
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        idx = torch.randint(model.config.vocab_size, (1, 16))
        before = original(idx).logits
        beside = peft.PeftModel.from_pretrained(original, folder).eval()
        assert not torch.allclose(before, beside(idx).logits, atol=1e-2)
    same_logits(model, lambda idx: beside(idx).logits)


@pytest.mark.parametrize("settings", [{"mlp": "relu2"}, {"head_dim": 6}], ids=str)
def test_what_peft_cannot_have_is_not_written(
    settings: dict[str, Any], config: TrainConfig, tmp_path: Path
) -> None:
    base = replace(config, max_iters=2, **settings)
    fit(base)
    fit(adapted(base, tmp_path / "tuned", max_iters=2))
    assert not (tmp_path / "tuned" / "adapter").exists()


def test_a_new_run_moves_the_adapters_of_the_earlier_one(base: TrainConfig, tmp_path: Path) -> None:
    fit(adapted(base, tmp_path / "tuned", max_iters=3))
    assert (tmp_path / "tuned" / "adapter").is_dir()
    fit(replace(base, out_dir=str(tmp_path / "tuned"), max_iters=1))
    assert not (tmp_path / "tuned" / "adapter").exists()
    assert (tmp_path / "tuned" / "previous" / "1" / "adapter" / "adapter_model.safetensors").is_file()


def test_adapters_cost_less(base: TrainConfig) -> None:
    """Gradients and moments are those of the adapters; a frozen weight has two products of three."""
    full, few = replace(base, init_from="x"), adapted(base, Path("out"))
    shape = model_config(full, 65)
    device = pick_device("cpu")
    all_, some = (memory_estimate.predict(shape, config, device, torch.float32, 2) for config in (full, few))
    assert some.gradients == 4 * 2048
    assert some.optimizer < all_.optimizer / 5
    model, other = meta_model(shape), meta_model(shape)
    add_adapters(other, few)
    assert flops_per_token(other) < 0.9 * flops_per_token(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_from": None}, "--lora_rank 2 trains beside weights that stay as they are: give --init_from"),
        ({"lora_rank": 0}, "--lora_dropout 0.1 is for LoRA: give --lora_rank too"),
        ({"lora_rank": -1}, "--lora_rank -1 is too small"),
        ({"lora_alpha": 0.0}, "--lora_alpha 0.0 is not positive"),
        ({"lora_dropout": 1.0}, "--lora_dropout 1.0 is outside"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str, config: TrainConfig) -> None:
    with pytest.raises(UserError) as error:
        adapted(config, Path("out"), **settings)
    assert message in str(error.value)
