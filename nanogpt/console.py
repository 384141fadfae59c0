"""What commands show a person: lines, warnings, progress bars.

On a terminal, colours and bars through rich (which respects NO_COLOR); elsewhere, plain lines.
"""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@lru_cache(maxsize=1)
def terminal() -> Console:
    """The console on standard output."""
    return Console(highlight=False, soft_wrap=True)


def speaks() -> bool:
    """Whether this process is the one that talks, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str = "", style: str | None = None) -> None:
    """Print a line on standard output, above a progress bar if one is shown."""
    if not speaks():
        return
    with going_on(sys.stdout):
        if terminal().is_terminal:
            terminal().print(line, style=style, markup=False, emoji=False)
        else:
            print(line, flush=True)


def warn(line: str) -> None:
    """Print a line on standard error, above a progress bar if one is shown."""
    if not speaks():
        return
    with going_on(sys.stderr):
        if terminal().is_terminal and sys.stderr.isatty():
            terminal().print(line, style="yellow", markup=False, emoji=False)
        else:
            print(line, file=sys.stderr, flush=True)


@contextmanager
def going_on(stream: TextIO) -> Generator[None]:
    """Let neither a full disk behind redirected output nor a closed pipe end a training."""
    try:
        yield
    except BrokenPipeError:  # the reader has left, as `| head` does: talk to nobody from here on
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError:
        pass


def command(name: str) -> list[str]:
    """How to call a command the way this program was called: by its script, or as `nanogpt NAME`."""
    return ["python", f"{name}.py"] if sys.argv[0].endswith(".py") else ["nanogpt", name]


def progress_bar(unit: str, *, size_in_bytes: bool = False) -> Progress:
    """A progress bar with elapsed and remaining time; shows nothing when not on a terminal.

    unit: shown in front of the bar. A task's `detail` field is shown behind it.
    """
    amount: ProgressColumn = (
        DownloadColumn() if size_in_bytes else TextColumn("{task.completed:,}/{task.total:,}")
    )
    return Progress(
        TextColumn(unit),
        BarColumn(bar_width=24),
        amount,
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=terminal(),
        refresh_per_second=5,
        disable=not (terminal().is_terminal and speaks()),
    )
