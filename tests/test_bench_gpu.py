"""The measurements for a GPU, tried on a CPU: they run, a row at a time, and lose none to what follows it."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench" / "gpu"


@pytest.fixture
def call(monkeypatch, tmp_path: Path):
    """A script of bench/gpu on the CPU, in this process; returns what it left, the machine first."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    precision = torch.get_float32_matmul_precision()

    def script(name: str, *flags: str):
        words = [f"{name}.py", "--device", "cpu", "--out", str(tmp_path), *flags]
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(str(BENCH / f"{name}.py"), run_name="__main__")
        lines = (tmp_path / f"gpu-{name}.jsonl").read_text("utf-8").splitlines()
        return list(map(json.loads, lines))

    yield script
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    import rows

    return rows


def test_throughput_measures_the_bare_step_and_the_trained_one(call):
    machine, products, *steps = call(
        "throughput", "--small", "--modes", "", "--rounds", "1", "--updates", "1"
    )
    assert machine["machine"]["torch"] == torch.__version__
    assert products["tflops"] > 0
    assert [(row["vocabulary"], row["optimizer"], row["step"]) for row in steps] == [
        (65, "adamw", "bare"),
        (65, "adamw", "train"),
        (5000, "muon", "bare"),
        (5000, "muon", "train"),
    ]
    assert all(row["compiled"] == "no" and row["tokens_per_s"] > 0 and row["mfu"] > 0 for row in steps)


def test_sampling_is_measured(call):
    _, *rows = call("decode", "--small", "--texts", "1", "2", "--rounds", "1")
    ways = {"launches", "graph", "requests, launches", "requests, graph"}
    assert [set(row) for row in rows] == [ways | {"model", "texts", "guesses"}, ways | {"model", "texts"}]
    assert all(row[way] > 0 for row in rows for way in ways)


def test_kernels_are_listed_longest_first(call):
    _, *rows = call("kernels", "--small", "--most", "2")
    assert [row["optimizer"] for row in rows] == ["adamw", "muon"]
    for row in rows:
        times = [kernel["ms"] for kernel in row["kernels"]]
        assert times == sorted(times, reverse=True)
        assert row["in kernels, ms"] == pytest.approx(sum(times))


def test_repeats_trains_its_variants(call, tmp_path: Path, text: str):
    path = tmp_path / "text.txt"
    path.write_text(text)
    names = ("no tables, 14 epochs", "4,096 rows")
    _, *runs = call("repeats", "--text", str(path), "--max_iters", "1", "--runs", *names)
    assert [run["variant"] for run in runs] == [*names]
    assert all(run["steps"] == 1 and run["best loss"] > 0 for run in runs)


def test_memory_measures_each_way_of_checkpointing(call):
    _, *steps = call("memory", "--small", "--rounds", "1", "--updates", "1", "--batch", "2")
    assert [row["checkpoint"] for row in steps] == ["off", "selective", "blocks"]
    assert all(row["ms"] > 0 for row in steps)


def test_race_prepares_its_text_and_races_several_presets(call, tmp_path: Path, text: str, capsys):
    path = tmp_path / "text.txt"
    path.write_text(text)
    flags = ("--preset", "speedrun", "classic", "--max_iters", "1", "--seeds", "1", "--target", "9")
    _, *runs = call("race", "--text", str(path), *flags)
    assert [run["preset"] for run in runs] == ["speedrun", "classic"]
    for run in runs:
        assert run["loss at the end"] == run["evaluations"][-1]["val_loss"]
        assert run["seconds to 9.0"] == run["evaluations"][0]["elapsed_s"]
    assert "is not Tiny Shakespeare" in capsys.readouterr().out


def test_race_without_a_text_is_one_line(call, tmp_path: Path):
    with pytest.raises(SystemExit, match=r"^error: .*nowhere.txt is not there: give --text"):
        call("race", "--text", str(tmp_path / "nowhere.txt"))


def test_without_a_gpu_a_script_ends_in_one_line():
    command = [sys.executable, str(BENCH / "memory.py")]
    environment = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: bench/gpu needs a CUDA or ROCm GPU")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (ValueError("this and\nthat"), "ValueError: this and"),
        (ModuleNotFoundError("No module named 'rich'"), "ModuleNotFoundError: No module named 'rich'"),
    ],
)
def test_a_row_that_fails_says_why_and_leaves_the_others(rows, error, said):
    def measure():
        raise error

    assert rows.attempt(measure) == {"error": said}
    assert rows.attempt(lambda: {"ms": 1.0}) == {"ms": 1.0}


def test_rows_are_in_the_file_while_it_is_still_written(rows, tmp_path: Path, capsys):
    options = rows.parser_of("").parse_args(["--out", str(tmp_path / "new"), "--name", "gpu-x"])
    with rows.Results("gpu-race", options) as results:
        results.add({"preset": "best", "seconds": 2.5, "evaluations": [1, 2]})
        lines = (tmp_path / "new" / "gpu-x.jsonl").read_text().splitlines()
        assert json.loads(lines[1]) == {"preset": "best", "seconds": 2.5, "evaluations": [1, 2]}
    assert capsys.readouterr().out == "preset: best  seconds: 2.5\n"


def test_a_table_has_a_column_for_every_name(rows):
    table = rows.table([{"model": "a", "ms": 12345.6}, {"model": "bcd", "error": "out of memory"}])
    assert table.splitlines() == ["model  ms      error", "a      12,346", "bcd            out of memory"]


@pytest.mark.parametrize("script", [BENCH / "run.sh", ROOT / "tests" / "gpu" / "run.sh"], ids=str)
def test_the_shell_scripts_parse(script: Path):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_run_sh_knows_its_flags(tmp_path: Path):
    done = subprocess.run(
        ["bash", str(BENCH / "run.sh"), "--quik"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: --quik is unknown: use --quick, --small, --text, --out or --device\n"
