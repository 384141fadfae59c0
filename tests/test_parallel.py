"""Several processes train as one does; whatever dies, nothing is lost; less memory gives the same numbers.

The processes are started by torchrun, as a user starts them, and meet over gloo.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from waiting import HANGS, wait_for

from nanogpt.checkpoint.format import load_checkpoint
from nanogpt.checkpoint.kept import kept_checkpoints
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.cli import main as cli
from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.data.config import PrepareConfig
from nanogpt.data.prepare import main as prepare
from nanogpt.distributed import world
from nanogpt.distributed.dtensor import full_tensor
from nanogpt.distributed.parallelize import checkpoint_activations, initialize_shards, shard, unsharded
from nanogpt.distributed.world import World, local_device
from nanogpt.errors import UserError
from nanogpt.model.gpt import GPT
from nanogpt.training import out_of_memory
from nanogpt.training.fit import fit
from nanogpt.training.out_of_memory import explain_training_memory
from nanogpt.training.report import describe_batch

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun for several processes needs POSIX")

CHILD = """
import faulthandler, os, signal, sys
faulthandler.dump_traceback_later(500)  # shows where, should it hang
import torch
torch.set_num_threads(1)
from nanogpt.cli import main as cli
from nanogpt.errors import UserError
import nanogpt.training.fit as fit_module
from nanogpt.training import setup, trainer
rank, life = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
plain = trainer.train_step
def train_step(run):
    at = run.progress.step
    {fault}
    return plain(run)
trainer.train_step = train_step
{setup}
cli.run_script("train")
"""

NEVER = "pass"


def arguments(config: TrainConfig) -> list[str]:
    """The flags that differ from the defaults."""
    plain = asdict(TrainConfig())
    values = {name: value for name, value in asdict(config).items() if value != plain[name]}
    return [word for name, value in values.items() for word in (f"--{name}", str(value)) if word != "True"]


def start(
    tmp_path: Path,
    config: TrainConfig,
    *flags: str,
    fault: str = NEVER,
    setup: str = "",
    extra: tuple[str, ...] = (),
):
    """torchrun on its way. fault: what every process runs before each update; setup: before all."""
    script = tmp_path / f"child-{abs(hash(fault))}.py"
    script.write_text(CHILD.format(fault=fault.strip(), setup=setup))
    flags = flags or ("--standalone", "--nproc_per_node=2")
    command = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval=0.1", *flags, str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if "--nnodes=2" in flags:  # else a machine that comes back waits for ever
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return subprocess.Popen(
        [*command, *arguments(config), *extra],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def torchrun(tmp_path: Path, config: TrainConfig, *flags: str, **settings):
    """Exit code, standard output and standard error of a training under torchrun. settings: see start."""
    process = start(tmp_path, config, *flags, **settings)
    out, err = ended(process, HANGS)
    return process.returncode, out, err


def ended(process: "subprocess.Popen[str]", seconds: float) -> tuple[str, str]:
    """Output of a process that must end in so many seconds; all that it said, if it does not."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        out, err = process.communicate()
        pytest.fail(f"still running after {seconds} s\n==== OUT\n{out}\n==== ERR\n{err}")


def rows(config: TrainConfig, kind: str) -> dict[int, float]:
    """The losses of a run by step, each step once and in order."""
    lines = (Path(config.out_dir) / "metrics.jsonl").read_text().splitlines()
    found = [(row["step"], row[kind]) for row in map(json.loads, lines) if kind in row]
    assert found == sorted(set(found))
    assert len({number for number, _ in found}) == len(found)
    return dict(found)


def same_course(one: TrainConfig, other: TrainConfig) -> None:
    """Both runs logged the same steps and losses, and ended with the same weights, but for rounding."""
    for kind in ("train_loss", "val_loss"):
        ours, theirs = rows(one, kind), rows(other, kind)
        assert ours.keys() == theirs.keys()
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-4)
    weights = [load_checkpoint(Path(config.out_dir) / "last.pt").model for config in (one, other)]
    for name, tensor in weights[0].items():
        assert (weights[1][name] - tensor).norm() < 5e-3 * tensor.norm(), name


def same_kept(one: TrainConfig, other: TrainConfig) -> None:
    """Both runs kept the same steps, each in one file, with the same weights but for rounding."""
    ours, theirs = (kept_checkpoints(Path(config.out_dir) / "checkpoints") for config in (one, other))
    assert list(ours) == list(theirs)
    for step, path in ours.items():
        a, b = load_checkpoint(path).model, load_checkpoint(theirs[step], gather=False).model
        assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)


def last_step(config: TrainConfig) -> int:
    return int(torch.load(Path(config.out_dir) / "last.pt", weights_only=True)["progress"]["step"])


@pytest.fixture
def plain(config: TrainConfig) -> TrainConfig:
    """Without dropout, whose masks differ from one process to the other; a batch that does not divide."""
    return replace(config, dropout=0.0, batch_size=9, learning_rate=3e-3)


# As one


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "optimizer": "muon",
            "ema_decay": 0.9,
            "gradient_accumulation_steps": 5,
            "grad_checkpoint": "blocks",
            "eval_iters": 3,
        },
        {"parallel": "fsdp"},
        {
            "parallel": "fsdp",
            "optimizer": "muon",
            "ema_decay": 0.9,
            "gradient_accumulation_steps": 5,
            "grad_checkpoint": "blocks",
        },
    ],
)
def test_two_processes_train_as_one_does(plain, tmp_path, settings):
    alone = replace(plain, out_dir=str(tmp_path / "alone"), **settings)
    both = replace(alone, out_dir=str(tmp_path / "both"))
    fit(alone)
    code, out, err = torchrun(tmp_path, both)
    assert code == 0, err
    assert "Warning" not in err, err
    assert out.count("Starting training") == out.count("Finished:") == out.count("Loss curve") == 1
    written = [path.name for path in RunFolder(Path(both.out_dir)).shards.glob("*")]
    assert written == (["30"] if both.parallel == "fsdp" else [])  # once
    same_course(alone, both)


def test_of_pairs_two_processes_count_the_tokens_of_both(plain, tmp_path):
    """Completions of very different lengths: a process has many of the targets that count, or few."""
    lines = [json.dumps({"q": "and " * 5, "a": "yes" * (number % 3) ** 3 + "."}) for number in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    fields = {"prompt_field": "q", "completion_field": "a"}
    prepare(PrepareConfig((str(tmp_path / "pairs.jsonl"),), str(tmp_path / "pairs"), **fields))
    settings = {"gradient_accumulation_steps": 5, "data_dir": str(tmp_path / "pairs")}
    alone = replace(plain, out_dir=str(tmp_path / "alone"), max_iters=10, **settings)
    both = replace(alone, out_dir=str(tmp_path / "both"))
    fit(alone)
    code, _, err = torchrun(tmp_path, both)
    assert code == 0, err
    same_course(alone, both)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(plain, tmp_path, kind):
    unbroken = replace(plain, out_dir=str(tmp_path / "unbroken"), max_iters=30, parallel=kind, ema_decay=0.9)
    resumed = replace(
        unbroken, out_dir=str(tmp_path / "resumed"), schedule="trapezoid", cooldown=0.0, min_lr=1.0
    )
    unbroken = replace(resumed, out_dir=unbroken.out_dir)
    fit(unbroken)
    fit(replace(resumed, max_iters=10))
    code, _, err = torchrun(tmp_path, replace(resumed, max_iters=20, resume=True))
    assert code == 0, err
    fit(replace(resumed, resume=True))
    same_course(unbroken, resumed)
    assert not list(RunFolder(Path(resumed.out_dir)).shards.glob("*"))  # nobody needs them any more


def test_sharded_processes_compute_in_bfloat16_too(plain, tmp_path):
    alone = replace(plain, out_dir=str(tmp_path / "alone"), dtype="bfloat16")
    both = replace(alone, out_dir=str(tmp_path / "both"), parallel="fsdp")
    fit(alone)
    code, _, err = torchrun(tmp_path, both)
    assert code == 0, err
    ours, theirs = rows(alone, "val_loss"), rows(both, "val_loss")
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=0.01)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_process_that_has_no_sequence_left_keeps_step(plain, tmp_path, kind):
    """Nine sequences, one at a time: five for the first process, four for the second."""
    alone = replace(plain, out_dir=str(tmp_path / "alone"), max_iters=10)
    both = replace(alone, out_dir=str(tmp_path / "both"), parallel=kind, micro_batch=1)
    fit(alone)
    code, _, err = torchrun(tmp_path, both)
    assert code == 0, err
    same_course(alone, both)


SHORT_OF_MEMORY = """
    if rank == 0 and at == 0 and not hasattr(run, "full"):
        run.full, real = True, run.loss_fn
        class Full:
            _orig_mod = real
            def __call__(self, x, y):
                if len(x) > 3:
                    raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
                return real(x, y)
        run.loss_fn = Full()
"""


def test_one_process_that_runs_out_of_memory_halves_the_pieces_of_all(plain, tmp_path):
    """With a model that has buffers, too."""
    alone = replace(plain, out_dir=str(tmp_path / "alone"), max_iters=10, positions="rope")
    both = replace(alone, out_dir=str(tmp_path / "both"))
    fit(alone)
    code, _, err = torchrun(tmp_path, both, fault=SHORT_OF_MEMORY)
    assert code == 0, err
    assert err.count("out of memory: going on with 2 micro-batches") == 1
    same_course(alone, both)


def test_a_compiler_that_fails_in_one_process_is_done_without_in_all(plain, tmp_path):
    config = replace(plain, max_iters=5, compile="on")
    broken = """
import torch
def compile(model, **_):
    if os.environ["RANK"] == "0":
        return model
    raise RuntimeError("no C compiler")
torch.compile = compile
"""
    code, _, err = torchrun(tmp_path, config, setup=broken)
    assert code == 0, err
    assert err.count("torch.compile failed, going on without it: no C compiler") == 1
    assert last_step(config) == 5


def test_sharded_processes_compile_their_blocks(plain, tmp_path):
    alone = replace(plain, out_dir=str(tmp_path / "alone"), max_iters=10)
    both = replace(alone, out_dir=str(tmp_path / "both"), parallel="fsdp", compile="on")
    fit(alone)
    code, _, err = torchrun(tmp_path, both)
    assert code == 0, err
    assert "torch.compile failed" not in err
    same_course(alone, both)


def test_shards_that_cannot_be_written_do_not_end_the_training(plain, tmp_path):
    calm, hit = (replace(plain, out_dir=str(tmp_path / name), parallel="fsdp") for name in ("calm", "hit"))
    fit(calm)
    full = (
        "from nanogpt.checkpoint import sharded; sharded.really = getattr(sharded, 'really', sharded.sha256);"
        " sharded.sha256 = (lambda path: open('/dev/full', 'w', 1).write(chr(10)))"
        " if rank == 1 and 5 < at < 15 else sharded.really"
    )
    code, _, err = torchrun(tmp_path, hit, fault=full)
    assert code == 0, err
    lines = [line for line in err.splitlines() if "training goes on" in line]
    assert len(lines) == 1
    assert "shards/10: No space left on device" in lines[0]
    assert last_step(hit) == 30
    same_course(calm, hit)


def test_sharded_processes_refuse_float16(plain, tmp_path):
    code, _, err = torchrun(tmp_path, replace(plain, parallel="fsdp", dtype="float16"))
    assert code != 0
    (line,) = [line for line in err.splitlines() if line.startswith("error")]  # of whichever was the first
    assert line.endswith(": --parallel fsdp does not support float16: give --dtype bfloat16")


# What dies


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_process_killed_in_the_middle_of_a_step_costs_no_more_than_the_steps_since_the_last_save(
    plain, tmp_path, kind
):
    often = replace(plain, save_seconds=0.0, parallel=kind, keep_checkpoints=3)
    calm, hit = (replace(often, out_dir=str(tmp_path / name)) for name in ("calm", "hit"))
    fit(calm)
    kill = "if rank == 1 and life < 2 and at == 12 + 9 * life: os.kill(os.getpid(), signal.SIGKILL)"
    code, out, err = torchrun(
        tmp_path, hit, "--standalone", "--nproc_per_node=2", "--max_restarts=2", fault=kill
    )
    assert code == 0, err
    assert last_step(hit) == 30
    assert not (Path(hit.out_dir) / "previous").exists()
    assert err.count("lost the connection to another process") == 2, err
    assert "Traceback" not in err.split("torch.distributed.elastic")[0]
    assert re.search("from step 1[0-2]", out)  # 12, or what was in place while that was written
    same_course(calm, hit)
    same_kept(calm, hit)


def test_a_process_that_fails_ends_all_with_its_message(plain, tmp_path):
    fault = 'if rank == 1 and at == 7: raise UserError("the disk is on fire: put it out")'
    code, _, err = torchrun(tmp_path, plain, fault=fault)
    assert code != 0
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert lines == ["error (process 2 of 2): the disk is on fire: put it out"]


def test_a_bug_in_one_process_keeps_its_traceback(plain, tmp_path):
    code, _, err = torchrun(tmp_path, plain, fault="assert rank == 0 or at < 7, 'a bug of rank 1'")
    assert code != 0
    assert err.count("AssertionError: a bug of rank 1") == 1
    assert "Connection closed" not in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, r"error.*: --batch_size 1 is too small for 2 processes: give at least 2"),
        ({"data_dir": "nowhere"}, "error: nowhere/vocab.pt is missing"),
        ({"max_iters": 0}, "error: --max_iters 0 is too small"),
    ],
)
def test_a_mistake_is_said_once(plain, tmp_path, changes, message):
    config = plain if "max_iters" in changes else replace(plain, **changes)
    extra = ("--max_iters", "0") if "max_iters" in changes else ()
    code, _, err = torchrun(tmp_path, config, extra=extra)
    assert code != 0
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert re.match(message, lines[0])


def test_the_first_process_reports_a_mistake_however_late_it_is(plain, tmp_path):
    late = "import time; time.sleep(1.5 * (rank == 0))"
    code, _, err = torchrun(tmp_path, replace(plain, data_dir="nowhere"), setup=late)
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert (code != 0, lines) == (
        True,
        [line for line in lines if "error: nowhere/vocab.pt is missing" in line],
    )
    assert len(lines) == 1, err


def test_a_process_that_is_alone_with_its_mistake_reports_it(monkeypatch, capsys):
    monkeypatch.setattr(cli, "FIRST_PROCESS_S", 0.01)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.run_command("train", ["--max_iters", "0"], "train.py") == 2
    assert capsys.readouterr().err.startswith("error (process 3 of 4): --max_iters 0 is too small")


def test_a_signal_to_the_launcher_stops_all_after_the_same_step(plain, tmp_path):
    config = replace(plain, max_iters=100_000, eval_interval=100_000)
    process = start(tmp_path, config)
    path = Path(config.out_dir) / "metrics.jsonl"
    assert wait_for(lambda: path.exists() and path.read_text().count("\n") > 20, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=HANGS)
    assert out.count("Stopped at step") == 1
    assert last_step(config) == max(rows(config, "train_loss"))


def test_of_two_machines_one_dies_and_comes_back(plain, tmp_path):
    """Two agents, as on two machines: the second is killed, with its workers, and started again."""
    calm = replace(plain, out_dir=str(tmp_path / "calm"), max_iters=60, save_seconds=0.0)
    hit = replace(calm, out_dir=str(tmp_path / "hit"))
    fit(calm)
    port = free_port()
    flags = (
        "--nnodes=2", "--nproc_per_node=1", "--max_restarts=3", "--rdzv_backend=c10d", "--rdzv_id=job-7",
        f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1",
    )  # fmt: skip
    slowly = "import time; time.sleep(0.05)"
    host, guest = (f"--rdzv_conf=keep_alive_interval=1,is_host={answer}" for answer in ("true", "false"))
    first = start(tmp_path, hit, *flags, host, fault=slowly)
    second = start(tmp_path, hit, *flags, guest, fault=slowly)
    path = Path(hit.out_dir) / "metrics.jsonl"
    assert wait_for(lambda: path.exists() and path.read_text().count("train_loss") > 10, first)
    kill_tree(second.pid)
    second.communicate()
    again = start(tmp_path, hit, *flags, guest, fault=slowly)
    try:
        _, err = ended(first, HANGS)
    finally:
        kill_tree(again.pid)
        _, err_again = again.communicate()
        print(err_again)
    assert first.returncode == 0, err + "==== AGAIN" + err_again
    assert last_step(hit) == 60
    assert not (Path(hit.out_dir) / "previous").exists()
    same_course(calm, hit)


def free_port() -> int:
    """A port that nobody listens on."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and its children, as when a machine loses its power."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    for number in [*map(int, listed.stdout.split()), pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def test_a_restarted_job_goes_on_with_its_own_run_alone(plain, tmp_path):
    folder = RunFolder(Path(plain.out_dir))
    assert not folder.is_restart_of(plain, "job", restarted=True)  # nothing there
    fit(replace(plain, max_iters=5))
    other = replace(plain, max_iters=5, learning_rate=1.0)
    assert folder.is_restart_of(replace(plain, max_iters=5), "", restarted=True)
    assert not folder.is_restart_of(other, "job", restarted=True)
    assert not folder.is_restart_of(replace(plain, max_iters=5), "job", restarted=False)
    folder.job.write_text("job")
    assert not folder.is_restart_of(replace(plain, max_iters=5), "job", restarted=False)  # it is finished
    folder.last.write_bytes(b"torn")
    assert not folder.is_restart_of(replace(plain, max_iters=5), "job", restarted=True)


# One process


@pytest.mark.parametrize(
    ("environment", "said"), [({}, "early\nlate\n"), ({"TORCHELASTIC_RUN_ID": "a"}, "early\n")]
)
def test_a_process_of_torchruns_leaves_without_taking_the_interpreter_down(environment, said):
    script = (
        "import atexit, sys; from nanogpt.distributed.world import hard_exit; atexit.register(print, 'late');"
        " print('early'); hard_exit(3); sys.exit(3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, said)


@pytest.mark.parametrize(
    ("batch_size", "processes", "pieces", "words"),
    [
        (64, 1, 4, "64 sequences = 4 micro-batches of 16"),
        (64, 2, 1, "64 sequences = 2 processes x 1 micro-batch of 32"),
        (9, 2, 2, "9 sequences = 2 processes x 2 micro-batches of 2 or 3"),
        (3, 2, 8, "3 sequences = 2 processes x 2 micro-batches of 1"),
    ],
)
def test_how_a_batch_is_cut_up_is_said(batch_size, processes, pieces, words):
    assert describe_batch(batch_size, processes, pieces) == words


def test_the_shares_of_a_batch_are_the_batch():
    items = np.arange(13)
    for size in range(1, 14):
        shares = [World(rank, size).local_share(items) for rank in range(size)]
        assert np.concatenate(shares).tolist() == items.tolist()
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_every_question_is_answered_at_once():
    world = World()
    assert world.max_over_ranks(3, 0) == [3, 0]
    assert world.all_gather([1.5]) == [1.5]
    assert world.broadcast_bool(lambda: True)
    assert not world.broadcast_bool(lambda: False)


@pytest.mark.parametrize("mode", ["blocks", "selective"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointed_activations_give_the_same_gradients(mode, dropout):
    x, y = torch.randint(9, (2, 3, 8))
    results = []
    for kind in ("off", mode):
        torch.manual_seed(1)
        model = GPT(GPTConfig(vocab_size=9, block_size=8, n_layer=3, n_head=2, n_embd=16, dropout=dropout))
        names = list(model.state_dict())
        checkpoint_activations(model, kind)
        assert list(model.state_dict()) == names
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(x, y)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_checkpointed_activations_are_not_kept():
    """What autograd holds on to between the passes, counted in bytes."""
    sizes = {}
    for mode in ("off", "blocks"):
        torch.manual_seed(1)
        model = GPT(GPTConfig(vocab_size=9, block_size=64, n_layer=6, n_head=2, n_embd=64, dropout=0.1))
        checkpoint_activations(model, mode)
        held: dict[int, int] = {}

        def keep(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.loss(*torch.randint(9, (2, 4, 64)))
        sizes[mode] = sum(held.values())
    assert sizes["blocks"] < sizes["off"] / 3


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({}, "--grad_checkpoint blocks"),
        ({"micro_batch": 4}, "--micro_batch auto"),
        ({"grad_checkpoint": "blocks"}, "a smaller --block_size or --n_embd"),
    ],
)
def test_what_never_fits_ends_in_one_line_with_the_fix(config, monkeypatch, settings, fix):
    def loss(self, x, y):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(GPT, "loss", loss)
    with pytest.raises(UserError, match="out of memory") as raised:
        fit(replace(config, **settings))
    assert fix in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("batch_size", "pieces", "fix"), [(9, 2, 1), (64, 1, 16), (64, 4, 4)])
def test_sharded_processes_are_told_the_size_to_try(monkeypatch, batch_size, pieces, fix):
    """Half of what they took at last."""
    monkeypatch.setattr(out_of_memory, "is_sharded", lambda _: True)
    config = TrainConfig(batch_size=batch_size, parallel="fsdp")
    run = SimpleNamespace(num_micro_batches=pieces, model=None)
    expected = pytest.raises(UserError, match=f"out of memory: give --micro_batch {fix},")
    with expected, explain_training_memory(config, World(0, 2), run):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")


def test_one_gpu_a_process_or_the_cpu(monkeypatch):
    several = World(1, 2, local_rank=1, local_size=2)
    assert local_device("auto", several) == "cpu"  # not Apple's GPU, which all would share
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert local_device("auto", several) == "cuda:1"
    assert local_device("cuda", several) == "cuda:1"
    assert local_device("cpu", several) == "cpu"
    assert local_device("mps", World()) == "mps"
    with pytest.raises(UserError, match="--device mps takes one process"):
        local_device("mps", several)
    with pytest.raises(
        UserError, match="--device cuda:0 is for one process, but there are 2: give --device cuda"
    ):
        local_device("cuda:0", several)
    assert local_device("cuda:0", World(1, 2)) == "cuda:0"  # a process a machine


# Libraries and launchers


@pytest.mark.parametrize(
    ("gpu", "nccl", "libraries"),
    [
        (False, True, "gloo"),
        (True, True, "cpu:gloo,cuda:nccl"),
        (True, False, "gloo"),  # Windows, some Jetson builds
    ],
)
def test_processes_are_connected_by_what_this_pytorch_has(monkeypatch, gpu, nccl, libraries):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    assert world.backend() == libraries


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, "srun has started 8 processes"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "mpirun has started 2 processes"),
        ({"PMI_SIZE": "4"}, "mpiexec has started 4 processes"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "WORLD_SIZE is set, but not RANK"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "but not MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_a_launcher_that_does_not_say_who_is_who_is_refused(config, monkeypatch, variables, launcher):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{launcher}.*torchrun"):
        fit(config)
    assert not Path(config.out_dir).exists()


@pytest.mark.parametrize("variables", [{"SLURM_STEP_NUM_TASKS": "1"}, {"WORLD_SIZE": "1"}, {"RANK": "0"}, {}])
def test_one_process_of_a_launcher_is_one_process(config, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert fit(replace(config, max_iters=1)).reason == "finished"


def test_a_launcher_that_speaks_as_torchrun_does_is_understood(plain, tmp_path):
    """RANK, WORLD_SIZE and an address, as accelerate, or a PyTorchJob without an elastic policy, set them."""
    alone = replace(plain, out_dir=str(tmp_path / "alone"), max_iters=6)
    both = replace(alone, out_dir=str(tmp_path / "both"))
    fit(alone)
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(fault=NEVER, setup=""))
    port = str(free_port())
    processes = []
    for rank in range(2):
        told = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | told | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, str(script), *arguments(both)]
        processes.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
        )
    said = [ended(process, HANGS) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    same_course(alone, both)


@pytest.mark.parametrize(
    ("error", "rank", "first", "code", "said"),
    [
        ("UserError('no room: make some')", 0, True, 2, "error: no room: make some\n"),
        ("UserError('no room: make some')", 1, True, 2, "error (process 2 of 2): no room: make some\n"),
        ("UserError('no room: make some')", 1, False, 2, ""),
        (
            "RuntimeError('NCCL error in: ...')",
            0,
            True,
            2,
            "process 1 of 2: lost the connection to another process\n",
        ),
        (
            "RuntimeError('remote process exited')",
            1,
            True,
            2,
            "process 2 of 2: lost the connection to another process\n",
        ),
        ("ValueError('a bug')", 1, True, 1, "ValueError: a bug\n"),
        ("ValueError('a bug')", 1, False, 2, ""),
    ],
)
def test_a_process_that_fails_leaves_at_once(error, rank, first, code, said):
    """Not by way of the interpreter's end, which can wait for the others' ends of the connection."""
    script = (
        "import atexit; from nanogpt.distributed.world import World, fail;"
        "from nanogpt.errors import UserError;"
        f" atexit.register(print, 'late'); fail({error}, World({rank}, 2), first={first})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.endswith(said)
    assert done.stderr.count("\n") <= max(1, 2 * (code == 1))


# What they start from


DIFFERENT = """
from dataclasses import replace
if os.environ["RANK"] == "1":
    {difference}
"""


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ("setup.torch.__version__ = '2.0'", "version of PyTorch: .* in process 1, 2.0 in process 2"),
        (
            "plain_load = setup.load_dataset;"
            " setup.load_dataset = lambda path, **_: replace(plain_load(path), fingerprint='another text')",
            "data: .* in process 1, another text in process 2",
        ),
        (
            "plain_set_up = fit_module.set_up; fit_module.set_up ="
            " lambda config, *rest: plain_set_up(replace(config, seed=7), *rest)",
            "--seed: 1337 in process 1, 7 in process 2",
        ),
    ],
)
def test_processes_that_start_from_something_else_refuse_to_train(plain, tmp_path, difference, message):
    """Else they would average strangers' gradients, and end as if all were well."""
    setup = DIFFERENT.format(difference=difference)
    code, _, err = torchrun(tmp_path, replace(plain, max_iters=5), setup=setup)
    assert code != 0
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert re.search(f"do not start from the same {message}", lines[0])


def test_processes_that_resume_from_different_steps_refuse_to_train(plain, tmp_path):
    """As with a disk that is not shared, or is stale."""
    config = replace(plain, max_iters=6, eval_interval=3)
    other = replace(config, out_dir=str(tmp_path / "other"))
    fit(replace(config, max_iters=6))
    fit(replace(other, max_iters=3))
    setup = f"""
from dataclasses import replace
from nanogpt.checkpoint import run_dir
if os.environ["RANK"] == "1":
    plain_set_up = fit_module.set_up
    fit_module.set_up = lambda config, folder, world: plain_set_up(
        config, run_dir.RunFolder(run_dir.Path({str(other.out_dir)!r})), world)
"""
    resumed = replace(config, max_iters=9, resume=True)
    code, _, err = torchrun(tmp_path, resumed, setup=setup)
    assert code != 0
    assert "do not start from the same step: 6 in process 1, 3 in process 2" in err
    assert last_step(config) == 6


# Shards


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"positions": "rope", "tied": False, "zero_init": True, "mlp": "swiglu"},
        {"positions": "rope", "rope_base": 1e6, "head_dim": 12},
        {"bias": False},
    ],
)
def test_a_sharded_model_begins_with_the_same_weights_and_no_process_holds_it_all(tmp_path, settings):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    small = {"vocab_size": 9, "block_size": 8, "n_layer": 3, "n_head": 2, "n_embd": 16, "dropout": 0.0}
    shape = GPTConfig(**small, ngram_vocab=11, **settings)
    try:
        with torch.device("meta"):
            sharded_model = GPT(shape)
        shard(sharded_model, torch.device("cpu"), torch.float32)
        initialize_shards(sharded_model, seed=5)
        torch.manual_seed(5)
        full_model = GPT(shape)
        shards = sharded_model.state_dict()
        assert shards.keys() == full_model.state_dict().keys()
        for name, tensor in full_model.state_dict().items():
            assert torch.equal(full_tensor(shards[name]), tensor), name
        x = torch.randint(9, (2, 8))
        assert torch.equal(sharded_model(x)[0], full_model(x)[0])
        with unsharded(sharded_model), torch.no_grad():
            for _ in range(2):
                assert torch.equal(sharded_model(x)[0], full_model(x)[0])
    finally:
        dist.destroy_process_group()


WITHOUT_DISTRIBUTED = """
import builtins, torch, torch.distributed
really = builtins.__import__
def guarded(name, globals=None, *rest, **more):
    if name.startswith("torch.distributed.") and (globals or {}).get("__name__", "").startswith("nanogpt"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return really(name, globals, *rest, **more)
builtins.__import__ = guarded
torch.distributed.is_available = lambda: False
for name in ("is_torchelastic_launched", "is_nccl_available", "all_reduce", "init_process_group", "get_rank"):
    delattr(torch.distributed, name)
from nanogpt.cli import plan, sample
import nanogpt.training.fit as fit_module
from nanogpt.training import trainer
from nanogpt.inference.config import SampleConfig
from nanogpt.config import TrainConfig
"""


def test_a_pytorch_without_torch_distributed_trains_and_samples(config, tmp_path):
    """AMD's builds for Windows have none."""
    settings = asdict(replace(config, optimizer="muon", max_iters=4))
    script = f"""{WITHOUT_DISTRIBUTED}
settings = {settings!r}
assert fit_module.main(TrainConfig(**settings)) == 0
assert fit_module.main(TrainConfig(**settings | {{"resume": True, "max_iters": 6}})) == 0
assert sample.main(SampleConfig(checkpoint={config.out_dir + "/ckpt.pt"!r}, num_tokens=5, seed=1)) == 0
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_adapters_as_one_does(plain, tmp_path, kind):
    """Frozen weights have no gradient to average; all processes start from the same model."""
    fit(replace(plain, max_iters=2, out_dir=str(tmp_path / "base")))
    settings = {"init_from": str(tmp_path / "base"), "lora_rank": 2, "ema_decay": 0.9, "parallel": kind}
    alone = replace(plain, out_dir=str(tmp_path / "alone"), **settings)
    both = replace(alone, out_dir=str(tmp_path / "both"))
    fit(alone)
    code, out, err = torchrun(tmp_path, both)
    assert code == 0, err
    assert "Warning" not in err, err
    assert out.count("Starting from") == out.count("LoRA: ") == out.count("Adapters for peft: ") == 1
    same_course(alone, both)
