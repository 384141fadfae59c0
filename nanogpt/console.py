"""What commands show a person: lines, warnings, progress bars.

On a terminal, colours and bars through rich (which respects NO_COLOR); elsewhere, plain lines.
"""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache

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


def say(line: str = "", style: str | None = None) -> None:
    """Print a line on standard output, above a progress bar if one is shown."""
    with going_on():
        if terminal().is_terminal:
            terminal().print(line, style=style, markup=False, emoji=False)
        else:
            print(line, flush=True)


def warn(line: str) -> None:
    """Print a line on standard error, above a progress bar if one is shown."""
    with going_on():
        if terminal().is_terminal and sys.stderr.isatty():
            terminal().print(line, style="yellow", markup=False, emoji=False)
        else:
            print(line, file=sys.stderr, flush=True)


@contextmanager
def going_on() -> Generator[None]:
    """Let no full disk behind a redirected output end a training; a pipe that is closed does end it."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        pass


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
        disable=not terminal().is_terminal,
    )
