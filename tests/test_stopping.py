"""No signal loses a run, whatever became of its terminal; and what ends by one ends without a traceback.

The children come from a fork server that has imported torch already.
"""

import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from waiting import wait_for, written_rows

import nanogpt.training.fit as fit_module
from nanogpt.checkpoint.format import Progress, load_checkpoint, peek
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.cli import main as cli
from nanogpt.config import TrainConfig
from nanogpt.distributed.world import ALONE
from nanogpt.terminal import streams
from nanogpt.training import stopping, trainer
from nanogpt.training.checkpointing import Checkpointer
from nanogpt.training.decisions import Due, all_reduce_decisions
from nanogpt.training.run import Run, StopReason
from nanogpt.training.stopping import EXIT_CODES, StopRequest

ROOT = Path(__file__).parent.parent
FOREVER = 1_000_000

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([__name__, "torch._dynamo"])


# --- what can become of standard output and error ---


def fine() -> None:
    """Two files."""


def closed() -> None:
    os.close(1)
    os.close(2)


def full() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    os.dup2(1, 2)


def unread_pipe() -> None:
    """A pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)


def closed_terminal() -> None:
    """The other side is gone: every write gives EIO."""
    leader, follower = pty.openpty()
    os.close(leader)
    os.dup2(follower, 1)
    os.dup2(follower, 2)


def sleeping_reader() -> None:
    """A full pipe with a reader who reads nothing: a write waits for ever."""
    _, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while os.write(writer, bytes(4096)):
            pass
    except BlockingIOError:
        os.set_blocking(writer, True)
    os.dup2(writer, 1)
    os.dup2(writer, 2)


def full_and_not_blocking() -> None:
    """As asyncio programs leave a terminal: a write gives EAGAIN."""
    sleeping_reader()
    os.set_blocking(1, False)


BROKEN = [fine, closed, full, unread_pipe, closed_terminal, sleeping_reader, full_and_not_blocking]


# --- children ---


def child(arguments: list[str], streams_are: Callable[[], None], before: Callable[[], None] | None) -> None:
    """A command in a process of its own, with its streams as Python finds them at its start."""
    for descriptor, name in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(Path.cwd() / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), descriptor)
    streams_are()
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = os.fdopen(descriptor, "w", closefd=False) if streams.is_open(descriptor) else None
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    torch.set_num_threads(1)
    if before:
        before()
    sys.argv = ["train.py", *arguments]
    cli.run_script("train")


def live(
    config: TrainConfig, streams_are: Callable[[], None] = fine, before: Callable[[], None] | None = None
) -> BaseProcess:
    process = context.Process(target=child, args=(flags(config), streams_are, before))
    process.start()
    return process


def flags(config: TrainConfig) -> list[str]:
    """The command line that stands for a configuration."""
    default = TrainConfig()
    given = {item.name: getattr(config, item.name) for item in fields(config)}
    return [f"--{name}={value}" for name, value in given.items() if value != getattr(default, name)]


def lives_until(happened: Callable[[], bool], process: BaseProcess) -> None:
    """Wait until it has happened. The process must live."""
    assert wait_for(happened, process), Path("err.txt").read_text()


def steps(config: TrainConfig) -> list[int]:
    """The updates that were logged."""
    path = Path(config.out_dir) / "metrics.jsonl"
    rows = written_rows(path)
    return [row["step"] for row in rows if "train_loss" in row]


def saved_step(config: TrainConfig) -> int:
    return load_checkpoint(Path(config.out_dir) / "last.pt").progress["step"]


def stop(process: BaseProcess, number: int) -> int | None:
    """Send a signal. Returns the exit code."""
    os.kill(process.pid or 0, number)
    process.join(120)
    return process.exitcode


@pytest.fixture
def endless(config: TrainConfig, tmp_path: Path, monkeypatch) -> TrainConfig:
    """A run that only a signal ends, and that saves nothing by itself; in tmp_path."""
    monkeypatch.chdir(tmp_path)
    return replace(config, max_iters=FOREVER, eval_interval=FOREVER, save_seconds=1e6)


# --- training ---


@pytest.mark.parametrize("number", EXIT_CODES, ids=lambda number: number.name)
def test_every_signal_saves_and_has_its_exit_code(endless, number) -> None:
    process = live(endless)
    lives_until(lambda: len(steps(endless)) > 3, process)
    assert stop(process, number) == 128 + number
    assert saved_step(endless) == steps(endless)[-1] > 3
    assert "Traceback" not in Path("err.txt").read_text()
    assert f"{number.name}: finishing this step" in Path("err.txt").read_text()
    assert f"Stopped at step {saved_step(endless)} and saved" in Path("out.txt").read_text()


@pytest.mark.parametrize("streams_are", BROKEN[1:], ids=lambda streams_are: streams_are.__name__)
def test_a_stop_loses_nothing_whatever_became_of_the_terminal(endless, streams_are) -> None:
    """Neither in a file that has the number of a closed stream, nor by what is said when it is too late."""
    waits = streams_are in (sleeping_reader, full_and_not_blocking)
    for number in (signal.SIGINT, signal.SIGHUP):
        config = replace(endless, out_dir=number.name)
        process = live(config, streams_are)
        if waits:  # the training stands still until its first line is read
            lives_until(Path(config.out_dir, ".lock").exists, process)
        else:
            lives_until(lambda config=config: len(steps(config)) > 3, process)
        assert stop(process, number) == 128 + number
        assert saved_step(config) == max(steps(config), default=0)
        assert waits or saved_step(config) > 3


@pytest.mark.parametrize("streams_are", BROKEN[1:5], ids=lambda streams_are: streams_are.__name__)
def test_a_training_goes_on_to_its_end_whatever_became_of_the_terminal(endless, streams_are) -> None:
    config = replace(endless, max_iters=20, eval_interval=10)
    process = live(config, streams_are)
    process.join(120)
    assert process.exitcode == 0
    assert saved_step(config) == 20


def ignore_hangups() -> None:
    """What nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def in_the_background() -> None:
    """What a shell without job control does for `command &`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)


@pytest.mark.parametrize(
    ("before", "ignored"),
    [(ignore_hangups, [signal.SIGHUP]), (in_the_background, [signal.SIGINT, signal.SIGQUIT])],
)
def test_what_was_ignored_at_the_start_stays_ignored(endless, before, ignored) -> None:
    process = live(endless, before=before)
    lives_until(lambda: len(steps(endless)) > 3, process)
    for number in ignored:
        os.kill(process.pid or 0, number)
    reached = len(steps(endless))
    lives_until(lambda: len(steps(endless)) > reached + 20, process)
    assert stop(process, signal.SIGTERM) == 143


@pytest.mark.parametrize("number", stopping.SAVE_SIGNALS, ids=lambda number: number.name)
def test_a_signal_that_says_that_time_is_short_saves_and_the_training_goes_on(endless, number) -> None:
    process = live(endless)
    last = Path(endless.out_dir) / "last.pt"
    for _ in range(2):
        lives_until(lambda: len(steps(endless)) > 3, process)
        before = saved_step(endless)
        os.kill(process.pid or 0, number)
        lives_until(lambda before=before: peek(last)[1] > before, process)
    reached = saved_step(endless)
    lives_until(lambda: steps(endless)[-1] > reached + 3, process)
    assert saved_step(endless) == reached  # once for each
    process.kill()


def slow_save() -> None:
    """The save at the end takes for ever, and a second signal need not come late."""
    stopping.REPEAT_WINDOW_SECONDS = 0.0

    def keep(run: object) -> None:
        Path("saving").touch()
        time.sleep(1000)

    trainer.save_final = keep


@pytest.mark.parametrize(
    ("first", "second"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT"), ("SIGHUP", "SIGQUIT")]
)
def test_a_second_signal_ends_at_once_and_quietly(endless, first: str, second: str) -> None:
    process = live(endless, before=slow_save)
    lives_until(lambda: len(steps(endless)) > 3, process)
    os.kill(process.pid or 0, signal.Signals[first])
    lives_until(Path("saving").exists, process)
    assert stop(process, signal.Signals[second]) == EXIT_CODES[signal.Signals[second]]
    lines = [line for line in Path("err.txt").read_text().split("\n") if line]
    assert len(lines) == 1
    assert lines[0].startswith(f"{first}: finishing this step and saving")
    assert saved_step(endless) == 0


@pytest.mark.parametrize("number", stopping.REPEATED_SIGNALS, ids=lambda number: number.name)
def test_what_programs_repeat_is_no_second_signal(number) -> None:
    with StopRequest() as stop:
        stop.handle(number, None)
        stop.received_at -= 100
        stop.handle(number, None)
    assert stop.signal == number


def test_a_signal_to_a_process_and_to_its_group_is_one_signal() -> None:
    """As `timeout`, Slurm and torchrun send it; whatever comes with it."""
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
    assert stop.signal == signal.SIGTERM


def test_in_a_program_of_ones_own_the_second_signal_is_what_it_was_before() -> None:
    """fit() in a notebook: KeyboardInterrupt, not the end of the process."""
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        stop.received_at -= 100
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_all_signals_are_given_back() -> None:
    numbers = [*EXIT_CODES, *stopping.SAVE_SIGNALS]
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest():
        assert before != [signal.getsignal(number) for number in numbers]
    assert before == [signal.getsignal(number) for number in numbers]


def interrupted_set_up() -> None:
    """A signal in the middle of set-up."""
    whole = fit_module.set_up

    def set_up(*arguments):
        signal.raise_signal(signal.SIGINT)
        return whole(*arguments)

    fit_module.set_up = set_up


def interrupted_first_save() -> None:
    whole = Checkpointer.save

    def save(*arguments):
        signal.raise_signal(signal.SIGINT)
        whole(*arguments)

    Checkpointer.save = save


def interrupted_evaluation() -> None:
    whole = trainer.evaluate

    def evaluate(*arguments, **settings):
        signal.raise_signal(signal.SIGINT)
        return whole(*arguments, **settings)

    trainer.evaluate = evaluate


def interrupted_picture() -> None:
    whole = fit_module.print_summary

    def conclude(*arguments):
        signal.raise_signal(signal.SIGINT)
        whole(*arguments)

    fit_module.print_summary = conclude


@pytest.mark.parametrize(
    ("before", "code", "step"),
    [
        (interrupted_set_up, 130, 0),
        (interrupted_first_save, 130, 0),
        (interrupted_evaluation, 130, 10),
        (interrupted_picture, 0, 20),
    ],
)
def test_a_signal_at_any_stage_leaves_a_run_that_goes_on(endless, before, code: int, step: int) -> None:
    config = replace(endless, max_iters=20, eval_interval=10)
    process = live(config, before=before)
    process.join(120)
    assert process.exitcode == code
    assert saved_step(config) == step
    assert "Traceback" not in Path("err.txt").read_text()
    assert fit_module.fit(replace(config, resume=True)).step == 20


@pytest.mark.parametrize("here", [False, True])
def test_what_a_signal_asks_of_one_process_all_do(here: bool) -> None:
    """The wish to save is a vote as the reason to stop is: the highest of any process counts, for all."""
    votes: list[tuple[int, ...]] = []

    def agree(*own: int) -> list[int]:
        votes.append(own)
        others = [0, int(not here), 0]
        return [max(pair) for pair in zip(own, others, strict=True)]

    run = SimpleNamespace(
        world=SimpleNamespace(max_over_ranks=agree), stop=StopRequest(), stopped_by_callback=False,
        checkpointer=Checkpointer(RunFolder(Path("out")), ALONE), config=TrainConfig(save_seconds=1e6),
        progress=Progress(), deadline=None,
    )  # fmt: skip
    with run.stop:
        if here:
            signal.raise_signal(signal.SIGUSR1)
        assert all_reduce_decisions(cast(Run, run)) == Due(reason=None, evaluation=False, save=True)
    assert votes == [(0, here, False)]


def test_stop_reasons_are_the_exit_codes_of_the_signals() -> None:
    for number, code in EXIT_CODES.items():
        reason = StopReason[number.name]
        assert reason.is_signal
        assert (reason.exit_code, reason.label) == (code, number.name)
    assert (StopReason.FINISHED.exit_code, StopReason.FINISHED.label) == (0, "finished")


# --- real processes ---


def test_nothing_is_written_into_a_file_that_has_the_number_of_a_closed_stream(endless) -> None:
    """A whole program with all three closed: the numbers are taken before any file is opened."""
    command = [sys.executable, str(ROOT / "train.py"), *flags(endless)]
    process = subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], env=environment())
    assert wait_for(lambda: len(steps(endless)) > 3, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    assert saved_step(endless) == steps(endless)[-1]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("moment", ["import", "sample"])
def test_a_command_is_interrupted_without_a_traceback(tmp_path: Path, number, moment: str) -> None:
    """While torch is imported, and later; the second time it ends at once."""
    late = "" if moment == "import" else "def main(config): wait()\n"
    (tmp_path / "slow.py").write_text(
        f"import time\ndef wait():\n    print('here', flush=True)\n    time.sleep(99)\n{late or 'wait()'}\n"
    )
    code = (
        "from nanogpt.cli import main as cli; from dataclasses import replace\n"
        "cli.COMMANDS['sample'] = replace(cli.COMMANDS['sample'], module='slow')\n"
        "cli.run_script('sample')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (128 + number, "", "")


def test_ctrl_c_ends_a_command_at_once_while_a_library_loads_that_swallows_exceptions():
    code = """if True:
        import os, signal, sys
        from nanogpt.training import stopping

        def interrupt():
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:
                print("swallowed", flush=True)

        signal.signal(signal.SIGINT, signal.default_int_handler)
        stopping.exit_quietly_on_signals()
        if sys.argv[1] == "after":
            with stopping.no_unwinding():
                pass
            interrupt()
        else:
            with stopping.no_unwinding():
                interrupt()
    """

    def run(when: str) -> tuple[int, str]:
        result = subprocess.run(
            [sys.executable, "-c", code, when], capture_output=True, text=True, check=False
        )
        return result.returncode, result.stdout

    assert run("during") == (EXIT_CODES[signal.SIGINT], "")
    assert run("after") == (0, "swallowed\n")
