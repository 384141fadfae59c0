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
from test_engine import Hearer
from test_engine import run as run_scheduler
from torch import nn
from torch.utils._pytree import tree_flatten

from nanogpt import evaluation
from nanogpt.checkpoint.format import Checkpoint, load_checkpoint, load_model
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.cli import sample
from nanogpt.config import TrainConfig
from nanogpt.data.batches import BatchLoader
from nanogpt.data.config import PrepareConfig
from nanogpt.data.prepare import main as prepare
from nanogpt.distributed import world
from nanogpt.distributed.world import World
from nanogpt.inference import graph_step
from nanogpt.inference.config import SampleConfig, SamplingParams
from nanogpt.inference.generate import generate
from nanogpt.inference.scheduler import Request, Scheduler
from nanogpt.machine import device
from nanogpt.model.kernels import chunked_cross_entropy
from nanogpt.training import autosize, cuda_graph, trainer
from nanogpt.training.fit import fit
from nanogpt.training.memory_estimate import Memory
from nanogpt.training.optimizer_base import UncompiledOptimizer
from nanogpt.training.recovery import roll_back
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


EVERY_PARAMETER = {
    "min_p": 0.01, "repetition_penalty": 1.2, "frequency_penalty": 0.1, "presence_penalty": 0.1,
    "logit_bias": ("id:3=0.5", "id:7=-1.0"), "num_samples": 2,
}  # fmt: skip


@pytest.mark.parametrize("settings", [{}, EVERY_PARAMETER], ids=["some", "all"])
def test_it_samples_what_a_cpu_samples(there, kind, capsys, settings):
    fit(there)
    texts = []
    for place in ("gpu", "cpu"):
        capsys.readouterr()
        path = str(Path(there.out_dir) / "ckpt.pt")
        usual = {"seed": 1, "num_tokens": 40, "top_k": 10, "top_p": 0.9}
        sample.main(SampleConfig(checkpoint=path, device=place, **usual | settings))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_texts_of_many_requests_grow_there_as_on_a_cpu(there, kind):
    """Rows of several lengths and of the same prompt, with a penalty, and beyond the context."""
    fit(there)
    greedy = SamplingParams(temperature=0)
    asked = [([1], greedy), ([2, 3, 4], greedy), ([2, 3, 4], SamplingParams(temperature=0, top_p=0.9))]
    asked.append(([5, 6], SamplingParams(temperature=0, frequency_penalty=1.0)))
    texts: list[list[list[int]]] = []
    for place in ("gpu", "cpu"):
        model, _ = load_model(Path(there.out_dir), place)
        requests = [Request(torch.tensor(ids), params, 40, 1, Hearer()) for ids, params in asked]
        run_scheduler(Scheduler(model, rows=3), requests)
        assert [request.listener.ended for request in requests] == [[""]] * 4
        texts.append([request.listener.ids for request in requests])
    assert texts[0] == texts[1]


@pytest.fixture
def replays(monkeypatch) -> list[accelerator.Tape]:
    """The graphs that are replayed from here on, in order; none of them may wait for the device."""
    replayed: list[accelerator.Tape] = []
    really = accelerator.Tape.replay

    def count(tape: accelerator.Tape) -> None:
        replayed.append(tape)
        with forbid_waiting():
            really(tape)

    monkeypatch.setattr(accelerator.Tape, "replay", count)
    return replayed


def test_captured_tokens_of_many_requests_are_those_of_a_cpu(there, cuda, replays):
    """Some rows of the cache, in any order, as texts come and go; all of them; n-gram tables and RoPE."""
    for settings in ({}, MODERN):
        config = replace(there, out_dir=f"{there.out_dir}-{len(settings)}", **settings)
        fit(config)
        lengths = [33, 60, 9, 41, 25, 70, 12]
        found: list[list[list[int]]] = []
        for place in ("gpu", "cpu"):
            model, _ = load_model(Path(config.out_dir) / "ckpt.pt", place)
            params = SamplingParams(temperature=0)
            requests = [
                Request(torch.tensor([row, 3, 5][: 1 + row % 3]), params, length, 1, Hearer())
                for row, length in enumerate(lengths)
            ]
            scheduler = Scheduler(model, rows=4)
            replays.clear()
            run_scheduler(scheduler, requests)
            found.append([request.listener.ids for request in requests])
            if place == "gpu":
                assert len(replays) > 30
                assert {(4, True), (4, False), (2, False), (1, False)} >= scheduler.steps.captured.keys()
                assert len(scheduler.steps.captured) > 2
        assert found[0] == found[1]
        assert list(map(len, found[0])) == lengths


def test_a_captured_token_is_the_ordinary_one(there, cuda, replays):
    """Texts of several rows and lengths, past the context, with n-gram tables and RoPE too."""
    for settings in ({}, MODERN):
        config = replace(there, out_dir=f"{there.out_dir}-{len(settings)}", **settings)
        fit(config)
        model, _ = load_model(Path(config.out_dir) / "ckpt.pt", "gpu")
        prompts = [torch.tensor(ids).to("gpu") for ids in ([3, 1, 4], [1, 5, 9, 2, 6], [5])]
        for rows in (prompts, prompts[:1]):
            replays.clear()
            captured = torch.stack(list(generate(model, rows, num_tokens=60, temperature=0)))
            assert len(replays) > 30
            model.register_forward_hook(lambda *_: None)  # Python that a graph would not call
            ordinary = torch.stack(list(generate(model, rows, num_tokens=60, temperature=0)))
            model._forward_hooks.clear()
            assert captured.cpu().equal(ordinary.cpu())


def running(config: TrainConfig) -> Run:
    """A run some steps on its way."""
    run = set_up(config, RunFolder(Path(config.out_dir)))
    for _ in range(2):
        read_result(run, trainer.train_step(run))
    return run


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("settings", [{}, MODERN], ids=["gpt2-adamw", "modern-muon"])
def test_a_step_waits_for_nothing(there, cuda, settings, captured):
    run = running(replace(there, **settings))
    if captured:
        run.graph = cuda_graph.UpdateGraph(trainer.update, trainer.next_batch)
        for _ in range(cuda_graph.WARM_UP_UPDATES + 1):
            read_result(run, trainer.train_step(run))
    with forbid_waiting():
        outcomes = [trainer.train_step(run) for _ in range(3)]
    assert all(read_result(run, outcome)["train_loss"] > 0 for outcome in outcomes)


# A captured update


class Again:
    """In the place of a capture: the work itself, launch by launch, with the same tensors for numbers."""

    def warm_up(self, work: Any) -> Any:
        return work()

    def capture(self, work: Any) -> Any:
        values = torch.zeros(2, device="gpu")
        return lambda: values.copy_(work()), values


CAPTURED = {
    "gpt2": {"dropout": 0.2},
    "modern": MODERN,
    "modern-adamw": MODERN | {"optimizer": "adamw", "attn_dropout": 0.1},
    "float16": {"dtype": "float16", "optimizer": "muon", "ema_decay": 0.9},
    "bfloat16": MODERN | {"dtype": "bfloat16"},
    "uneven": {"gradient_accumulation_steps": 3, "optimizer": "muon", "grad_clip": 0.0, "n_kv_head": 1},
}


@pytest.fixture
def no_token_graphs(monkeypatch) -> None:
    """The samples of a training are not captured: a test counts, or exchanges, the captures of updates."""
    monkeypatch.setattr(graph_step, "WARM_UP_TOKENS", 10**9)


@pytest.fixture(params=CAPTURED)
def captured(request, there, no_token_graphs) -> TrainConfig:
    """A run with captured updates, whose learning rate and EMA change in each of them."""
    return replace(there, **CAPTURED[request.param], cuda_graph="on", max_iters=12, eval_interval=6)


def elsewhere(config: TrainConfig, **settings: Any) -> TrainConfig:
    """The same run in another folder."""
    return replace(config, out_dir=config.out_dir + "-other", **settings)


def test_replaying_one_update_is_doing_each_anew(captured, cuda, replays, monkeypatch):
    """Bit for bit: nothing in an update depends on a number that the host knows."""
    fit(captured)
    assert len(replays) == 12 - cuda_graph.WARM_UP_UPDATES
    monkeypatch.setattr(CudaLike, "graphs", Again())
    other = elsewhere(captured)
    fit(other)
    assert losses(captured) == losses(other)
    for saved in ("model", "average", "optimizers", "scaler"):
        same(getattr(last(captured), saved), getattr(last(other), saved))


def same(one: Any, other: Any) -> None:
    """Assert that nested tensors and numbers are equal, bit for bit."""
    leaves = [tree_flatten(tree)[0] for tree in (one, other)]
    assert all(a.equal(b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*leaves, strict=True))


def test_a_captured_update_is_the_ordinary_one(captured, cuda):
    """Up to the rounding of learning rates to float32; a checkpoint does not tell them apart."""
    fit(captured)
    ordinary = elsewhere(captured, cuda_graph="off")
    fit(ordinary)
    assert losses(captured) == pytest.approx(losses(ordinary), rel=1e-3)
    one, other = last(captured), last(ordinary)
    for ours, theirs in zip(one.optimizers, other.optimizers, strict=True):
        assert ours["param_groups"] == theirs["param_groups"]


def test_a_captured_update_of_pairs_is_the_ordinary_one(there, cuda, replays, tmp_path, no_token_graphs):
    """How many targets count differs from batch to batch: it is a number on the device."""
    lines = [json.dumps({"q": f"{number} and what?", "a": str(number**3)}) for number in range(200)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    fields = {"prompt_field": "q", "completion_field": "a"}
    prepare(PrepareConfig((str(tmp_path / "pairs.jsonl"),), str(tmp_path / "pairs"), **fields))
    there = replace(there, data_dir=str(tmp_path / "pairs"), cuda_graph="on", gradient_accumulation_steps=2)
    fit(there)
    assert len(replays) == 8 - cuda_graph.WARM_UP_UPDATES
    ordinary = elsewhere(there, cuda_graph="off")
    fit(ordinary)
    assert losses(there) == pytest.approx(losses(ordinary), rel=1e-3)


def test_with_rates_that_float32_holds_it_is_bit_for_bit_the_ordinary_one(there, cuda):
    rates = {"learning_rate": 2**-7, "muon_lr": 2**-6, "min_lr": 1.0, "warmup_iters": 0, "weight_decay": 0.0}
    settings = MODERN | {"optimizer": "adamw", "ema_decay": 0.0, "dropout": 0.2}
    config = replace(there, **settings | rates, cuda_graph="on")
    fit(config)
    other = elsewhere(config, cuda_graph="off")
    fit(other)
    assert losses(config) == losses(other)
    same(last(config).model, last(other).model)


@pytest.mark.parametrize(
    ("settings", "alone", "captures"),
    [({}, True, 1), (MODERN, True, 1), ({}, False, 0), ({"cuda_graph": "off"}, True, 0)],
)
def test_minutes_measures_updates_as_they_will_be(there, monkeypatch, settings, alone, captures):
    """A small model's update, launch by launch, says nothing about what a capture of it takes."""
    kind, captured = CudaLike(), []
    real = kind.graphs.capture
    monkeypatch.setattr(accelerator.Recorder, "capture", lambda self, work: captured.append(1) or real(work))
    with standing_in_for(kind):
        config, place = replace(there, **settings), torch.device("gpu", 0)
        assert autosize.seconds_per_token(config, 40, place, torch.bfloat16, alone=alone) > 0
    assert len(captured) == captures


def test_a_captured_run_goes_on_where_it_stopped(captured, cuda):
    """Bit for bit: an update of the warm-up computes what a replay does."""
    fit(captured)
    other = elsewhere(captured)
    fit(other, keep_going=lambda step, loss: False)
    fit(replace(other, resume=True))
    assert losses(other) == losses(captured)
    same(last(other).model, last(captured).model)


def test_broken_numbers_in_a_replay_change_nothing_and_a_roll_back_captures_anew(there, cuda, monkeypatch):
    captures = 0
    really = accelerator.Recorder.capture

    def count(self: accelerator.Recorder, work: Any) -> Any:
        nonlocal captures
        captures += 1
        return really(self, work)

    monkeypatch.setattr(accelerator.Recorder, "capture", count)
    config = replace(there, **MODERN, cuda_graph="on", max_iters=16, log_interval=1)
    run = running(config)
    run.graph = cuda_graph.UpdateGraph(trainer.update, trainer.next_batch)
    run.checkpointer.save_last(run)
    for _ in range(5):
        read_result(run, trainer.train_step(run))
    before = [p.held.clone() for p in run.model.parameters()]
    weight = run.model.final_norm.weight
    good = weight.held.clone()
    weight.held.fill_(float("nan"))
    results = [trainer.train_step(run) for _ in range(3)]
    weight.held.copy_(good)
    for result in results:
        read_result(run, result)
    assert run.progress.bad_steps == 3
    assert all(torch.equal(p.held, old) for p, old in zip(run.model.parameters(), before, strict=True))
    roll_back(run)
    for _ in range(5):
        assert read_result(run, trainer.train_step(run))["train_loss"] > 0
    assert captures == 2


def test_an_update_that_cannot_be_captured_goes_on_launch_by_launch(there, cuda, monkeypatch, capsys):
    config = replace(there, **MODERN, dtype="float16", cuda_graph="on")
    really = trainer.step_optimizers

    def asks(optimizers: list[torch.optim.Optimizer], *, skip: torch.Tensor, is_async: bool) -> None:
        if not skip:
            really(optimizers, skip=skip, is_async=is_async)

    monkeypatch.setattr(trainer, "step_optimizers", asks)
    fit(config)
    assert (
        capsys.readouterr().err.count("could not be captured as a CUDA graph, going on without: operation")
        == 1
    )
    other = elsewhere(config, cuda_graph="off")
    fit(other)
    assert losses(config) == pytest.approx(losses(other), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "flops", "chosen"),
    [
        ({}, 1e12, True),
        ({}, 1e13, False),
        ({"gradient_accumulation_steps": 8}, 1e13, True),
        ({"grad_checkpoint": "blocks"}, 1e12, False),
        ({"room": 900}, 1e12, True),
        ({"room": 800}, 1e12, False),  # less than 700 + 100 of it are used
        ({"cuda_graph": "on"}, 1e13, True),
        ({"cuda_graph": "off"}, 1e12, False),
        ({"device": "cpu", "cuda_graph": "on"}, 1e12, False),
    ],
)
def test_small_models_are_captured(there, cuda, monkeypatch, capsys, settings, flops, chosen):  # noqa: PLR0917
    room = settings.get("room", 2**30)
    settings = {name: value for name, value in settings.items() if name != "room"}
    run = set_up(replace(there, **settings), RunFolder(Path(there.out_dir)))
    run.memory = Memory(weights=100, gradients=100, optimizer=200, forward=100, backward=300, step=0)
    monkeypatch.setattr(CudaLike, "free_memory", lambda self, device: room)
    monkeypatch.setattr(Run, "flops_per_update", flops)
    assert cuda_graph.pick_graph(run) == chosen
    assert ("--cuda_graph" in capsys.readouterr().err) == (there.device != run.config.device)


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


def test_it_finds_a_number_that_a_replay_does_not_see(there, cuda, monkeypatch, no_token_graphs):
    """Here the decay of the EMA, asked for within the update."""
    config = replace(there, ema_decay=0.9, cuda_graph="on")
    really, steps = trainer.update_ema, iter(range(1000))
    monkeypatch.setattr(
        trainer, "update_ema", lambda old, new, step, config, _: really(old, new, next(steps), config)
    )
    fit(config)
    monkeypatch.setattr(CudaLike, "graphs", Again())
    fit(elsewhere(config))
    assert losses(config) == losses(elsewhere(config))
    with pytest.raises(AssertionError):
        same(last(config).average, last(elsewhere(config)).average)


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
