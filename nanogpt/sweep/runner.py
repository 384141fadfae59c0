"""Runs the trainings of a sweep, several at a time, each in a process of its own with its output in a log.

Example: with StopRequest() as stop: failed = run_all(trials, jobs=2, stop=stop)
A run that is done is left alone, and one that was stopped is resumed, so a sweep goes on where it was. A
signal is passed on to the trainings, which save and end.
"""

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from nanogpt.checkpoint.run_dir import RunFolder, has_settings_of
from nanogpt.config import TrainConfig
from nanogpt.errors import UserError, require
from nanogpt.export.card import words_of
from nanogpt.machine.cores import usable_cores
from nanogpt.sweep.grid import Trial
from nanogpt.sweep.table import read_run
from nanogpt.terminal.console import say, warn
from nanogpt.training.stopping import StopRequest

POLL_SECONDS = 0.1

ERROR = "error: "
"""How the last line of a training that failed begins."""


def unfinished(trials: Sequence[Trial]) -> list[Trial]:
    """The trainings that are still to be done; those that were stopped are to be resumed.

    Raises: UserError if a folder holds a run with other settings.
    """
    found: list[Trial] = []
    for trial in trials:
        folder = RunFolder(Path(trial.config.out_dir))
        saved = folder.saved_config()
        if saved is None:
            found.append(trial)
            continue
        require(
            has_settings_of(saved, trial.config),
            f"{folder.path} holds a run with other settings: see nanogpt info {folder.path}, or give another "
            "--out_dir",
        )
        run = None
        with contextlib.suppress(UserError):  # a file is damaged: the training goes on from the other one
            run = read_run(folder.path)
        if run is None or not run.is_done:
            found.append(Trial(trial.name, replace(trial.config, resume=True)))
    return found


def run_all(trials: Sequence[Trial], jobs: int, stop: StopRequest) -> list[Trial]:
    """Run trainings, `jobs` at a time, until all have ended or a signal came. Returns those that failed."""
    waiting, running, failed = list(trials), dict[Trial, subprocess.Popen[bytes]](), list[Trial]()
    is_told = False
    while running or (waiting and stop.signal is None):
        while waiting and len(running) < jobs and stop.signal is None:
            trial = waiting.pop(0)
            running[trial] = start(trial, jobs)
        if stop.signal is not None and not is_told:
            is_told = True
            for process in running.values():
                with contextlib.suppress(OSError, ValueError):  # it has ended; Windows tells it by itself
                    process.send_signal(stop.signal)
        for trial in [trial for trial, process in running.items() if process.poll() is not None]:
            code = running.pop(trial).returncode
            if code != 0 and stop.signal is None:
                failed.append(trial)
                warn(f"{trial.name}: {last_words(trial)}")
            elif code == 0:
                say(f"{trial.name}: {outcome(trial)}  {len(waiting) + len(running)} left")
        time.sleep(POLL_SECONDS)
    return failed


def start(trial: Trial, jobs: int) -> "subprocess.Popen[bytes]":
    """Start a training with its share of the CPU cores. Its output is added to its log."""
    path = log(trial)
    path.parent.mkdir(parents=True, exist_ok=True)
    environment, words = {**os.environ, "OMP_NUM_THREADS": str(threads_of_each(jobs))}, command(trial.config)
    with open(path, "ab") as file:
        file.write(f"{shlex.join(words)}\n".encode())
        file.flush()
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def threads_of_each(jobs: int) -> int:
    """Threads of each of `jobs` trainings: its share of the CPU cores, or of OMP_NUM_THREADS."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, (int(given) if given.isdecimal() else usable_cores()) // jobs)


def command(config: TrainConfig) -> list[str]:
    """The command of a training: every setting that is not at its default."""
    default = TrainConfig()
    names = [field.name for field in fields(TrainConfig)]
    changed = [name for name in names if getattr(config, name) != getattr(default, name)]
    return [
        sys.executable,
        "-m",
        "nanogpt",
        "train",
        *(word for name in changed for word in words_of(config, name)),
    ]


def log(trial: Trial) -> Path:
    """The file with the output of a training, beside its folder."""
    return Path(f"{trial.config.out_dir}.log")


def outcome(trial: Trial) -> str:
    """The result of a training that has ended."""
    run = read_run(Path(trial.config.out_dir))
    return f"best validation loss {run.best_val_loss:.4f}" if run else "no checkpoint"


def last_words(trial: Trial) -> str:
    """The error with which a training ended; else where to look for it."""
    lines = log(trial).read_text("utf-8", errors="replace").splitlines()
    return lines[-1].removeprefix(ERROR) if lines and lines[-1].startswith(ERROR) else f"see {log(trial)}"
