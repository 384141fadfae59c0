"""What commands show a person: lines, warnings, progress bars, pictures, and numbers with their units.

On a terminal, colours and bars through rich (which respects NO_COLOR); elsewhere, plain lines.
"""

import logging
import os
import re
import sys
import weakref
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

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

from nanogpt.streams import is_main_process

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB, GIB = 2**20, 2**30
"""Bytes."""

MAX_WORD, MAX_LINE = 256, 1000
"""Characters; what is longer is cut in the middle, in a message. No file's name is longer than the first."""

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys instead of showing it (all but the tab and the line feed), or cannot show."""

PROGRESS_BARS: weakref.WeakSet[Progress] = weakref.WeakSet()
"""All progress bars there are."""


class StandardOutput:
    """Standard output as rich sees it: whatever it is at the moment, and without errors (`going_on`)."""

    def write(self, text: str) -> int:
        """Write the text."""
        with ignore_write_errors(self.stream):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what waits."""
        with ignore_write_errors(self.stream):
            self.stream.flush()

    @property
    def stream(self) -> TextIO:
        """Standard output, without what rich puts over it while a bar is shown."""
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    def __getattr__(self, name: str) -> Any:
        """All else: isatty, fileno, encoding, ..."""
        return getattr(self.stream, name)


@lru_cache(maxsize=1)
def terminal() -> Console:
    """The console on standard output."""
    return Console(highlight=False, soft_wrap=True, file=cast(IO[str], StandardOutput()))


def say(line: str = "", style: str | None = None) -> None:
    """Print a line, or several, on standard output, above a progress bar if one is shown."""
    if not is_main_process() or sys.stdout is None:
        return
    line = escape_control_characters(line)
    with ignore_write_errors(sys.stdout):
        if terminal().is_terminal:
            terminal().print(line, style=style, markup=False, emoji=False)
        else:
            print(line, flush=True)


def warn(line: str) -> None:
    """Print a line on standard error, above a progress bar if one is shown."""
    if not is_main_process() or sys.stderr is None:
        return
    line = one_line(line)
    with ignore_write_errors(sys.stderr):
        if terminal().is_terminal and sys.stderr.isatty():
            terminal().print(line, style="yellow", markup=False, emoji=False)
        else:
            print(line, file=sys.stderr, flush=True)


@contextmanager
def ignore_write_errors(stream: TextIO) -> Generator[None]:
    """Let neither a full disk behind redirected output nor a closed pipe end a training."""
    try:
        yield
    except BrokenPipeError:  # the reader has left, as `| head` does: talk to nobody from here on
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):  # a ValueError: it is closed
        pass


def escape_control_characters(text: str) -> str:
    """The text with what a terminal would obey written out, an escape as its number. Lines stay lines."""
    return CONTROL_CHARACTERS.sub(
        lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n")
    )


def one_line(message: str) -> str:
    """A message as a line that can be read: visible, without line breaks, and cut where it is very long."""
    line = escape_control_characters(message).replace("\n", "\\n")
    return shorten(re.sub(rf"\S{{{MAX_WORD + 1},}}", lambda word: shorten(word[0], MAX_WORD), line), MAX_LINE)


def shorten(text: str, longest: int) -> str:
    """The text without its middle, if it is too long: what is wrong comes first, and the fix last."""
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]}...{text[-(longest // 4) :]}"


def duration(seconds: float) -> str:
    """A length of time for a person: 48 s, 2 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def plural(count: int, noun: str) -> str:
    """A number with the noun that it counts: 1 file, 3,000 files."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def ceil_div(a: int, b: int) -> int:
    """A / b, rounded up, without the rounding of a float."""
    return -(-a // b)


def command(name: str) -> list[str]:
    """How to call a command the way this program was called: by its script, or as `nanogpt NAME`."""
    called = sys.argv[0]
    if called.endswith("__main__.py"):
        return ["python", "-m", "nanogpt", name]
    return ["python", f"{name}.py"] if called.endswith(".py") else ["nanogpt", name]


def progress_bar(unit: str, *, size_in_bytes: bool = False) -> Progress:
    """A progress bar with elapsed and remaining time; shows nothing when not on a terminal.

    unit: shown in front of the bar. A task's `detail` field is shown behind it.
    """
    amount: ProgressColumn = (
        DownloadColumn() if size_in_bytes else TextColumn("{task.completed:,}/{task.total:,}")
    )
    bar = Progress(
        TextColumn(unit),
        BarColumn(bar_width=24),
        amount,
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=terminal(),
        refresh_per_second=5,
        disable=not (terminal().is_terminal and is_main_process()),
    )
    PROGRESS_BARS.add(bar)
    return bar


def stop_progress_bars() -> None:
    """Take down what progress bars an error has left, so that the cursor is shown again."""
    for bar in list(PROGRESS_BARS):
        if bar.live.is_started:
            bar.stop()


def new_figure(width: float, height: float) -> "Figure":
    """An empty picture of this size, in inches (matplotlib).

    Where the home folder cannot be written, matplotlib keeps its cache in a temporary one, which need not
    be said: only its errors are.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    return Figure(figsize=(width, height), layout="constrained")
