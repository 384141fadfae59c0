"""A run cannot be lost: killed anywhere, stopped by any signal, it ends as if nothing had happened.

The children come from a fork server that has imported torch already, so a life takes milliseconds.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from waiting import wait_for

import nanogpt.training.fit as fit_module
from nanogpt.checkpoint.format import Checkpoint, load_checkpoint
from nanogpt.checkpoint.kept import kept_checkpoints
from nanogpt.config import TrainConfig
from nanogpt.errors import UserError
from nanogpt.storage import files
from nanogpt.storage.locking import lock
from nanogpt.training.fit import fit

KILLS = 20


context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([__name__, "torch._dynamo"])


def child(config: TrainConfig, die_in_save: int) -> None:
    """A training process. die_in_save: kill it half-way through its nth write of a checkpoint."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    if die_in_save:
        arm(die_in_save)
    os._exit(fit_module.main(config))


def arm(die_in_save: int) -> None:
    """Make the nth checkpoint write its first half and then kill the process."""
    whole, count = torch.save, 0

    def half(value: object, file) -> None:
        nonlocal count
        count += 1
        whole(value, file)
        if count == die_in_save:
            file.flush()
            file.file.truncate(file.file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def live(config: TrainConfig, die_in_save: int = 0) -> BaseProcess:
    process = context.Process(target=child, args=(config, die_in_save))
    process.start()
    return process


def steps_logged(config: TrainConfig) -> int:
    path = Path(config.out_dir) / "metrics.jsonl"
    return path.read_text().count("train_loss") if path.exists() else 0


def end_of(config: TrainConfig) -> tuple[Checkpoint, Checkpoint, list[tuple[float, ...]]]:
    """Where a run ended: last.pt, ckpt.pt, and the losses it logged."""
    folder = Path(config.out_dir)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "train_loss", "val_loss", "lr", "grad_norm")
    losses = [tuple(row.get(key, 0.0) for key in keys) for row in rows]
    return load_checkpoint(folder / "last.pt"), load_checkpoint(folder / "ckpt.pt"), losses


def kept(config: TrainConfig) -> dict[int, Checkpoint]:
    """The checkpoints that a run has kept."""
    found = kept_checkpoints(Path(config.out_dir) / "checkpoints")
    return {step: load_checkpoint(path) for step, path in found.items()}


def assert_same_end(one: TrainConfig, other: TrainConfig) -> None:
    """Weights, optimizer state, progress, logged losses and kept checkpoints are equal, bit for bit."""
    (*files_one, losses_one), (*files_other, losses_other) = end_of(one), end_of(other)
    assert losses_one == losses_other
    kept_one, kept_other = kept(one), kept(other)
    assert kept_one.keys() == kept_other.keys()
    pairs = zip((*files_one, *kept_one.values()), (*files_other, *kept_other.values()), strict=True)
    for a, b in pairs:
        assert a.progress | {"elapsed_s": 0} == b.progress | {"elapsed_s": 0}
        assert_equal(a.model, b.model)
        assert_equal(a.average, b.average)
        assert_equal(a.optimizers, b.optimizers)


def assert_equal(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert isinstance(b, list)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


MODERN = {
    "optimizer": "muon", "schedule": "trapezoid", "norm": "rmsnorm", "positions": "rope", "mlp": "relu2",
    "bias": False, "qk_norm": True, "tied": False, "zero_init": True, "logit_cap": 15.0, "ngram_vocab": 97,
    "ema_decay": 0.9,
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "keep_checkpoints": 5, **MODERN}],
    ids=["float32", "bfloat16", "modern-muon-bfloat16"],
)
def test_killed_20_times_ends_as_if_never_killed(config: TrainConfig, tmp_path: Path, options) -> None:
    """SIGKILL at random moments, every third one half-way through writing a checkpoint."""
    config = replace(config, **options, max_iters=500, eval_interval=40, log_interval=3, save_seconds=0.03)
    never = replace(config, out_dir=str(tmp_path / "never"))
    process = live(never)
    process.join(600)
    assert process.exitcode == 0

    chance = random.Random(str(options))
    for kill in range(KILLS):
        life = replace(config, resume=kill > 0)
        before = steps_logged(config)
        if kill % 3 == 2:
            process = live(life, die_in_save=chance.randint(1, 4))
            process.join(600)
        else:
            process = live(life)
            if kill == 0:  # the first save must be there to resume from
                wait_for((Path(config.out_dir) / "last.pt").exists, process)
            time.sleep(chance.uniform(0.0, 0.25))
            process.kill()
            process.join(600)
        assert process.exitcode == -signal.SIGKILL, f"not killed but ended ({before} steps logged before)"
    process = live(replace(config, resume=True))
    process.join(600)
    assert process.exitcode == 0
    assert_same_end(config, never)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits_with_its_code(config: TrainConfig, tmp_path: Path, number, code) -> None:
    config = replace(config, max_iters=60)
    never = replace(config, out_dir=str(tmp_path / "never"))
    fit_module.main(never)
    endless = replace(config, save_seconds=1000.0)
    process = live(endless)
    wait_for(lambda: steps_logged(config) > 3, process)
    os.kill(process.pid or 0, number)
    process.join(600)
    assert process.exitcode == code
    stopped_at = load_checkpoint(Path(config.out_dir) / "last.pt").progress["step"]
    assert 3 < stopped_at < 60
    assert fit_module.main(replace(config, resume=True)) == 0
    assert_same_end(config, never)


def test_evaluating_and_logging_change_no_weight(config: TrainConfig, tmp_path: Path) -> None:
    often = replace(config, eval_interval=1, log_interval=1, out_dir=str(tmp_path / "often"))
    seldom = replace(config, eval_interval=7, log_interval=9, eval_iters=1, save_seconds=0.0)
    for run in (often, seldom):
        fit_module.main(run)
    one, other = (load_checkpoint(Path(run.out_dir) / "last.pt") for run in (often, seldom))
    assert_equal(one.model, other.model)
    assert_equal(one.optimizers, other.optimizers)


def test_a_damaged_last_checkpoint_falls_back_to_the_other(
    config: TrainConfig, tmp_path: Path, capsys
) -> None:
    never = replace(config, out_dir=str(tmp_path / "never"))
    for run in (config, never):
        fit_module.main(run)
    last = Path(config.out_dir) / "last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.unlink()  # not into the file, which is ckpt.pt's too
    last.write_bytes(content)
    longer = {"max_iters": 45, "resume": True}
    assert fit_module.main(replace(config, **longer)) == 0
    assert "passing it over" in capsys.readouterr().err
    fit_module.main(replace(never, **longer))
    assert_same_end(config, never)


def test_a_full_disk_leaves_the_checkpoint_and_the_training_goes_on(config, monkeypatch, capsys) -> None:
    """The disk is full from the second save to the last but one; the run ends as if it had not been."""
    saves, really = 0, files.os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal saves
        saves += 1
        if 4 < saves < 8:
            raise OSError(28, "No space left on device")
        really(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    assert fit_module.main(config) == 0
    assert "No space left on device" in capsys.readouterr().err
    assert load_checkpoint(Path(config.out_dir) / "last.pt").progress["step"] == config.max_iters


def test_resuming_a_finished_run_leaves_its_last_checkpoint_as_it_is(config: TrainConfig) -> None:
    last = Path(config.out_dir) / "last.pt"
    fit(replace(config, max_iters=3))
    before = last.read_bytes()
    fit(replace(config, max_iters=3, resume=True))
    assert last.read_bytes() == before
    fit(replace(config, max_iters=3, beta1=0.8, resume=True))  # a new setting is kept
    assert load_checkpoint(last).train_config.beta1 == 0.8


def test_a_training_whose_folder_another_has_taken_writes_nothing_there(config: TrainConfig, capsys) -> None:
    """Deleted and taken at an evaluation, a file that is not ours stays as it is."""
    out = Path(config.out_dir)
    taken: list[Any] = []

    def take(step: int, loss: float) -> bool:
        if not taken:
            while load_checkpoint(out / "last.pt").progress["step"] < step:  # it is written meanwhile
                time.sleep(0.01)
            shutil.rmtree(out)
            taken.append(lock(out, "busy"))
            taken[0].__enter__()
            (out / "last.pt").write_bytes(b"another's")
        return True

    with pytest.raises(UserError, match=r"another program has taken .*out"):
        fit(config, take)
    assert (out / "last.pt").read_bytes() == b"another's"
    taken[0].__exit__(None, None, None)
