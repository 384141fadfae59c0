"""A sweep trains every combination once, goes on where it was, and its table is that of the runs."""

import csv
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from waiting import wait_for

from nanogpt import load_metrics
from nanogpt.checkpoint.format import load_checkpoint
from nanogpt.cli.config import RunsConfig, SweepConfig
from nanogpt.cli.parse import parse
from nanogpt.cli.runs import main as show_runs
from nanogpt.cli.sweep import main as sweep
from nanogpt.config import TrainConfig
from nanogpt.errors import UserError
from nanogpt.sweep import runner
from nanogpt.sweep.grid import Trial, parse_vary, trials
from nanogpt.sweep.table import differing, find_runs, groups, is_done
from nanogpt.training.fit import fit


def flags(config: TrainConfig) -> list[str]:
    """A config as flags."""
    return runner.command(config)[4:]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trainings in this process, which start faster. Returns the names of those that were run."""
    ran: list[str] = []

    def run_all(todo: Sequence[Trial], jobs: int, stop: object) -> list[Trial]:
        failed: list[Trial] = []
        for trial in todo:
            ran.append(trial.name)
            try:
                fit(trial.config, quiet=True)
            except UserError:
                failed.append(trial)
        return failed

    monkeypatch.setattr(runner, "run_all", run_all)
    return ran


@pytest.fixture
def small(config: TrainConfig, tmp_path: Path) -> SweepConfig:
    """A sweep of two rates with two seeds."""
    values = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    values |= {"n_layer": 1, "max_iters": 10, "eval_interval": 5, "out_dir": str(tmp_path / "sweep")}
    return SweepConfig(**values, vary=("learning_rate=1e-3,1e-2", "seed=1,2"))


def test_every_combination_is_trained_once(small, in_this_process, capsys) -> None:
    assert sweep(small) == 0
    names = [f"learning_rate={rate},seed={seed}" for rate in ("1e-3", "1e-2") for seed in (1, 2)]
    assert in_this_process == names
    runs = find_runs(Path(small.out_dir))
    assert {(run.settings["learning_rate"], run.settings["seed"]) for run in runs} == {
        (0.001, 1), (0.001, 2), (0.01, 1), (0.01, 2),
    }  # fmt: skip
    assert (Path(small.out_dir) / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert sweep(small) == 0
    assert sweep(replace(small, vary=("learning_rate=1e-3,1e-2", "seed=1,2,3"))) == 0
    assert in_this_process == [*names, "learning_rate=1e-3,seed=3", "learning_rate=1e-2,seed=3"]
    assert "4 trainings, 4 of them done" in capsys.readouterr().out


def test_the_table_has_the_losses_of_the_runs(small, in_this_process, capsys) -> None:
    sweep(small)
    capsys.readouterr()
    runs = find_runs(Path(small.out_dir))
    names = differing(runs)
    assert names == ["learning_rate", "seed"]
    for run in runs:
        assert run.is_done
        assert run.best_val_loss == load_checkpoint(run.path / "ckpt.pt").progress["best_val_loss"]
    best, other = groups(runs, names)
    assert (best.values, other.values) == ((0.01,), (0.001,))
    losses = [run.best_val_loss for run in best.runs]
    assert best.mean == pytest.approx(statistics.fmean(losses))
    assert best.deviation == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert show_runs(RunsConfig(path=small.out_dir, csv=True)) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [float(row["best_val_loss"]) for row in rows] == sorted(run.best_val_loss for run in runs)
    assert show_runs(RunsConfig(path=small.out_dir, json=True)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["groups"][0]["mean"] == best.mean
    assert [run["settings"]["seed"] for run in found["runs"]] == [int(row["seed"]) for row in rows]


def test_a_run_that_is_not_done_is_resumed_and_marked(small, in_this_process, capsys) -> None:
    sweep(replace(small, vary=("seed=1,2",)))
    whole = load_checkpoint(Path(small.out_dir) / "seed=2" / "last.pt").model
    config = trials(small_train(small), {"seed": {"2": 2}})[0].config
    fit(replace(config, overwrite=True), keep_going=lambda step, loss: False, quiet=True)
    capsys.readouterr()
    show_runs(RunsConfig(path=small.out_dir))
    out = capsys.readouterr().out
    assert "5 of 10" in out
    assert "2 (1 not done)" in out
    sweep(replace(small, vary=("seed=1,2",)))
    assert in_this_process == ["seed=1", "seed=2", "seed=2"]
    again = load_checkpoint(Path(small.out_dir) / "seed=2" / "last.pt").model
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def small_train(config: SweepConfig) -> TrainConfig:
    """The training of a sweep, without what is varied."""
    return TrainConfig(**{field.name: getattr(config, field.name) for field in fields(TrainConfig)})


def test_a_run_that_is_at_its_end_but_not_evaluated_is_not_done(config) -> None:
    progress = {"step": 30, "evaluated_at": 20, "elapsed_s": 1.0, "worse_evaluations": 2}
    assert not is_done(config, progress)
    assert is_done(config, progress | {"evaluated_at": 30})
    early = progress | {"step": 20}
    assert [is_done(replace(config, patience=patience), early) for patience in (3, 2)] == [False, True]
    assert [is_done(replace(config, max_seconds=seconds), early) for seconds in (2, 1)] == [False, True]


def test_a_signal_stops_all_trainings_which_are_saved(small) -> None:
    arguments = ["--vary", "seed=1,2,3", "--jobs", "2", *flags(replace(small_train(small), max_iters=10**6))]
    process = subprocess.Popen(
        [sys.executable, "-m", "nanogpt", "sweep", *arguments], stdout=subprocess.PIPE, text=True
    )
    folders = [Path(small.out_dir) / f"seed={seed}" for seed in (1, 2)]
    assert wait_for(lambda: all((folder / "ckpt.pt").is_file() for folder in folders), process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert "the same command goes on" in out
    assert "left" not in out
    assert not (Path(small.out_dir) / "seed=3").exists()
    for folder in folders:
        assert "Stopped at step" in Path(f"{folder}.log").read_text()


def test_a_failed_training_is_named_with_its_error_and_the_others_go_on(small, capsys) -> None:
    bad = replace(small, vary=("learning_rate=1e30,1e-2",), jobs=2)
    with pytest.raises(UserError, match=r"1 of 2 trainings failed: learning_rate=1e30$"):
        sweep(bad)
    captured = capsys.readouterr()
    assert "learning_rate=1e30: the training breaks down near step" in captured.err
    assert "learning_rate=1e-2: best validation loss" in captured.out


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"vary": ()}, "--vary is missing"),
        ({"vary": ("lr=1,2",)}, "--vary lr: there is no such setting"),
        ({"vary": ("out_dir=a,b",)}, "--vary out_dir: there is no such setting"),
        ({"vary": ("seed=1,,2",)}, "has an empty value"),
        ({"vary": ("seed",)}, "has an empty value"),
        ({"vary": ("seed=1,1",)}, "has a value twice"),
        ({"vary": ("seed=1,x",)}, "could not convert|invalid|Error parsing"),
        ({"vary": ("bias=on,1",)}, "use on or off"),
        ({"vary": ("n_head=1,3",)}, "--n_embd 32 is not a multiple of --n_head 3"),
        ({"data_dir": "nowhere"}, "nowhere"),
    ],
)
def test_a_mistake_is_found_before_the_first_training(small, change, error, in_this_process) -> None:
    with pytest.raises(UserError, match=error):
        sweep(replace(small, **change))
    assert not in_this_process
    assert not Path(small.out_dir).exists()


def test_a_run_with_other_settings_is_not_taken_for_one_of_the_sweep(small, in_this_process) -> None:
    sweep(small)
    before = len(in_this_process)
    with pytest.raises(UserError, match=r"seed=1 holds a run with other settings"):
        sweep(replace(small, batch_size=4))
    assert len(in_this_process) == before


def test_the_command_of_a_training_is_parsed_to_its_settings(config) -> None:
    changed = replace(
        config, bias=False, qk_norm=True, patience=3, log_to=("jsonl", "tensorboard"), decays=("10:20",),
        schedule="constant", mlp_width=50, compile="off",
    )  # fmt: skip
    assert parse(TrainConfig, flags(changed), "train") == changed


def test_a_preset_leaves_the_folder_of_a_sweep() -> None:
    arguments = ["--preset", "classic", "--vary", "seed=1,2", "bias=on,off", "--seed", "3"]
    config = parse(SweepConfig, arguments, "sweep")
    assert (config.out_dir, config.n_embd, config.vary) == ("sweep", 128, ("seed=1,2", "bias=on,off"))


def test_the_trainings_share_the_threads(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")  # as the command itself sets it to the number of cores
    assert [runner.threads_of_each(jobs) for jobs in (1, 3, 20)] == [8, 2, 1]
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(runner, "usable_cores", lambda: 4)
    assert [runner.threads_of_each(jobs) for jobs in (1, 2, 20)] == [4, 2, 1]


def test_minutes_leave_what_is_varied(config) -> None:
    given = parse(
        SweepConfig, ["--minutes", "1", "--n_layer", "6", "--vary", "learning_rate=3e-4,1"], "sweep"
    )
    made = trials(small_train(given), {"learning_rate": {"3e-4": 3e-4}})[0].config
    assert made.fixed == ("minutes", "n_layer", "learning_rate")
    again = parse(TrainConfig, flags(made), "train")
    assert set(made.fixed) <= set(again.fixed)


def test_a_damaged_last_checkpoint_is_passed_over(small, in_this_process) -> None:
    sweep(replace(small, vary=("seed=1,2",)))
    (Path(small.out_dir) / "seed=1" / "last.pt").write_bytes(b"damaged")
    sweep(replace(small, vary=("seed=1,2",)))
    assert in_this_process == ["seed=1", "seed=2", "seed=1"]


def test_values_are_split_at_commas() -> None:
    assert parse_vary("--learning-rate= 1e-3, 3e-3") == ("learning_rate", ["1e-3", "3e-3"])


def test_a_folder_without_runs_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="holds no runs"):
        show_runs(RunsConfig(path=str(tmp_path)))


def test_a_damaged_run_and_an_earlier_one_are_left_out(config, tmp_path, capsys) -> None:
    fit(config, quiet=True)
    fit(config, quiet=True)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "last.pt").write_bytes(b"no checkpoint")
    assert [run.path for run in find_runs(tmp_path)] == [Path(config.out_dir)]
    assert f"left out: {damaged / 'last.pt'}" in capsys.readouterr().err


def test_metrics_are_arrays_with_their_steps(config) -> None:
    fit(config, quiet=True)
    found = load_metrics(config.out_dir)
    steps, losses = found["train_loss"]
    assert (steps == np.arange(1, 31)).all()
    rows = [json.loads(line) for line in (Path(config.out_dir) / "metrics.jsonl").read_text().splitlines()]
    assert losses.tolist() == [row["train_loss"] for row in rows if "train_loss" in row]
    assert found["val_loss"][0].tolist() == [10, 20, 30]
    assert load_metrics(Path(config.out_dir) / "metrics.jsonl").keys() == found.keys()
    with pytest.raises(UserError, match="does not exist: give a run folder"):
        load_metrics(Path(config.out_dir) / "nowhere")
