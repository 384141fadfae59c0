"""Output for a person: lines, warnings, progress bars, figures.

On a terminal, colors and bars through rich (which respects NO_COLOR); in a notebook, bars of one line
(notebook.py); elsewhere, plain lines (plain_progress.py). Nothing is printed within `with silence():`.
"""

import os
import re
import sys
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

from nanogpt.terminal.streams import is_main_process, write_signal_safe
from nanogpt.units import duration, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import Progress, Task

MAX_WORD, MAX_LINE = 256, 1000
"""Longest word and line of a message, in characters. No file name is longer than MAX_WORD."""

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal obeys instead of showing (except tab and line feed), or cannot show."""

BAR_AFTER_SECONDS = 2.0
"""Seconds after which a late_progress_bar appears, or the first line of progress without a terminal."""

SILENT: ContextVar[bool] = ContextVar("silent", default=False)
"""Whether this thread is within `silence`."""

PROGRESS_BARS: "weakref.WeakSet[Progress]" = weakref.WeakSet()
"""All progress bars of this process."""


class StandardOutput:
    """Standard output for rich: the sys.stdout of the moment, without write errors."""

    def write(self, text: str) -> int:
        """Write the text."""
        with ignore_write_errors(self.stream):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with ignore_write_errors(self.stream):
            self.stream.flush()

    @property
    def stream(self) -> TextIO:
        """sys.stdout, without the proxy that rich puts over it while a bar is shown."""
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    def __getattr__(self, name: str) -> Any:
        """Everything else: isatty, fileno, encoding, ..."""
        return getattr(self.stream, name)


@lru_cache(maxsize=1)
def terminal() -> "Console":
    """The rich console on standard output."""
    from rich.console import Console  # --help needs none

    return Console(highlight=False, soft_wrap=True, file=cast(IO[str], StandardOutput()))


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, as in Jupyter, VS Code or Colab."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_ipython is not None and getattr(get_ipython(), "kernel", None) is not None


@contextmanager
def silence(on: bool = True) -> Generator[None]:
    """Print nothing in the block if `on`: no lines, no warnings, no bars. Errors are raised as always.

    What other threads print is printed.
    """
    token = SILENT.set(on or SILENT.get())
    try:
        yield
    finally:
        SILENT.reset(token)


def is_silent() -> bool:
    """Whether nothing is to be printed: within `silence`, or on a process that is not the first."""
    return SILENT.get() or not is_main_process()


def say(line: str = "", style: str | None = None) -> None:
    """Print one or several lines on standard output, above a progress bar if one is shown."""
    if is_silent() or sys.stdout is None:
        return
    line = escape_control_characters(line)
    with ignore_write_errors(sys.stdout):
        if terminal().is_terminal:
            terminal().print(line, style=style, markup=False, emoji=False)
        else:
            print(line, flush=True)


def warn(line: str) -> None:
    """Print a line on standard error, above a progress bar if one is shown."""
    if is_silent() or sys.stderr is None:
        return
    line = one_line(line)
    with ignore_write_errors(sys.stderr):
        if terminal().is_terminal and sys.stderr.isatty():
            terminal().print(line, style="yellow", markup=False, emoji=False)
        else:
            print(line, file=sys.stderr, flush=True)


def warn_in_signal_handler(line: str) -> None:
    """Print a line on standard error from a signal handler."""
    if not is_silent():
        write_signal_safe(line)


@contextmanager
def ignore_write_errors(stream: TextIO) -> Generator[None]:
    """Ignore write errors, such as of a full disk or a closed pipe: they must not end a training."""
    try:
        yield
    except BrokenPipeError:  # the reader has left, as `| head` does: print nothing from here on
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):  # ValueError: the stream is closed
        pass


def escape_control_characters(text: str) -> str:
    """Replace control characters with their escape sequences; line breaks stay."""
    return CONTROL_CHARACTERS.sub(
        lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n")
    )


def one_line(message: str) -> str:
    """A message as one printable line: control characters and line breaks escaped, long words shortened."""
    line = escape_control_characters(message).replace("\n", "\\n")
    return shorten(re.sub(rf"\S{{{MAX_WORD + 1},}}", lambda word: shorten(word[0], MAX_WORD), line), MAX_LINE)


def shorten(text: str, longest: int) -> str:
    """Cut the middle out of a long text: a message begins with the problem and ends with the fix."""
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]}...{text[-(longest // 4) :]}"


def command(name: str) -> list[str]:
    """The command line of a command in the form of this program's own: a script, or `nanogpt NAME`."""
    called = sys.argv[0]
    if called.endswith("__main__.py"):
        return ["python", "-m", "nanogpt", name]
    return ["python", f"{name}.py"] if called.endswith(".py") else ["nanogpt", name]


def progress_bar(
    unit: str, *, size_in_bytes: bool = False, on_stderr: bool = False, lines: bool = True
) -> "Progress":
    """A progress bar with elapsed and remaining time, on a terminal or in a notebook; elsewhere lines.

    unit: shown in front of the bar. A task's `detail` field is shown behind it.
    on_stderr: show it on standard error, for a command whose standard output is its result.
    lines: whether there are lines where there can be no bar; they go to standard error.
    """
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True, highlight=False) if on_stderr else terminal()
    is_cell, has_bar = in_notebook(), console.is_terminal and not console.is_dumb_terminal
    if lines and not (is_silent() or is_cell or has_bar):
        from nanogpt.terminal.plain_progress import PlainProgress

        return PlainProgress(
            lambda task: warn(progress_line(unit, task, size_in_bytes=size_in_bytes)), BAR_AFTER_SECONDS
        )
    amount: progress.ProgressColumn = (
        progress.DownloadColumn()
        if size_in_bytes
        else progress.TextColumn("{task.completed:,}/{task.total:,}")
    )
    bar = progress_class(in_cell=is_cell)(
        progress.TextColumn(unit),
        progress.BarColumn(bar_width=24),
        amount,
        progress.TextColumn("{task.fields[detail]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        console=console,
        refresh_per_second=5,
        redirect_stdout=not on_stderr,
        disable=is_silent() or not (is_cell or has_bar),
    )
    PROGRESS_BARS.add(bar)
    return bar


def progress_line(unit: str, task: "Task", *, size_in_bytes: bool) -> str:
    """How far a task is, and how long the rest takes: Encoding: 71.3 MB of 200.8 MB, left 12 s."""
    amount = size if size_in_bytes else "{:,}".format
    parts = [f"{unit}: {amount(round(task.completed))}"]
    if task.total is not None:
        parts[0] += f" of {amount(round(task.total))}"
    if detail := task.fields["detail"]:
        parts.append(detail)
    if task.time_remaining is not None:
        parts.append(f"left {duration(task.time_remaining)}")
    return ", ".join(parts)


def progress_class(*, in_cell: bool) -> "type[Progress]":
    """The class of progress bars for a terminal, or for the cell of a notebook."""
    if in_cell:
        from nanogpt.terminal.notebook import CellProgress

        return CellProgress
    from rich.progress import Progress

    return Progress


@contextmanager
def late_progress_bar(
    unit: str, total: int, *, size_in_bytes: bool = False, enabled: bool = True
) -> Generator[Callable[[int], None]]:
    """A progress bar that appears after BAR_AFTER_SECONDS, unless another one is shown.

    Yields what to call with the number of units that are done.
    """
    bar, began = progress_bar(unit, size_in_bytes=size_in_bytes, lines=enabled), time.monotonic()
    task, started = bar.add_task("", total=total, detail=""), False

    def advance(count: int) -> None:
        """Advance the bar, and show it when it is time."""
        nonlocal started
        bar.advance(task, count)
        if enabled and not started and time.monotonic() - began > BAR_AFTER_SECONDS:
            started = not any(other.live.is_started for other in list(PROGRESS_BARS))
            if started:
                bar.start()

    try:
        yield advance
    finally:
        if started:
            bar.stop()


def show_in_notebook(picture: Path) -> None:
    """Show a picture in the output of the cell, if this is a notebook."""
    if in_notebook() and not is_silent():
        from nanogpt.terminal.notebook import show_picture

        show_picture(picture)


def stop_progress_bars() -> None:
    """Stop the progress bars that an error has left, so that the cursor is shown again."""
    for bar in list(PROGRESS_BARS):
        if bar.live.is_started:
            bar.stop()


def new_figure(width: float, height: float) -> "Figure":
    """An empty matplotlib figure of this size in inches.

    Silences matplotlib's warnings, such as that of a temporary cache where the home folder is read-only.
    """
    import logging

    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    return Figure(figsize=(width, height), layout="constrained")
