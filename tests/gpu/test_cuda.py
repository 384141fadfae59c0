"""What only a CUDA GPU can show. Skipped where there is none."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nanogpt import checkpoint, data, device, step
from nanogpt.config import TrainConfig
from nanogpt.loss import chunked_cross_entropy
from nanogpt.model import GPT, GPTConfig
from nanogpt.run_folder import RunFolder
from nanogpt.set_up import set_up
from nanogpt.train import fit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CUDA = torch.device("cuda")


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    return replace(config, device="cuda", compile="off")


def losses(config: TrainConfig) -> list[float]:
    lines = (Path(config.out_dir) / "metrics.jsonl").read_text().splitlines()
    return [row["train_loss"] for row in map(json.loads, lines) if "train_loss" in row]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_trains_as_a_cpu_does(config: TrainConfig, tmp_path: Path, optimizer: str) -> None:
    config = replace(config, dropout=0.0, optimizer=optimizer, dtype="float32")
    fit(config)
    cpu = replace(config, device="cpu", out_dir=str(tmp_path / "cpu"))
    fit(cpu)
    assert losses(config) == pytest.approx(losses(cpu), rel=2e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_goes_on_where_it_stopped(config: TrainConfig, tmp_path: Path, dtype: str) -> None:
    config = replace(config, dtype=dtype, ema_decay=0.9)
    never = replace(config, out_dir=str(tmp_path / "never"))
    fit(never)
    fit(replace(config, max_seconds=1e-9))  # one update
    fit(replace(config, resume=True, max_seconds=None))
    assert losses(config) == pytest.approx(losses(never), rel=2e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_broken_updates_leave_no_trace(config: TrainConfig, monkeypatch, dtype: str) -> None:
    """The guard on the device: weights and optimizer state stay finite, and the steps are reported."""
    really = step.forward_backward

    def poisoned(run, x, y, **settings):
        loss = really(run, x, y, **settings)
        if run.progress.step in (4, 7):
            for parameter in run.model.parameters():
                parameter.grad.fill_(float("nan"))
            return loss * float("nan")
        return loss

    monkeypatch.setattr(step, "forward_backward", poisoned)
    assert fit(replace(config, dtype=dtype, optimizer="muon")).reason == "finished"
    saved = checkpoint.load(Path(config.out_dir) / "last.pt")
    assert all(weight.isfinite().all() for weight in saved.model.values())
    for optimizer in saved.optimizers:
        for state in optimizer["state"].values():
            assert all(value.isfinite().all() for value in state.values())
    assert len(losses(config)) == config.max_iters - 2


def test_a_step_waits_for_nothing(config: TrainConfig, tmp_path: Path) -> None:
    """PyTorch raises at whatever makes the host wait for the device."""
    run = set_up(replace(config, dtype="bfloat16", optimizer="muon"), RunFolder(tmp_path / "run"))
    step.settle(run, step.train_step(run))
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcomes = [step.train_step(run) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(np.isfinite(step.settle(run, outcome)["train_loss"]) for outcome in outcomes)


def test_compiling_gives_the_same_training(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, dropout=0.0, max_iters=8, dtype="float32")
    fit(config)
    compiled = replace(config, compile="on", out_dir=str(tmp_path / "compiled"))
    fit(compiled)
    assert losses(compiled) == pytest.approx(losses(config), rel=1e-2)


def test_windows_live_on_the_gpu() -> None:
    tokens = np.random.default_rng(1).integers(0, 50_000, 10_000).astype(np.uint16)
    windows = data.Windows(tokens, CUDA)
    assert windows.resident is not None
    starts = np.array([0, 77, 9_000])
    for here, there in zip(data.gather(tokens, starts, 64), windows(starts, 64), strict=True):
        assert there.device.type == "cuda"
        assert torch.equal(here, there.cpu())


def test_attention_is_the_fused_kernel_and_equals_the_plain_one() -> None:
    config = GPTConfig(vocab_size=65, block_size=64, n_layer=2, n_head=2, n_embd=64, dropout=0.0)
    torch.manual_seed(1)
    fused = GPT(config).to(CUDA)
    plain = GPT(replace(config, flash_attn=False)).to(CUDA)
    plain.load_state_dict(fused.state_dict())
    x = torch.randint(65, (4, 64), device=CUDA)
    with device.autocast(CUDA, torch.bfloat16):
        torch.testing.assert_close(fused(x)[0], plain(x)[0], rtol=5e-2, atol=5e-2)


def test_the_chunked_loss_is_that_of_a_cpu() -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(300, 64, requires_grad=True), torch.randn(5000, 64, requires_grad=True)
    targets = torch.randint(5000, (300,))
    chunked_cross_entropy(x, weight, targets, 15.0).backward()
    x_gpu, weight_gpu = (z.detach().to(CUDA).requires_grad_() for z in (x, weight))
    chunked_cross_entropy(x_gpu, weight_gpu, targets.to(CUDA), 15.0).backward()
    torch.testing.assert_close(x_gpu.grad.cpu(), x.grad, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(weight_gpu.grad.cpu(), weight.grad, rtol=1e-2, atol=1e-4)
