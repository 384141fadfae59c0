"""Training, resuming, evaluating and sampling on a device that is not the CPU: see accelerator.py.

Every check of PyTorch's own is alive. The second half puts in, on purpose, the mistakes that this is to find.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerator
import pytest
import torch
import torch.distributed as dist
from accelerator import CudaLike, MpsLike, OnDevice, WaitedError, forbid_waiting, standing_in_for
from torch import nn

from nanogpt import device, evaluation
from nanogpt.checkpoint.format import Checkpoint, load_checkpoint
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.cli import sample
from nanogpt.config import TrainConfig
from nanogpt.data.batches import BatchLoader
from nanogpt.distributed import world
from nanogpt.distributed.world import World
from nanogpt.inference.config import SampleConfig
from nanogpt.model.kernels import chunked_cross_entropy
from nanogpt.training import trainer
from nanogpt.training.fit import fit
from nanogpt.training.optimizer_base import UncompiledOptimizer
from nanogpt.training.results import read_result
from nanogpt.training.run import Run
from nanogpt.training.setup import set_up

accelerator.register()

KINDS = {"cuda-like": CudaLike, "mps-like": MpsLike}

MODERN: dict[str, Any] = {
    "optimizer": "muon", "norm": "rmsnorm", "positions": "rope", "mlp": "relu2", "bias": False,
    "qk_norm": True, "tied": False, "logit_cap": 15.0, "ngram_vocab": 97, "ema_decay": 0.9,
    "gradient_accumulation_steps": 2,
}  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[device.DeviceKind]:
    """The stand-in, as one kind of device and as the other."""
    kind = KINDS[request.param]()
    with standing_in_for(kind):
        yield kind


@pytest.fixture
def cuda() -> Iterator[device.DeviceKind]:
    kind = CudaLike()
    with standing_in_for(kind):
        yield kind


@pytest.fixture
def there(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """The tiny run, on the stand-in."""
    monkeypatch.setattr(evaluation, "SAMPLE_TOKENS", 5)
    settings = {"device": "gpu", "dropout": 0.0, "max_iters": 8, "eval_interval": 4}
    return replace(config, **settings, out_dir=f"{config.out_dir}-there")


def losses(config: TrainConfig) -> list[float]:
    lines = (Path(config.out_dir) / "metrics.jsonl").read_text().splitlines()
    return [row["train_loss"] for row in map(json.loads, lines) if "train_loss" in row]


def last(config: TrainConfig) -> Checkpoint:
    return load_checkpoint(Path(config.out_dir) / "last.pt")


# What works


@pytest.mark.parametrize("settings", [{}, MODERN], ids=["gpt2-adamw", "modern-muon"])
def test_it_trains_as_a_cpu_does(there, kind, settings):
    there = replace(there, **settings)
    here = replace(there, device="cpu", out_dir=there.out_dir + "-cpu")
    fit(there)
    fit(here)
    assert losses(there) == pytest.approx(losses(here), rel=1e-4)
    for name, weight in last(here).model.items():
        torch.testing.assert_close(last(there).model[name], weight, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, MODERN, {"dropout": 0.2}], ids=["plain", "modern", "dropout"])
def test_it_goes_on_where_it_stopped(there, kind, settings):
    there = replace(there, **settings)
    never = replace(there, out_dir=there.out_dir + "-never")
    fit(never)
    fit(replace(there, max_seconds=1e-9))
    fit(replace(there, resume=True))
    assert losses(there) == losses(never)
    for name, weight in last(never).model.items():
        assert torch.equal(last(there).model[name], weight)


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_narrow_arithmetic_trains_and_keeps_its_state_over_a_resume(there, cuda, dtype):
    there = replace(there, dtype=dtype, optimizer="muon")
    never = replace(there, out_dir=there.out_dir + "-never")
    fit(never)
    fit(replace(there, max_seconds=1e-9))
    fit(replace(there, resume=True))
    assert last(there).precision["dtype"] == ("bfloat16" if dtype == "auto" else dtype)
    assert last(there).scaler == last(never).scaler
    assert losses(there) == losses(never)


def test_a_checkpoint_moves_between_the_devices(there, kind):
    """Its tensors are plain ones, of the CPU; a run goes on elsewhere."""
    fit(replace(there, max_iters=4))
    assert not any(isinstance(tensor, OnDevice) for tensor in last(there).model.values())
    fit(replace(there, resume=True, device="cpu"))
    fit(replace(there, resume=True, max_iters=15))
    assert last(there).progress["step"] == 15


def test_it_samples_what_a_cpu_samples(there, kind, capsys):
    fit(there)
    texts = []
    for place in ("gpu", "cpu"):
        capsys.readouterr()
        path = str(Path(there.out_dir) / "ckpt.pt")
        sample.main(SampleConfig(checkpoint=path, device=place, seed=1, num_tokens=40, top_k=10, top_p=0.9))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def running(config: TrainConfig) -> Run:
    """A run some steps on its way."""
    run = set_up(config, RunFolder(Path(config.out_dir)))
    for _ in range(2):
        read_result(run, trainer.train_step(run))
    return run


@pytest.mark.parametrize("settings", [{}, MODERN], ids=["gpt2-adamw", "modern-muon"])
def test_a_step_waits_for_nothing(there, cuda, settings):
    run = running(replace(there, **settings))
    with forbid_waiting():
        outcomes = [trainer.train_step(run) for _ in range(3)]
    assert all(read_result(run, outcome)["train_loss"] > 0 for outcome in outcomes)


def test_where_a_device_does_not_run_ahead_a_step_waits_once(there):
    with standing_in_for(MpsLike()):
        run = running(replace(there, **MODERN))
        run.train_loader.send = OnDevice  # the batch comes by a copy that counts, too
        before = accelerator.State.waits
        read_result(run, trainer.train_step(run))
        assert accelerator.State.waits - before == 1


def test_a_large_vocabulary_is_computed_in_chunks_there(there, cuda, tmp_path):
    torch.manual_seed(1)
    x, weight, targets = torch.randn(30, 8), torch.randn(500, 8), torch.randint(500, (30,))
    results = []
    for place in ("cpu", "gpu"):
        a, head = x.clone().to(place).requires_grad_(), nn.Linear(8, 500, bias=False, device=place)
        head.weight.data.copy_(weight)
        chunked_cross_entropy(head, torch.tanh, a, targets.to(place), 500).backward()
        results.append((a.grad.cpu(), head.weight.grad.cpu()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture
def group(tmp_path) -> Iterator[None]:
    """A group of one process, connected as by the product, with a library of the stand-in's for NCCL."""
    libraries = {"gpu": "fake"} | dict(part.split(":") for part in world.backend().split(",") if ":" in part)
    names = ",".join(f"{kind}:{'fake' if name == 'nccl' else name}" for kind, name in libraries.items())
    connect(tmp_path, names if "cpu" in libraries else f"cpu:gloo,{names}")
    yield
    dist.destroy_process_group()


def connect(tmp_path: Path, libraries: str) -> None:
    import torch.testing._internal.distributed.fake_pg  # noqa: F401 - registers "fake"

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(libraries, store=store, rank=0, world_size=1)


def test_several_processes_send_what_lies_on_either_side(there, cuda, group):
    """Votes lie in main memory, losses on the device: each finds a library."""
    run = running(there)
    run.world = World(0, 2)  # which asks, and is answered by its group of one
    batch = run.world.all_reduce_sum(torch.ones((), device=run.device))
    assert isinstance(batch, OnDevice)
    assert run.world.max_over_ranks(3, 4) == [3, 4]
    read_result(run, trainer.train_step(run))


# What goes wrong is found


def test_it_finds_a_device_without_its_number(there, cuda, monkeypatch):
    monkeypatch.setattr(CudaLike, "find", lambda self, device: torch.device("gpu"))
    with pytest.raises(ValueError, match="with a specified index"):
        fit(there)


def test_it_finds_a_tensor_of_the_cpu_among_those_of_the_device(there, cuda, monkeypatch):
    monkeypatch.setattr(BatchLoader, "send", lambda self, values: values)
    with pytest.raises(RuntimeError, match="two devices"):
        fit(there)


def test_it_finds_a_step_that_waits(there, cuda, monkeypatch):
    run = running(there)
    really = trainer.step_optimizers

    def asks(optimizers: list[torch.optim.Optimizer], *, skip: torch.Tensor, is_async: bool) -> None:
        if not skip:
            really(optimizers, skip=skip, is_async=is_async)

    monkeypatch.setattr(trainer, "step_optimizers", asks)
    with pytest.raises(WaitedError), forbid_waiting():
        trainer.train_step(run)


def test_it_finds_a_copy_that_is_not_in_the_background(there, cuda, monkeypatch):
    run = running(there)
    monkeypatch.setattr(BatchLoader, "send", lambda self, values: values.to(self.device))
    with pytest.raises(WaitedError), forbid_waiting():
        trainer.train_step(run)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_finds_what_a_resume_left_on_the_cpu(there, cuda, monkeypatch, optimizer):
    there = replace(there, optimizer=optimizer)
    fit(replace(there, max_seconds=1e-9))

    def left_behind(self: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, values in state["state"].items():
            self.state[parameters[number]] = dict(values)

    monkeypatch.setattr(UncompiledOptimizer, "load_state_dict", left_behind)
    with pytest.raises(RuntimeError, match="two devices"):
        fit(replace(there, resume=True))


def test_it_finds_a_tensor_of_the_cpu_in_a_collective_of_the_device(there, cuda, tmp_path):
    """Which a group that is connected by NCCL alone has no library for."""
    connect(tmp_path, "gpu:fake")
    try:
        with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
            World(0, 2).max_over_ranks(1)
    finally:
        dist.destroy_process_group()
