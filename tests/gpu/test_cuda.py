"""What only a GPU can show of a training in one process. Skipped where there is none (conftest.py)."""

import importlib.util
import json
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nanogpt.checkpoint.format import load_checkpoint, load_model
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.cli import sample
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.data.batches import BatchLoader
from nanogpt.data.config import PrepareConfig
from nanogpt.data.prepare import main as prepare
from nanogpt.inference.config import SampleConfig, SamplingParams
from nanogpt.inference.generate import decode, generate
from nanogpt.machine import device
from nanogpt.model.gpt import GPT
from nanogpt.model.kernels import IGNORED, Head, chunked_cross_entropy
from nanogpt.training import trainer
from nanogpt.training.cuda_graph import WARM_UP_UPDATES, UpdateGraph
from nanogpt.training.fit import fit
from nanogpt.training.results import read_result
from nanogpt.training.run import Run, UpdateResult
from nanogpt.training.setup import set_up

from .conftest import numbers

ROOT = Path(__file__).parents[2]

MODERN: dict[str, Any] = {
    "optimizer": "muon", "norm": "rmsnorm", "positions": "rope", "mlp": "relu2", "bias": False,
    "qk_norm": True, "tied": False, "logit_cap": 15.0, "ngram_vocab": 97, "ema_decay": 0.9,
    "gradient_accumulation_steps": 2,
}  # fmt: skip

WITHOUT_TYRO = """
import sys
from nanogpt.config import TrainConfig
from nanogpt.training.fit import main
sys.exit(main(TrainConfig(**{settings!r})))
"""


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_trains_as_a_cpu_does(config: TrainConfig, tmp_path: Path, optimizer: str) -> None:
    config = replace(config, dropout=0.0, optimizer=optimizer, dtype="float32")
    fit(config)
    cpu = replace(config, device="cpu", out_dir=str(tmp_path / "cpu"))
    fit(cpu)
    for kind in ("train_loss", "val_loss"):
        assert numbers(config, kind) == pytest.approx(numbers(cpu, kind), rel=2e-2)


def test_the_defaults_train(config: TrainConfig, capsys) -> None:
    """Whatever auto stands for here: device, dtype, compiled or not."""
    fit(replace(config, device="auto", dtype="auto", compile="auto", max_iters=12))
    assert len(numbers(config)) == 12
    assert numbers(config)[-1] < numbers(config)[0]


def test_the_script_trains_in_a_process_of_its_own(config: TrainConfig) -> None:
    """As a user starts it, and with every check of PyTorch's own; without tyro, past the parser."""
    values = {name: value for name, value in asdict(config).items() if value != getattr(TrainConfig(), name)}
    if importlib.util.find_spec("tyro"):
        flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, str(ROOT / "train.py"), *flags]
    else:
        command = [sys.executable, "-c", WITHOUT_TYRO.format(settings=values)]
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "Finished: 30 steps done" in done.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_goes_on_where_it_stopped(config: TrainConfig, tmp_path: Path, dtype: str) -> None:
    config = replace(config, dtype=dtype, ema_decay=0.9)
    never = replace(config, out_dir=str(tmp_path / "never"))
    fit(never)
    fit(replace(config, max_seconds=1e-9))  # one update
    fit(replace(config, resume=True, max_seconds=None))
    assert numbers(config) == pytest.approx(numbers(never), rel=2e-2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("to_cpu", [True, False], ids=["to_the_cpu", "from_the_cpu"])
def test_a_run_moves_between_gpu_and_cpu(
    config: TrainConfig, tmp_path: Path, optimizer: str, to_cpu: bool
) -> None:
    """The dtype is said: auto would choose anew on another kind of device."""
    config = replace(
        config, dropout=0.0, optimizer=optimizer, ema_decay=0.9, dtype="float32", eval_interval=5
    )
    first, then = (config.device, "cpu") if to_cpu else ("cpu", config.device)
    never = replace(config, out_dir=str(tmp_path / "never"))
    fit(never)
    fit(replace(config, device=first), keep_going=lambda step, loss: step < 15)
    fit(replace(config, device=then, resume=True))
    for kind in ("train_loss", "val_loss"):
        assert numbers(config, kind) == pytest.approx(numbers(never, kind), rel=2e-2)


def test_float16_is_scaled(config: TrainConfig, place: torch.device, tmp_path: Path) -> None:
    run = set_up(replace(config, dtype="float16"), RunFolder(tmp_path / "run"))
    assert run.scaler.is_enabled()
    for _ in range(20):  # the scale comes down until gradients fit
        outcome = read_result(run, trainer.train_step(run))
    assert np.isfinite(outcome["grad_norm"])
    assert all(weight.isfinite().all() for weight in run.model.parameters())
    run.metrics.close()


def test_it_writes_what_the_cpu_writes(config: TrainConfig, capsys) -> None:
    fit(config)
    best = Path(config.out_dir) / "ckpt.pt"
    logits = {}
    for name in (config.device, "cpu"):
        model, tokens = load_model(best, name)
        ids = sample.encode_prompt(tokens, "From fairest")
        with torch.no_grad():
            logits[name] = model(ids.to(next(model.parameters()).device))[0].float().cpu()
    torch.testing.assert_close(logits[config.device], logits["cpu"], rtol=1e-2, atol=1e-2)
    capsys.readouterr()
    sample.main(
        SampleConfig(checkpoint=str(best), num_tokens=20, seed=1, device=config.device, prompt="From")
    )
    assert capsys.readouterr().out.startswith("From")


def test_a_token_as_a_graph_is_the_plain_one(config: TrainConfig, gpu_alone: torch.device) -> None:
    fit(config)
    model, _ = load_model(Path(config.out_dir) / "ckpt.pt", config.device)
    prompts = [torch.tensor(ids, device=gpu_alone) for ids in ([3, 1, 4], [1, 5, 9, 2, 6])]
    for rows in (prompts, prompts[:1]):
        captured = list(generate(model, rows, num_tokens=40, temperature=0))
        plain = list(decode(model, rows, SamplingParams(temperature=0), 40, None, observe=None))
        assert torch.stack(captured).equal(torch.stack(plain))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_broken_updates_leave_no_trace(config: TrainConfig, monkeypatch, dtype: str) -> None:
    """The guard on the device: weights and optimizer state stay finite, and the steps are reported."""
    really = trainer.forward_backward

    def poisoned(run, **settings):
        loss = really(run, **settings)
        if run.progress.step in (4, 7):
            for parameter in run.model.parameters():
                parameter.grad.fill_(float("nan"))
            return loss * float("nan")
        return loss

    monkeypatch.setattr(trainer, "forward_backward", poisoned)
    assert fit(replace(config, dtype=dtype, optimizer="muon")).reason == "finished"
    saved = load_checkpoint(Path(config.out_dir) / "last.pt")
    assert all(weight.isfinite().all() for weight in saved.model.values())
    for optimizer in saved.optimizers:
        for state in optimizer["state"].values():
            assert all(value.isfinite().all() for value in state.values())
    assert len(numbers(config)) == config.max_iters - 2


def steps_without_waiting(run: Run) -> list[UpdateResult]:
    """Three updates; PyTorch raises at whatever makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        return [trainer.train_step(run) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_a_step_waits_for_nothing(config: TrainConfig, gpu_alone: torch.device, tmp_path: Path) -> None:
    """PyTorch raises at whatever makes the host wait for the device."""
    run = set_up(replace(config, dtype="bfloat16", optimizer="muon"), RunFolder(tmp_path / "run"))
    read_result(run, trainer.train_step(run))
    outcomes = steps_without_waiting(run)
    assert all(np.isfinite(read_result(run, outcome)["train_loss"]) for outcome in outcomes)
    run.metrics.close()


@pytest.mark.parametrize("settings", [{}, MODERN, {"dtype": "float16", "ema_decay": 0.9}], ids=str)
def test_a_captured_update_is_the_plain_one(
    config: TrainConfig, gpu_alone: torch.device, tmp_path: Path, capsys, settings: dict[str, Any]
) -> None:
    """With dropout too, whose masks follow the seed of each step."""
    config = replace(config, dtype="bfloat16", dropout=0.2)
    config = replace(config, **settings)
    fit(config)
    captured = replace(config, cuda_graph="on", out_dir=str(tmp_path / "captured"))
    capsys.readouterr()
    fit(captured)
    assert "captured" not in capsys.readouterr().err  # that it could not be
    assert numbers(captured) == pytest.approx(numbers(config), rel=2e-2)
    assert numbers(captured, "val_loss") == pytest.approx(numbers(config, "val_loss"), rel=2e-2)


def test_of_pairs_a_captured_update_is_the_plain_one(
    config: TrainConfig, gpu_alone: torch.device, tmp_path: Path, capsys
) -> None:
    """How many targets count differs from batch to batch: it is a number on the device."""
    lines = [json.dumps({"q": f"{number} and what?", "a": str(number**3)}) for number in range(200)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    fields = {"prompt_field": "q", "completion_field": "a"}
    prepare(PrepareConfig((str(tmp_path / "pairs.jsonl"),), str(tmp_path / "pairs"), **fields))
    config = replace(
        config, data_dir=str(tmp_path / "pairs"), dtype="bfloat16", gradient_accumulation_steps=2
    )
    fit(config)
    captured = replace(config, cuda_graph="on", out_dir=str(tmp_path / "captured"))
    capsys.readouterr()
    fit(captured)
    assert "captured" not in capsys.readouterr().err  # that it could not be
    assert numbers(captured) == pytest.approx(numbers(config), rel=2e-2)
    assert numbers(captured, "val_loss") == pytest.approx(numbers(config, "val_loss"), rel=2e-2)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_update_is_captured(config: TrainConfig, gpu_alone, tmp_path: Path, capsys) -> None:
    config = replace(config, **MODERN, dtype="bfloat16", compile="on", max_iters=8)
    fit(config)
    captured = replace(config, cuda_graph="on", out_dir=str(tmp_path / "captured"))
    capsys.readouterr()
    fit(captured)
    assert "captured" not in capsys.readouterr().err
    assert numbers(captured) == pytest.approx(numbers(config), rel=2e-2)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_a_replay_waits_for_nothing(config: TrainConfig, gpu_alone: torch.device, tmp_path: Path) -> None:
    run = set_up(replace(config, **MODERN), RunFolder(tmp_path / "run"))
    run.graph = UpdateGraph(trainer.update, trainer.next_batch)
    for _ in range(WARM_UP_UPDATES + 1):
        read_result(run, trainer.train_step(run))
    outcomes = steps_without_waiting(run)
    results = [read_result(run, outcome) for outcome in outcomes]
    assert all(np.isfinite(result["train_loss"]) for result in results)
    assert run.graph is not None  # else it was not captured
    run.metrics.close()


@pytest.mark.filterwarnings(
    "ignore"
)  # of the compiler's own; as errors they would end it, unseen: see `failed`
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_compiling_gives_the_same_training(config: TrainConfig, tmp_path: Path, capsys, dtype: str) -> None:
    config = replace(config, dropout=0.0, max_iters=8, dtype=dtype)
    fit(config)
    compiled = replace(config, compile="on", out_dir=str(tmp_path / "compiled"))
    capsys.readouterr()
    fit(compiled)
    said = capsys.readouterr()
    assert "Compiling" in said.out
    assert "failed" not in said.err  # else uncompiled would be compared with uncompiled
    assert numbers(compiled) == pytest.approx(numbers(config), rel=2e-2)


def test_windows_live_on_the_gpu(place: torch.device) -> None:
    tokens = np.random.default_rng(1).integers(0, 50_000, 10_000).astype(np.uint16)
    windows = BatchLoader(tokens, place)
    assert (windows.resident is None) == (place.type == "cpu")
    starts = np.array([0, 77, 9_000])
    for here, there in zip(
        BatchLoader(tokens, torch.device("cpu"))(starts, 64), windows(starts, 64), strict=True
    ):
        assert there.device == place
        assert torch.equal(here, there.cpu())


def test_attention_is_the_fused_kernel_and_equals_the_plain_one(place: torch.device) -> None:
    config = GPTConfig(vocab_size=65, block_size=64, n_layer=2, n_head=2, n_embd=64, dropout=0.0)
    torch.manual_seed(1)
    fused = GPT(config).to(place)
    plain = GPT(replace(config, flash_attn=False)).to(place)
    plain.load_state_dict(fused.state_dict())
    x = torch.randint(65, (4, 64), device=place)
    with device.autocast(place, torch.bfloat16):
        torch.testing.assert_close(fused(x)[0], plain(x)[0], rtol=5e-2, atol=5e-2)


def test_a_padded_output_layer_is_that_of_a_cpu(place: torch.device) -> None:
    """5,001 tokens are 5,120 on the GPU: in one, and in chunks."""
    device.kind_of(place).set_up(place, torch.float32)  # without TF32
    torch.manual_seed(1)
    x, head, targets = torch.randn(1500, 64), Head(64, 5001), torch.randint(5001, (1500,))
    results = []
    for where in ("cpu", place):
        there = deepcopy(head).to(where)
        logits = there(x.to(where))
        F.cross_entropy(logits, targets.to(where)).backward()
        whole = there.weight.grad.cpu().clone()
        there.zero_grad()
        chunked_cross_entropy(there, torch.tanh, x.to(where), targets.to(where), 5001).backward()
        results.append([logits.detach().cpu(), whole, there.weight.grad.cpu()])
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-4)


def test_the_chunked_loss_is_that_of_a_cpu(place: torch.device) -> None:
    device.kind_of(place).set_up(place, torch.float32)  # without TF32
    torch.manual_seed(1)
    x, head = torch.randn(300, 64, requires_grad=True), nn.Linear(64, 5000, bias=False)
    x_gpu, head_gpu = x.detach().to(place).requires_grad_(), deepcopy(head).to(place)
    targets = torch.randint(5000, (300,))
    targets[torch.rand(300) < 0.3] = IGNORED
    chunked_cross_entropy(head, torch.tanh, x, targets, 5000).backward()
    chunked_cross_entropy(head_gpu, torch.tanh, x_gpu, targets.to(place), 5000).backward()
    torch.testing.assert_close(x_gpu.grad.cpu(), x.grad, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(head_gpu.weight.grad.cpu(), head.weight.grad, rtol=1e-2, atol=1e-4)
