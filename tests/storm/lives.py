"""Lives of commands, and what befalls them: kills, signals, broken terminals, full disks.

Use:    life = Life(["train", *TINY], folder, err="broken"); life.send(signal.SIGTERM); code = life.end()
A life is a real command in a process of its own, from a fork server that has imported PyTorch already: it
takes some tenths of a second, so that a storm can have hundreds.
"""

import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

import torch
from waiting import HANGS, wait_for

STREAMS = ("log", "null", "full", "closed", "broken", "hung up")
"""What can become of a standard stream; broken: a pipe without a reader; hung up: a closed terminal."""

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["nanogpt.training.trainer", "nanogpt.cli.sample", "nanogpt.data.prepare", "torch._dynamo", __name__]
)


class Life:
    """A command on its way, in `folder`. most: bytes that a file may have, as on a disk that is then full."""

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        *,
        out: str = "log",
        err: str = "log",
        most: int | None = None,
    ) -> None:
        self.log = folder / "storm.log"
        self.log.write_text("")
        self.heard, speaks = context.Pipe(duplex=False)  # a full disk does not silence a pipe
        self.process = context.Process(target=live, args=(list(words), str(folder), (out, err), most, speaks))
        self.process.start()
        speaks.close()

    @property
    def said(self) -> str:
        """What it wrote where anybody could read it."""
        raw = b""
        while self.heard.poll():
            piece = os.read(self.heard.fileno(), 1 << 16)
            if not piece:
                break
            raw += piece
        if raw:
            with open(self.log, "ab") as file:
                file.write(raw)
        return self.log.read_text("utf-8", "replace")

    def send(self, number: int) -> None:
        """Send a signal, if there still is somebody."""
        if self.process.is_alive():
            os.kill(self.process.pid or 0, number)

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Until it has happened, or the life is over."""
        wait_for(happened, self.process)

    def end(self) -> int:
        """The exit code: negative if a signal ended it."""
        self.process.join(HANGS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise AssertionError(f"it hangs: {self.said}")
        assert self.process.exitcode is not None
        return self.process.exitcode


def live(
    words: list[str], folder: str, streams: tuple[str, str], most: int | None, speaks: Connection
) -> None:
    """Be the command, as if the interpreter had just started."""
    os.chdir(folder)
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, kind in zip((1, 2), streams, strict=True):
        become(number, kind)
    if most is not None and streams[1] == "log":
        os.dup2(speaks.fileno(), 2)
    speaks.close()
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__ = stream(1), stream(2)
    if most is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    os._exit(run(words))


def run(words: list[str]) -> int:
    """The command's exit code, as the interpreter would give it."""
    from nanogpt.cli import main as cli

    sys.argv = ["nanogpt", *words]
    code: object = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        traceback.print_exc(file=open("storm.log", "a", encoding="utf-8"))  # noqa: SIM115
        code = 1
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        code = code or 120
    return code if isinstance(code, int) else int(bool(code))


def become(number: int, kind: str) -> None:
    """Make of a standard stream what `kind` says."""
    if kind == "closed":
        os.close(number)
        return
    if kind == "broken":
        left, right = os.pipe()
        os.close(left)
    elif kind == "hung up":
        left, right = os.openpty()
        os.close(left)
    else:
        path = {"null": os.devnull, "full": "/dev/full"}.get(kind, "storm.log")
        right = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(right, number)
    os.close(right)


def stream(number: int) -> TextIO | None:
    """sys.stdout or sys.stderr of a descriptor, None if it is closed."""
    try:
        os.fstat(number)
    except OSError:
        return None
    return open(number, "w", encoding="utf-8", closefd=False, buffering=1 if number == 2 else -1)
