"""Micro-batches are worked out, foreseen, halved; the update stays the same, and so does a resumed run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerator import CudaLike, MpsLike, standing_in_for

from nanogpt.checkpoint.format import load_checkpoint
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.config import TrainConfig
from nanogpt.distributed.world import World
from nanogpt.training import memory_estimate, out_of_memory, trainer
from nanogpt.training.fit import fit
from nanogpt.training.out_of_memory import (
    fit_to_memory,
    halve_on_out_of_memory,
    initial_micro_batches,
    micro_batches_per_rank,
)
from nanogpt.training.setup import set_up


@pytest.mark.parametrize(
    ("settings", "size", "expected"),
    [
        ({"batch_size": 64}, 1, 1),
        ({"batch_size": 64, "gradient_accumulation_steps": 8}, 1, 8),
        ({"batch_size": 64, "gradient_accumulation_steps": 8}, 2, 4),
        ({"batch_size": 64, "gradient_accumulation_steps": 8}, 3, 3),
        ({"batch_size": 64, "gradient_accumulation_steps": 64}, 32, 2),
        ({"batch_size": 64, "micro_batch": 16}, 2, 2),
        ({"batch_size": 9, "micro_batch": 2}, 2, 3),
        ({"batch_size": 9, "micro_batch": 100}, 2, 1),
    ],
)
def test_micro_batches_are_worked_out(settings, size, expected):
    assert micro_batches_per_rank(TrainConfig(**settings), World(0, size)) == expected


def limited(run, most: int):
    """The run's loss on a device where no more than `most` sequences fit."""
    loss = run.loss_fn

    def loss_of_few(x, y):
        if len(x) > most:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return loss(x, y)

    run.loss_fn = loss_of_few


@pytest.mark.parametrize(("most", "pieces"), [(8, 1), (7, 2), (3, 4), (1, 8)])
def test_micro_batches_shrink_until_they_fit(config, tmp_path, most, pieces, capsys):
    config = replace(config, dropout=0.0, batch_size=8)
    run, reference = (set_up(config, RunFolder(tmp_path / name)) for name in ("a", "b"))
    limited(run, most)
    loss, expected = (halve_on_out_of_memory(one, trainer.forward_backward) for one in (run, reference))
    torch.testing.assert_close(loss, expected)
    for a, b in zip(run.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert run.num_micro_batches == pieces
    assert capsys.readouterr().err.count("out of memory: going on with") == {1: 0, 2: 1, 4: 2, 8: 3}[pieces]


@pytest.fixture
def counted(monkeypatch):
    """Even a short training is worth counting."""
    monkeypatch.setattr(out_of_memory, "MIN_RUN_FLOPS", 0)


def room_for(monkeypatch, run, micro: int) -> None:
    """So much main memory that micro-batches of this size just fit, the weights being there already."""
    model = run.model.config
    need = memory_estimate.predict(model, run.config, run.device, run.dtype, micro)
    monkeypatch.setattr(
        memory_estimate,
        "free",
        lambda _: (need.need(run.device) - need.weights + 1) / memory_estimate.HEADROOM,
    )


@pytest.mark.parametrize(("micro", "pieces"), [(8, 1), (4, 2), (1, 8)])
@pytest.mark.usefixtures("counted")
def test_micro_batches_that_fit_are_foreseen(config, monkeypatch, capsys, micro, pieces):
    run = set_up(config, RunFolder(Path(config.out_dir)))
    room_for(monkeypatch, run, micro)
    fit_to_memory(run)
    assert run.num_micro_batches == pieces
    assert run.memory is not None
    said = capsys.readouterr().err
    assert (f"more than is free: going on with {pieces} micro-batches" in said) == (pieces > 1)


@pytest.mark.usefixtures("counted")
def test_where_there_is_plenty_nothing_is_counted(config, monkeypatch):
    run = set_up(config, RunFolder(Path(config.out_dir)))
    monkeypatch.setattr(memory_estimate, "free", lambda _: 1e12)
    fit_to_memory(run)
    assert (run.memory, run.num_micro_batches) == (None, 1)


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("kind", [CudaLike, MpsLike])
def test_they_are_foreseen_on_a_gpu_too(config, monkeypatch, capsys, kind):
    """Windows and macOS go on in main memory, or on the disk, instead of running out."""
    with standing_in_for(kind()):
        run = set_up(replace(config, device="gpu"), RunFolder(Path(config.out_dir)))
        need = memory_estimate.predict(run.model.config, config, torch.device("cpu"), run.dtype, 4)
        monkeypatch.setattr(memory_estimate, "predict", lambda *args: replace_size(need, args[4]))
        monkeypatch.setattr(
            memory_estimate, "free", lambda _: (need.total - need.weights + 1) / memory_estimate.HEADROOM
        )
        fit_to_memory(run)
    assert run.num_micro_batches == 2
    assert "going on with 2 micro-batches" in capsys.readouterr().err


def replace_size(memory_of_four: memory_estimate.Memory, micro: int) -> memory_estimate.Memory:
    """As if activations were all that counts."""
    scaled = {name: getattr(memory_of_four, name) * micro // 4 for name in ("forward", "backward")}
    return replace(memory_of_four, **scaled)


def test_memory_that_python_or_numpy_runs_out_of_is_halved_too(config, monkeypatch, capsys):
    really = trainer.forward_backward

    def full(run, **settings):
        if run.num_micro_batches < 4:
            raise MemoryError
        return really(run, **settings)

    monkeypatch.setattr(trainer, "forward_backward", full)
    assert fit(replace(config, max_iters=2)).reason == "finished"
    assert "out of memory: going on with 4 micro-batches" in capsys.readouterr().err


def test_what_cannot_fit_is_said_and_tried(config, counted, monkeypatch, capsys):
    run = set_up(config, RunFolder(Path(config.out_dir)))
    monkeypatch.setattr(memory_estimate, "free", lambda _: 0.0)
    fit_to_memory(run)
    assert run.num_micro_batches == 8
    assert "more than is free: nanogpt plan says what to change" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{"micro_batch": 8}, {"max_iters": 1}])
def test_what_the_user_asks_for_is_left_alone_and_a_short_run_is_not_counted(config, monkeypatch, settings):
    config = replace(config, **settings)
    monkeypatch.setattr(out_of_memory, "MIN_RUN_FLOPS", 0 if "micro_batch" in settings else 1e12)
    monkeypatch.setattr(memory_estimate, "free", lambda _: 0.0)
    run = set_up(config, RunFolder(Path(config.out_dir)))
    fit_to_memory(run)
    assert run.num_micro_batches == 1
    assert (run.memory is None) == ("max_iters" in settings)


def test_processes_on_one_machine_share_its_memory(config, counted, monkeypatch):
    run = set_up(config, RunFolder(Path(config.out_dir)))
    room_for(monkeypatch, run, 8)
    run.world = World(local_size=2)
    fit_to_memory(run)
    assert run.num_micro_batches > 1


def test_a_resumed_run_keeps_its_micro_batches_and_so_every_bit(config, counted, monkeypatch, tmp_path):
    """Also where there is room for larger ones by then."""
    never, stopped = (replace(config, out_dir=str(tmp_path / name)) for name in ("never", "stopped"))
    run = set_up(config, RunFolder(Path(config.out_dir)))
    with monkeypatch.context() as narrow:
        room_for(narrow, run, 2)
        fit(never)
        fit(replace(stopped, max_seconds=1e-9))
    fit(replace(stopped, resume=True))
    ours, theirs = (load_checkpoint(Path(c.out_dir) / "last.pt") for c in (never, stopped))
    assert ours.precision["num_micro_batches"] == theirs.precision["num_micro_batches"] == 4
    assert all(torch.equal(ours.model[name], theirs.model[name]) for name in ours.model)


def test_a_resumed_run_takes_other_micro_batches_if_told(config):
    fit(replace(config, gradient_accumulation_steps=4))
    saved = load_checkpoint(Path(config.out_dir) / "last.pt")
    as_before = saved.train_config
    assert initial_micro_batches(as_before, World(), saved) == 4
    assert initial_micro_batches(as_before, World(0, 2), saved) == 2
    assert initial_micro_batches(replace(as_before, gradient_accumulation_steps=1), World(), saved) == 1
    assert initial_micro_batches(replace(as_before, micro_batch=1), World(), saved) == 8
    old = replace(saved, precision={"device": "cpu", "dtype": "float32"})
    assert initial_micro_batches(as_before, World(), old) == 4
