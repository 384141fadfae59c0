"""Numbers with their units, as a person reads them; progress where no terminal shows a bar."""

import pytest

from nanogpt.terminal import console, plain_progress
from nanogpt.terminal.console import late_progress_bar, progress_bar
from nanogpt.units import ceil_div, duration, plural


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (48.2, "48 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (125, "2 min 5 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (360_000, "100 h 0 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 files"), (1, "1 file"), (2, "2 files"), (1234, "1,234 files")]
)
def test_plural(count, text):
    assert plural(count, "file") == text


@pytest.mark.parametrize(
    ("a", "b", "quotient"), [(0, 3, 0), (1, 3, 1), (3, 3, 1), (4, 3, 2), (10**20 + 1, 10, 10**19 + 1)]
)
def test_ceil_div(a, b, quotient):
    assert ceil_div(a, b) == quotient


class Clock:
    """A clock that goes when it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that progress is measured with, in a process whose output is no terminal."""
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    monkeypatch.setattr(type(console.terminal()), "is_terminal", False)
    return clock


def test_a_log_has_a_line_of_progress_now_and_then(clock: Clock, capsys) -> None:
    with progress_bar("Encoding", size_in_bytes=True) as bar:
        task = bar.add_task("", total=1000 * 10**6, detail="file 1/2")
        shown: list[tuple[int, str]] = []
        for second in range(1, 1000):
            clock.now += 1
            bar.advance(task, 10**6)
            shown += [(second, line) for line in capsys.readouterr().err.splitlines()]
        bar.update(task, completed=1000 * 10**6)
        clock.now += 1000
        bar.advance(task, 0)
    seconds = [second for second, _ in shown]
    assert seconds[:7] == [2, 6, 14, 30, 62, 122, 182]
    assert shown[1][1] == "Encoding: 6.0 MB of 1.0 GB, file 1/2, left 16 min 34 s"
    assert tuple(capsys.readouterr()) == ("", "")  # what is done needs no line


def test_progress_of_unknown_length(clock: Clock, capsys) -> None:
    with progress_bar("Downloading", size_in_bytes=True) as bar:
        task = bar.add_task("", total=None, detail="")
        clock.now += 3
        bar.update(task, completed=5000)
    assert tuple(capsys.readouterr()) == ("", "Downloading: 5.0 kB\n")


@pytest.mark.parametrize("how", ["silence", "enabled", "lines"])
def test_no_line_where_none_is_wanted(how: str, clock: Clock, capsys) -> None:
    with (
        console.silence(how == "silence"),
        late_progress_bar("Tokens", 9, enabled=how != "enabled") as advance,
    ):
        bar = progress_bar("Training", lines=how != "lines")
        task = bar.add_task("", total=9, detail="")
        clock.now += plain_progress.MAX_GAP_SECONDS
        if how == "enabled":
            advance(1)
        else:
            bar.advance(task)
    assert tuple(capsys.readouterr()) == ("", "")
