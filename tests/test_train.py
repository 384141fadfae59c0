"""Training does what its settings say, survives bad numbers, and says what is wrong in one line."""

import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import prepared
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanogpt.checkpoint.format import Checkpoint, load_checkpoint, save_checkpoint
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.config import TrainConfig
from nanogpt.data import batches as data_module
from nanogpt.data.batches import BatchLoader
from nanogpt.data.dataset import load_dataset
from nanogpt.errors import UserError
from nanogpt.machine import device, precision
from nanogpt.machine.cores import CoreWatch
from nanogpt.model.gpt import GPT
from nanogpt.training import checkpointing, report, results, trainer
from nanogpt.training.compilation import compile_model
from nanogpt.training.fit import fit
from nanogpt.training.setup import set_up


def last(config: TrainConfig) -> Checkpoint:
    return load_checkpoint(Path(config.out_dir) / "last.pt")


def rows(config: TrainConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(config.out_dir) / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_leaves_what_it_promises(config: TrainConfig, capsys) -> None:
    config = replace(config, max_iters=120, dropout=0.0, eval_interval=40)
    result = fit(config)
    out = Path(config.out_dir)
    assert result.reason == "finished"
    assert result.step == 120
    assert result.best_val_loss < 1.5 < math.log(40)
    assert {path.name for path in out.iterdir()} >= {"ckpt.pt", "last.pt", "metrics.jsonl", "loss.png"}
    printed = capsys.readouterr().out
    for piece in (
        "Using CPU",
        "Starting training on CPU...",
        "Plan: 120 steps of 128 tokens",
        "A step: ",
        "best so far",
    ):
        assert piece in printed
    logged = rows(config)
    assert [row["step"] for row in logged if "val_loss" in row] == [40, 80, 120]
    assert [row["step"] for row in logged if "train_loss" in row] == list(range(1, 121))
    elapsed = [row["elapsed_s"] for row in logged]
    assert elapsed == sorted(elapsed)
    assert all(row["wall_s"] >= row["elapsed_s"] for row in logged)


def test_validation_loss_is_that_of_the_whole_split(config: TrainConfig) -> None:
    """Against one forward pass for every window, summed in float64."""
    result = fit(replace(config, max_iters=10))
    saved = last(config)
    model = GPT(saved.model_config).eval()
    model.load_state_dict(saved.model)
    val = torch.from_numpy(load_dataset(Path(config.data_dir)).val.astype(np.int64))
    total = 0.0
    for start in range(0, len(val) - 1, config.block_size):
        piece = val[start : start + config.block_size + 1]
        logits, _ = model(piece[None, :-1])
        total -= logits[0].double().log_softmax(-1).gather(1, piece[1:, None]).sum().item()
    assert result.best_val_loss == pytest.approx(total / (len(val) - 1), rel=1e-5)


def test_accumulation_computes_the_same_update(config: TrainConfig, tmp_path: Path) -> None:
    whole = replace(config, dropout=0.0, max_iters=3)
    pieces = replace(whole, gradient_accumulation_steps=3, out_dir=str(tmp_path / "pieces"))
    fit(whole)
    fit(pieces)  # 8 sequences in micro-batches of 3, 3 and 2
    for name, weight in last(whole).model.items():
        torch.testing.assert_close(last(pieces).model[name], weight, rtol=1e-4, atol=1e-5)


def test_patience_stops_a_run_that_gets_no_better(config: TrainConfig) -> None:
    result = fit(replace(config, learning_rate=1e-12, max_iters=1000, eval_interval=2, patience=3))
    assert result.reason == "patience"
    assert result.step < 100


def test_max_seconds_counts_training_alone_and_goes_on_over_resumes(config: TrainConfig) -> None:
    config = replace(config, max_iters=100_000, eval_interval=100_000)
    result = fit(replace(config, max_seconds=0.2))
    assert result.reason == "time"
    assert result.elapsed_s >= 0.2
    before_the_last = [row["elapsed_s"] for row in rows(config) if "train_loss" in row][:-1]
    assert max(before_the_last, default=0.0) <= 0.2  # rounded
    assert math.isfinite(result.best_val_loss)  # evaluated at the end
    again = fit(replace(config, max_seconds=0.2, resume=True))
    assert again.step == result.step


def test_a_new_run_moves_the_earlier_one_away_and_overwrite_deletes_it(config: TrainConfig) -> None:
    fit(config)
    before = (Path(config.out_dir) / "ckpt.pt").read_bytes()
    fit(config)
    assert (Path(config.out_dir) / "previous/1/ckpt.pt").read_bytes() == before
    fit(replace(config, overwrite=True))
    assert not (Path(config.out_dir) / "previous/2").exists()


def test_resuming_a_finished_run_says_so_and_max_iters_extends_it(config: TrainConfig, capsys) -> None:
    fit(config)
    assert fit(replace(config, resume=True)).step == 30
    capsys.readouterr()
    assert fit(replace(config, resume=True, max_iters=40)).step == 40
    assert "--max_iters is now 40 (was 30)" in capsys.readouterr().out
    assert [row["step"] for row in rows(config) if "train_loss" in row] == list(range(1, 41))


@pytest.mark.parametrize(
    ("name", "value"), [("n_layer", 3), ("n_head", 4), ("n_embd", 64), ("block_size", 8), ("preset", "cpu")]
)
def test_resume_refuses_another_architecture(config: TrainConfig, name, value) -> None:
    fit(replace(config, max_iters=1))
    saved = getattr(config, name)
    with pytest.raises(UserError, match=f"--{name} {value} contradicts the checkpoint.*{name} {saved}"):
        fit(replace(config, resume=True, **{name: value}))


def test_resume_refuses_other_data(config: TrainConfig, tmp_path: Path, text: str) -> None:
    fit(replace(config, max_iters=1))
    prepared(tmp_path / "other", text[::-1])
    with pytest.raises(UserError, match="not the data this run was trained on"):
        fit(replace(config, resume=True, data_dir=str(tmp_path / "other")))


def test_resume_without_a_checkpoint(config: TrainConfig) -> None:
    with pytest.raises(UserError, match="no checkpoint to resume"):
        fit(replace(config, resume=True))


def test_resume_takes_new_hyperparameters(config: TrainConfig) -> None:
    fit(config)
    fit(replace(config, resume=True, max_iters=31, weight_decay=0.5))
    assert last(config).optimizers[0]["param_groups"][0]["weight_decay"] == 0.5


def test_out_dir_that_is_a_file(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        fit(replace(config, out_dir=str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_is_trained_in_by_one_process_at_a_time(config: TrainConfig) -> None:
    with (
        RunFolder(Path(config.out_dir)).locked(),
        pytest.raises(UserError, match="another training is writing"),
    ):
        fit(config)


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_the_validation_loss_is_logged_in_bits_a_byte_too(config: TrainConfig, tmp_path: Path, kind) -> None:
    folder = tmp_path / kind
    dataset = prepared(folder, "naïve words, näive wörds\n" * 60, tokenizer=kind, vocab_size=270)
    fit(replace(config, data_dir=str(folder)))
    evaluations = [row for row in rows(config) if "val_loss" in row]
    assert len(evaluations) == 3
    bits_per_token = (len(dataset.val) - 1) / math.log(2)
    first = dataset.tokenizer.tokens[int(dataset.val[0])]
    text = ("naïve words, näive wörds\n" * 60)[int(25 * 60 * 0.9) :]
    for row in evaluations:
        expected = row["val_loss"] * bits_per_token / (len(text.encode()) - len(first))
        assert row["val_bits_per_byte"] == pytest.approx(expected, rel=1e-6)


# --- numbers that are not finite ---


def poison(monkeypatch, bad_at) -> None:
    """Make the loss NaN in every step for which bad_at(run) holds."""
    really = trainer.forward_backward

    def forward_backward(run, **settings):
        loss = really(run, **settings)
        return loss * float("nan") if bad_at(run) else loss

    monkeypatch.setattr(trainer, "forward_backward", forward_backward)


def test_a_broken_step_is_skipped(config: TrainConfig, monkeypatch, capsys) -> None:
    poison(monkeypatch, lambda run: run.progress.step == 7)
    assert fit(config).reason == "finished"
    assert "step 8: loss nan" in capsys.readouterr().err
    assert [row["step"] for row in rows(config) if "train_loss" in row] == [n for n in range(1, 31) if n != 8]
    steps = {state["step"].item() for state in last(config).optimizers[0]["state"].values()}
    assert steps == {29}


def test_repeated_broken_steps_go_back_with_another_order(config: TrainConfig, monkeypatch, capsys) -> None:
    poison(monkeypatch, lambda run: run.progress.shuffle_id == 0 and run.progress.step >= 15)
    assert fit(config).reason == "finished"
    assert "Back to step 10, with the data in another order" in capsys.readouterr().err
    assert last(config).progress["shuffle_id"] == 1
    assert [row["step"] for row in rows(config) if "train_loss" in row] == list(range(1, 31))
    assert all(torch.isfinite(weight).all() for weight in last(config).model.values())


def test_training_that_breaks_down_in_every_order_is_given_up(config: TrainConfig, monkeypatch) -> None:
    poison(monkeypatch, lambda run: run.progress.step >= 15)
    with pytest.raises(UserError, match=r"breaks down near .* step 10 is saved.*train.py --resume --out_dir"):
        fit(config)
    assert last(config).progress["step"] == 10
    monkeypatch.undo()
    assert fit(replace(config, resume=True, learning_rate=1e-3)).reason == "finished"


def test_ruined_weights_at_an_evaluation_go_back_too(config: TrainConfig, capsys) -> None:
    with pytest.raises(UserError, match="breaks down"):
        fit(replace(config, learning_rate=1e35, warmup_iters=0, grad_clip=0.0, max_iters=3))
    assert last(config).progress["step"] == 0


def test_a_ruined_newest_checkpoint_gives_way_to_the_best(config: TrainConfig, monkeypatch, capsys) -> None:
    """Broken from step 15 on whenever the run comes from step 12, which was saved last."""

    def bad(run) -> bool:
        if run.progress.step == 12 and run.progress.shuffle_id == 0:
            run.checkpointer.save(run)
        return run.progress.step >= 15 and run.progress.shuffle_id < 2

    poison(monkeypatch, bad)
    assert fit(config).reason == "finished"
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Back")]
    assert [int(line.split()[3].rstrip(",")) for line in said] == [12, 10]


def test_a_rollback_in_an_evaluation_leaves_no_gap_and_no_double(config: TrainConfig, monkeypatch) -> None:
    really, failed = trainer.validation_loss, []

    def validation_loss(run):
        if run.progress.step == 20 and not failed:
            failed.append(20)
            return math.nan
        return really(run)

    monkeypatch.setattr(trainer, "validation_loss", validation_loss)
    fit(replace(config, log_interval=5))
    assert failed
    assert [row["step"] for row in rows(config) if "train_loss" in row] == [5, 10, 15, 20, 25, 30]
    assert [row["step"] for row in rows(config) if "val_loss" in row] == [10, 20, 30]


# --- arithmetic and compilation ---


def test_float16_keeps_its_scaler_over_a_resume(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, dtype="float16")
    never = replace(config, out_dir=str(tmp_path / "never"))
    fit(never)
    fit(replace(config, max_iters=13))
    # The schedule depends on max_iters, so pretend that the first life was cut short by the clock.
    fit(replace(config, out_dir=str(tmp_path / "cut"), max_seconds=1e-9))
    assert last(config).scaler["scale"] > 0
    cut = replace(config, out_dir=str(tmp_path / "cut"), resume=True)
    fit(cut)
    for name, weight in last(never).model.items():
        assert torch.equal(last(cut).model[name], weight)
    assert last(cut).scaler == last(never).scaler


def test_resume_keeps_the_dtype_that_auto_chose(config: TrainConfig, monkeypatch) -> None:
    config = replace(config, dtype="auto", max_iters=5)
    rates = {torch.float32: 1.0, torch.bfloat16: 2.0, torch.float16: 0.0}
    monkeypatch.setattr(precision, "matmul_rates", lambda _: rates)
    monkeypatch.setattr(precision, "is_bfloat16_faster", lambda _: True)
    fit(config)
    rates[torch.bfloat16] = 0.5  # another machine: it would choose otherwise, and can go on all the same
    fit(replace(config, resume=True, max_iters=6))
    kept = {"device": "cpu", "dtype": "bfloat16", "num_micro_batches": 1}
    assert last(config).precision == {**kept, "threads": 1, "torch": torch.__version__.partition("+")[0]}


def test_resume_says_if_another_number_of_threads_rounds_differently(config: TrainConfig, capsys) -> None:
    fit(replace(config, max_iters=5))
    fit(replace(config, resume=True, max_iters=6))
    assert "Threads" not in capsys.readouterr().out
    torch.set_num_threads(2)
    fit(replace(config, resume=True, max_iters=7))
    line = "Threads: 2 (was 1): from here on, numbers are rounded differently\n"
    assert line in capsys.readouterr().out
    assert last(config).precision["threads"] == 2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_leaves_a_dtype_that_crawls_here_and_says_so(config, monkeypatch, capsys, optimizer) -> None:
    config = replace(config, dtype="auto", max_iters=5, optimizer=optimizer)
    rates = {torch.float32: 1.0, torch.bfloat16: 2.0, torch.float16: 0.0}
    monkeypatch.setattr(precision, "matmul_rates", lambda _: rates)
    monkeypatch.setattr(precision, "is_bfloat16_faster", lambda _: True)
    fit(config)
    assert "Arithmetic: bfloat16" in capsys.readouterr().out
    rates[torch.bfloat16] = 0.05
    fit(replace(config, resume=True, max_iters=6))
    assert "the run computed in bfloat16 so far, which is slow on this device" in capsys.readouterr().err
    assert last(config).precision["dtype"] == "float32"
    assert last(config).precision.get("muon_dtype", "float32") == "float32"
    fit(replace(config, resume=True, max_iters=7, dtype="bfloat16"))
    assert last(config).precision["dtype"] == "bfloat16"


def test_a_run_of_an_earlier_version_orthogonalises_as_it_did(config: TrainConfig, monkeypatch) -> None:
    """In bfloat16, which was fixed, and is not written in its checkpoints."""
    config = replace(config, dtype="auto", max_iters=5, optimizer="muon")
    rates = {torch.float32: 1.0, torch.bfloat16: 0.9, torch.float16: 0.0}
    monkeypatch.setattr(precision, "matmul_rates", lambda _: rates)
    fit(config)
    path = Path(config.out_dir) / "last.pt"
    old = last(config)
    assert old.precision.pop("muon_dtype") == "float32"
    save_checkpoint(path, old)
    fit(replace(config, resume=True, max_iters=6))
    assert last(config).precision["muon_dtype"] == "bfloat16"


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inside torch.compile itself
def test_compiling_gives_the_same_training(config: TrainConfig, tmp_path: Path) -> None:
    plain = replace(config, dropout=0.0, max_iters=4)
    compiled = replace(plain, compile="on", out_dir=str(tmp_path / "compiled"))
    fit(plain)
    fit(compiled)
    assert set(last(compiled).model) == set(last(plain).model)  # no prefix from the wrapper
    for name, weight in last(plain).model.items():
        torch.testing.assert_close(last(compiled).model[name], weight, rtol=1e-3, atol=1e-4)


def test_a_failing_compiler_is_reported_and_done_without(config: TrainConfig, monkeypatch, capsys) -> None:
    def broken(*_):
        raise RuntimeError("no C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", lambda model, **_: broken)
    assert fit(replace(config, compile="on", max_iters=2)).reason == "finished"
    assert "torch.compile failed, going on without it: no C++ compiler found\n" in capsys.readouterr().err


def test_out_of_memory_says_what_to_do(config: TrainConfig, monkeypatch) -> None:
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "forward_backward", full)
    with pytest.raises(UserError, match="--grad_checkpoint blocks"):
        fit(config)
    with pytest.raises(UserError, match="smaller --block_size"):
        fit(replace(config, grad_checkpoint="blocks"))


def test_out_of_memory_while_the_model_is_built(config: TrainConfig) -> None:
    with pytest.raises(UserError, match="out of memory"):
        fit(replace(config, n_embd=10_000_000, n_head=1))


def test_a_failing_picture_does_not_fail_the_run(config: TrainConfig, monkeypatch, capsys) -> None:
    def broken(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(report, "plot_losses", broken)
    assert fit(replace(config, max_iters=2)).reason == "finished"
    assert "No loss curve: no fonts" in capsys.readouterr().err


def test_two_threads_of_a_process_do_not_train_at_once(config: TrainConfig, tmp_path: Path) -> None:
    """They would share PyTorch's random numbers; the one that came first is not disturbed."""
    never = replace(config, out_dir=str(tmp_path / "never"))
    fit(never)
    second = replace(config, out_dir=str(tmp_path / "second"))

    def meanwhile(step: int, loss: float) -> bool:
        with ThreadPoolExecutor(1) as pool, pytest.raises(UserError, match="another thread of this process"):
            pool.submit(fit, second).result()
        return True

    fit(config, keep_going=meanwhile)
    assert not Path(second.out_dir).exists()
    for name, weight in last(never).model.items():
        assert torch.equal(last(config).model[name], weight)
    assert fit(second).reason == "finished"  # afterwards it may


COMPILED = """
import warnings, torch
warnings.simplefilter("ignore")
torch.set_num_threads(1)
from nanogpt.checkpoint.format import load_checkpoint
import nanogpt.training.fit as fit_module
from nanogpt.training import trainer
from nanogpt.config import TrainConfig
fit_module.fit(TrainConfig(**{settings}))
assert "NaN" not in open({out!r} + "/metrics.jsonl").read()
model = load_checkpoint(__import__("pathlib").Path({out!r}) / "last.pt").model
print(*(repr(weight.double().sum().item()) for weight in model.values()))
"""


@pytest.mark.long
def test_compiled_code_of_another_processor_is_not_taken(config: TrainConfig, tmp_path: Path) -> None:
    """PyTorch's cache tells no vector instructions apart: code for others gave NaN, or crashed."""
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        pytest.skip("there are no others to compile for on this processor")
    sums = []
    for number, capability in enumerate(("default", "avx2", "default")):
        out = str(tmp_path / f"out-{number}")
        settings = asdict(
            replace(config, out_dir=out, max_iters=4, eval_interval=4, compile="on", dropout=0.0)
        )
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        environment |= {"ATEN_CPU_CAPABILITY": capability} if capability != "default" else {}
        code = COMPILED.format(settings=settings, out=out)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert "torch.compile failed" not in done.stderr
        sums.append([float(word) for word in done.stdout.splitlines()[-1].split()])
    assert sums[0] == sums[2] == pytest.approx(sums[1], rel=1e-3, abs=1e-3)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inside torch.compile itself
def test_evaluating_and_sampling_compile_nothing(config: TrainConfig, monkeypatch) -> None:
    """Shapes change there: what is compiled for training runs uncompiled."""
    graphs, really = [], torch.compile

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **settings: really(f, backend=backend, **settings))
    run = set_up(config, RunFolder(Path(config.out_dir)))
    compile_model(run, trainer.forward_backward)
    compiled = len(graphs)
    assert compiled > 0
    with device.eager_mode(), torch.no_grad():
        for length in (3, 5, 7):
            run.loss_fn(torch.zeros(1, length, dtype=torch.int64), torch.zeros(1, length, dtype=torch.int64))
    assert len(graphs) == compiled


def test_compiling_for_smaller_micro_batches_is_not_in_the_clock(config: TrainConfig, monkeypatch) -> None:
    """After a device ran out of memory: the new size is tried once before the time counts."""
    run = set_up(config, RunFolder(Path(config.out_dir)))
    now, plain, sizes = [0.0], run.loss_fn, []

    class Compiled:
        _orig_mod = run.loss_fn

        def __call__(self, x, y):
            if len(x) > 4:
                raise RuntimeError("CUDA out of memory")
            if len(x) not in sizes:
                now[0] += 60.0
                sizes.append(len(x))
            return plain(x, y)

    run.loss_fn = Compiled()
    monkeypatch.setattr("nanogpt.training.run.time.perf_counter", lambda: now[0])
    run.clock.lap_began = 0.0
    trainer.train_step(run)
    assert sizes == [4]
    assert run.clock.lap_began == 60.0


# --- the average ---


def test_the_average_follows_the_weights_and_is_what_counts(config: TrainConfig, monkeypatch) -> None:
    """Against the recursion computed from the weights of every step."""
    config = replace(config, ema_decay=0.8, max_iters=12, eval_interval=12)
    trail = []
    really = trainer.train_step

    def train_step(run):
        before = [p.detach().clone() for p in (run.ema_model.parameters() if not trail else trail[-1])]
        outcome = really(run)
        decay = min(0.8, run.progress.step / (9 + run.progress.step))
        trail.append([old * decay + new * (1 - decay) for old, new in zip(before, run.model.parameters())])  # noqa: B905
        return outcome

    monkeypatch.setattr(trainer, "train_step", train_step)
    result = fit(config)
    saved = last(config)
    model = GPT(saved.model_config).eval()
    model.load_state_dict(saved.weights)
    for expected, parameter in zip(trail[-1], model.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), expected.detach())
    assert not torch.equal(saved.average["token_embedding.weight"], saved.model["token_embedding.weight"])
    val = load_dataset(Path(config.data_dir)).val
    x, y = BatchLoader(val, torch.device("cpu"))(np.arange(0, len(val) - 17, 16), 16)
    with torch.no_grad():
        assert model(x, y)[1].item() == pytest.approx(result.best_val_loss, rel=0.1)


def test_an_average_may_begin_or_end_at_a_resume(config: TrainConfig, capsys) -> None:
    fit(replace(config, max_iters=10))
    start = last(config).model
    fit(replace(config, resume=True, max_iters=11, ema_decay=0.999))
    moved = last(config)
    for name, weight in moved.average.items():
        decay = min(0.999, 11 / 20)
        torch.testing.assert_close(weight, decay * start[name] + (1 - decay) * moved.model[name])
    fit(replace(config, resume=True, max_iters=12, ema_decay=0.0))
    assert last(config).average == {}


# --- devices that run ahead ---


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_running_ahead_computes_the_same(config: TrainConfig, tmp_path, monkeypatch, optimizer) -> None:
    """A GPU's order of events, on a CPU: numbers are read a step late, the guard undoes broken updates."""
    poison(monkeypatch, lambda run: run.progress.step in (4, 7, 20))
    config = replace(config, optimizer=optimizer, weight_decay=0.0, log_interval=3)
    fit(config)
    ahead = replace(config, out_dir=str(tmp_path / "ahead"))
    monkeypatch.setattr(device.CPU, "is_async", True)
    most = []
    really = results.read_result
    monkeypatch.setattr(
        results,
        "read_result",
        lambda run, outcome: most.append(run.progress.step - outcome.step) or really(run, outcome),
    )
    fit(ahead)
    assert set(most) == {0, 1}  # 0: before an evaluation
    for name, weight in last(config).model.items():
        assert torch.equal(last(ahead).model[name], weight)
    for one, other in zip(last(config).optimizers, last(ahead).optimizers, strict=True):
        for key, moments in one["state"].items():
            assert all(torch.equal(moments[name], other["state"][key][name]) for name in moments)
    shown = [(row["step"], row.get("train_loss"), row.get("val_loss")) for row in rows(config)]
    assert shown == [(row["step"], row.get("train_loss"), row.get("val_loss")) for row in rows(ahead)]


def test_running_ahead_goes_back_too(config: TrainConfig, monkeypatch, capsys) -> None:
    monkeypatch.setattr(device.CPU, "is_async", True)
    poison(monkeypatch, lambda run: run.progress.shuffle_id == 0 and run.progress.step >= 15)
    assert fit(config).reason == "finished"
    assert "Back to step 10, with the data in another order" in capsys.readouterr().err
    assert [row["step"] for row in rows(config) if "train_loss" in row] == list(range(1, 31))


def test_a_split_on_the_device_gives_the_same_windows(monkeypatch) -> None:
    monkeypatch.setattr(data_module, "TOKENS_PER_COPY", 300)
    for dtype in (np.uint8, np.uint16, np.uint32):
        tokens = np.random.default_rng(1).integers(0, 200, 1000).astype(dtype)
        away, resident = (BatchLoader(tokens, torch.device("cpu")) for _ in range(2))
        resident.make_resident()
        starts = np.array([0, 5, 800])
        for one, other in zip(away(starts, 199), resident(starts, 199), strict=True):
            assert one.dtype == other.dtype == torch.int64
            assert torch.equal(one, other)


@pytest.mark.parametrize(("free", "there"), [(32 * 1000, True), (31 * 1000, False)])
def test_a_split_lives_on_a_gpu_if_it_fits(monkeypatch, free: int, there: bool) -> None:
    made = []
    monkeypatch.setattr(device.CUDA, "free_memory", lambda *_: free)
    monkeypatch.setattr(BatchLoader, "make_resident", lambda self: made.append(1))
    BatchLoader(np.zeros(1000, np.uint8), torch.device("cuda"))
    assert bool(made) == there


# --- what is shown ---


def test_tensorboard_has_the_numbers_the_samples_and_the_settings(config: TrainConfig) -> None:
    fit(replace(config, tensorboard=True))
    events = EventAccumulator(str(Path(config.out_dir) / "runs")).Reload()
    tags = events.Tags()
    assert {"loss/train", "loss/val", "learning_rate", "gradient_norm", "tokens_per_s"} <= set(
        tags["scalars"]
    )
    assert {"sample/text_summary", "settings/text_summary"} <= set(tags["tensors"])
    assert [event.step for event in events.Scalars("loss/val")] == [10, 20, 30]


@pytest.mark.parametrize(("held", "cores", "said"), [(1.9, 2, True), (0.2, 2, False), (5.0, 8, False)])
def test_cores_that_others_hold_are_said_once(config, monkeypatch, capsys, held, cores, said) -> None:  # noqa: PLR0917
    """If there are not enough for this training besides."""
    monkeypatch.setattr(report, "ETA_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(report, "usable_cores", lambda: cores)
    monkeypatch.setattr(CoreWatch, "held_by_others", lambda self: held)
    fit(config)
    assert capsys.readouterr().out.count(f"Other programs hold {held:.1f} of {cores} cores") == said


def test_a_long_training_on_a_cpu_names_the_preset(config: TrainConfig, monkeypatch, capsys) -> None:
    monkeypatch.setattr(report, "ETA_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(report, "ONE_HOUR", 0.0)
    fit(config)
    printed = capsys.readouterr().out
    assert re.search(r"Expected: \d+ s more \([\d,]+ ms a step", printed)
    assert "--preset cpu trains a smaller model" in printed


def test_the_same_seed_gives_the_same_start_on_any_settings_of_the_loop(
    config: TrainConfig, tmp_path
) -> None:
    one = set_up(config, RunFolder(tmp_path / "one"))
    other = set_up(replace(config, batch_size=3, max_iters=7), RunFolder(tmp_path / "other"))
    for name, weight in one.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], weight)


def test_a_caller_can_end_a_run_after_an_evaluation(config: TrainConfig) -> None:
    """As a search for settings does with a hopeless one; the run is whole and can go on."""
    seen: list[int] = []

    def keep_going(step: int, loss: float) -> bool:
        assert loss > 0
        seen.append(step)
        return step < 20

    result = fit(config, keep_going)
    assert (result.reason, result.step, seen) == ("callback", 20, [10, 20])
    assert fit(replace(config, resume=True)).step == 30


def test_a_training_that_ends_with_an_evaluation_saves_its_end_once(config, monkeypatch):
    written: list[int] = []
    really = save_checkpoint

    def counted(path: Path, saved: Checkpoint) -> None:
        written.append(saved.progress["step"])
        really(path, saved)

    monkeypatch.setattr(checkpointing, "save_checkpoint", counted)
    fit(config)
    assert written.count(30) == 1
    fit(replace(config, resume=True, max_iters=35, eval_interval=20))
    assert written.count(35) == 1
    assert load_checkpoint(Path(config.out_dir) / "last.pt").progress["step"] == 35


def test_an_end_that_could_not_be_saved_at_its_evaluation_is_saved_then(config, monkeypatch, capsys):
    full = iter([True])
    really = save_checkpoint

    def save(path: Path, saved: Checkpoint) -> None:
        if saved.progress["step"] == 30 and next(full, False):
            raise UserError("the disk is full")
        really(path, saved)

    monkeypatch.setattr(checkpointing, "save_checkpoint", save)
    fit(config)
    assert "the disk is full (training goes on" in capsys.readouterr().err
    assert load_checkpoint(Path(config.out_dir) / "last.pt").progress["step"] == 30
