"""Waiting for what another process does.

Use:    assert wait_for(path.exists, process), "it ended first"
No test fails by the clock: a process that hangs is killed after HANGS seconds; what it has not done tells.
"""

import json
import subprocess
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

HANGS = 600.0
"""Seconds after which a process is taken to hang, however busy the machine is."""


def wait_for(happened: Callable[[], bool], process: "BaseProcess | subprocess.Popen[str]") -> bool:
    """Until it has happened or the process has ended. Returns whether it has happened."""
    started = time.monotonic()
    while not happened():
        ended = (
            process.poll() is not None if isinstance(process, subprocess.Popen) else not process.is_alive()
        )
        if ended:
            return happened()
        if time.monotonic() - started > HANGS:
            process.kill()
        time.sleep(0.002)
    return True


def wait_until(happened: Callable[[], object]) -> None:
    """Until it has happened, in this process."""
    deadline = time.monotonic() + HANGS
    while not (done := happened()) and time.monotonic() < deadline:
        time.sleep(0.002)
    assert done, "it has not happened"


def written_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file that another process is writing: its last line may not be complete yet."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
