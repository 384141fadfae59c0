"""Streams that take everything: what cannot be printed is let go or, where it is the product, one line."""

import errno
import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.errors import UserError
from nanogpt.terminal import streams
from nanogpt.terminal.streams import ProtectedStream, protect_stream

ROOT = Path(__file__).parent.parent


class Disk(io.RawIOBase):
    """A file descriptor that is a regular file, and a write of ours. write: bytes -> how many it takes."""

    def __init__(self, write: Callable[[bytes], int | None], path: str = os.devnull) -> None:
        self.file = open(path, "rb")  # noqa: SIM115 - closed with this
        self.put = write

    def fileno(self) -> int:
        return self.file.fileno()

    def writable(self) -> bool:
        return True

    def write(self, data) -> int | None:
        return self.put(bytes(data))

    def close(self) -> None:
        self.file.close()
        super().close()


def failing(number: int) -> Callable[[bytes], int]:
    def write(_: bytes) -> int:
        raise OSError(number, os.strerror(number))

    return write


@given(st.lists(st.binary(max_size=9000), max_size=5), st.data())
def test_everything_arrives_in_order_however_it_is_cut(parts: list[bytes], data: st.DataObject) -> None:
    """By short writes, and by a terminal that does not block and is full now and then."""
    arrived = bytearray()
    chance = data.draw(st.randoms(use_true_random=False))

    def write(piece: bytes) -> int | None:
        taken = chance.choice([None, 1 + chance.randrange(len(piece))])
        arrived.extend(piece[:taken] if taken else b"")
        return taken

    with Disk(write) as disk, io.BufferedWriter(ProtectedStream(disk, "x")) as file:
        for part in parts:
            file.write(part)
    assert bytes(arrived) == b"".join(parts)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EPIPE, errno.EBADF])
def test_what_cannot_be_written_is_let_go(number: int) -> None:
    with Disk(failing(number)) as disk, io.BufferedWriter(ProtectedStream(disk, "x")) as file:
        file.write(b"lost" * 10_000)


def test_where_printing_is_the_product_the_first_error_is_one_line() -> None:
    with (
        Disk(failing(errno.ENOSPC)) as disk,
        io.BufferedWriter(secured := ProtectedStream(disk, "output")) as file,
    ):
        secured.raises_errors = True
        file.write(b"lost")
        with pytest.raises(UserError, match="cannot write to output: No space left on device"):
            file.flush()
        file.flush()  # said once


def test_where_printing_is_the_product_a_reader_who_leaves_ends_it_quietly() -> None:
    with Disk(failing(errno.EPIPE)) as disk, io.BufferedWriter(secured := ProtectedStream(disk, "x")) as file:
        secured.raises_errors = True
        file.write(b"lost")
        with pytest.raises(SystemExit) as stop:
            file.flush()
    assert stop.value.code == 0


def test_a_write_that_a_signal_breaks_off_is_not_done_twice() -> None:
    arrived: list[bytes] = []

    def write(piece: bytes) -> int:
        arrived.append(piece)
        if len(arrived) == 1:
            raise KeyboardInterrupt
        return len(piece)

    with Disk(write) as disk, io.BufferedWriter(ProtectedStream(disk, "x")) as file:
        file.write(b"once")
        with pytest.raises(KeyboardInterrupt):
            file.flush()
        file.write(b", and on")
    assert b"".join(arrived) == b"once, and on"


def test_a_text_stream_keeps_its_encoding_and_shows_what_it_can() -> None:
    arrived = bytearray()
    with Disk(lambda piece: arrived.extend(piece) or len(piece)) as disk:
        text = protect_stream(
            io.TextIOWrapper(io.BufferedWriter(disk), encoding="latin-1", line_buffering=True), "x"
        )
        print("Größe, 中", file=text)
        assert (bytes(arrived), text.encoding) == ("Größe, ?\n".encode("latin-1"), "latin-1")
        text.close()


@pytest.mark.parametrize(
    ("rank", "world", "expected"),
    [
        (None, None, True),
        ("1", None, True),  # nobody started several: the variable is a leftover
        ("1", "1", True),
        ("0", "2", True),
        ("1", "2", False),
        ("", "", True),
    ],
)
def test_one_of_several_processes_speaks(monkeypatch, rank, world, expected) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert streams.is_main_process() is expected


# --- whole commands ---


def run(redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command with its streams redirected by a shell."""
    command = [sys.executable, "-m", "nanogpt", *arguments]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *command],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize("command", ["--help", "train --help", "presets", "model --n_layer 1", "data info"])
def test_a_full_disk_behind_the_product_is_one_line(command: str, data_dir: Path) -> None:
    arguments = [*command.split(), *[str(data_dir)] * command.endswith("info")]
    done = run(">/dev/full", *arguments)
    assert (done.returncode, done.stderr) == (
        2,
        "error: cannot write to standard output: No space left on device\n",
    )


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
@pytest.mark.parametrize(("command", "code"), [("--help", 0), ("train --help", 0), ("train --wrong", 2)])
def test_closed_streams_are_no_error(redirection: str, command: str, code: int) -> None:
    done = run(redirection, *command.split())
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_closed_standard_input_is_an_empty_one(tmp_path: Path) -> None:
    done = run("<&-", "data", "--input_file", "-", "--data_dir", str(tmp_path / "data"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("place", [{"HOME": "/dev/null"}, {"MPLCONFIGDIR": "/dev/null/x"}])
def test_a_home_that_cannot_be_written_is_no_matter(data_dir: Path, place: dict[str, str]) -> None:
    """matplotlib would say so, in three lines."""
    command = [sys.executable, "-m", "nanogpt", "data", "info", str(data_dir)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **place}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert (data_dir / "info.png").stat().st_size > 1000


ON_A_TERMINAL = """
import sys, time
from nanogpt.terminal import console
from nanogpt.cli import main as cli
from nanogpt.errors import UserError
from nanogpt.training import stopping

def main(config):
    bar = console.progress_bar("Working")
    bar.start()
    bar.add_task("", total=3, detail="")
    bar.refresh()
    print("here", flush=True)
    {end}

sys.modules["there"] = sys.modules["__main__"]
cli.COMMANDS["data"] = cli.Command(cli.PrepareConfig, "there", "data.py", writes=True)
cli.run_script("data")
"""


@pytest.mark.parametrize(
    ("end", "number", "code"),
    [
        ("raise UserError('wrong')", None, 2),
        ("raise RuntimeError('a bug')", None, 1),
        ("time.sleep(99)", signal.SIGINT, 130),
        ("time.sleep(99)", signal.SIGTERM, 143),
        ("time.sleep(99)", signal.SIGHUP, 129),
        ("stopping.exit_immediately(2, None)", None, 130),
    ],
)
def test_the_cursor_comes_back_however_a_command_ends(end: str, number: int | None, code: int) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL.format(end=end)],
        stdin=follower, stdout=follower, stderr=follower,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
    )  # fmt: skip
    os.close(follower)
    screen = b""
    sent = number is None
    while True:
        try:
            screen += os.read(leader, 1024)
        except OSError:  # all is read, and the other side closed
            break
        if not sent and b"here" in screen:
            process.send_signal(number or 0)
            sent = True
    os.close(leader)
    assert process.wait(60) == code
    assert b"\x1b[?25l" in screen
    assert screen.rindex(b"\x1b[?25h") > screen.rindex(b"\x1b[?25l")
    assert (b"Traceback" in screen) == (code == 1)
