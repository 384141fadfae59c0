"""Tiny Shakespeare comes from where it should, whole, or not at all.

No test leaves the machine: the web is a server on 127.0.0.1, pip is a stand-in.
"""

import hashlib
import http.server
import random
import socket
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

from nanogpt.errors import UserError
from nanogpt.text import tiny_shakespeare as shakespeare
from nanogpt.text.tiny_shakespeare import download, tiny_shakespeare, unpack_wheel

POEM = b"Shall I compare thee to a summer's day?\n"


@pytest.fixture
def sources(monkeypatch):
    """Stand-ins for the web and for pip. Returns the list of those that were asked."""
    asked = []

    def web(url):
        asked.append(url)
        return POEM

    def pip():
        asked.append("wheel")
        return POEM

    monkeypatch.setattr(shakespeare, "download", web)
    monkeypatch.setattr(shakespeare, "unpack_wheel", pip)
    monkeypatch.setattr(shakespeare, "SHAKESPEARE_SHA256", hashlib.sha256(POEM).hexdigest())
    return asked


def unreachable(_url):
    try:
        raise ConnectionRefusedError("Connection refused")
    except ConnectionRefusedError as error:
        raise OSError("HTTPSConnectionPool(host='...'): retries\nexceeded with url") from error


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_copy_that_is_there_is_used_without_asking_anyone(sources, tmp_path):
    (tmp_path / "input.txt").write_bytes(POEM)
    assert tiny_shakespeare(tmp_path) == (tmp_path / "input.txt", f"from {tmp_path / 'input.txt'}")
    assert sources == []


@pytest.mark.parametrize("kind", ["another text", "folder"])
def test_something_else_that_is_there_is_refused_and_untouched(sources, tmp_path, kind):
    path = tmp_path / "input.txt"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"my own novel")
    with pytest.raises(UserError) as raised:
        tiny_shakespeare(tmp_path)
    message = str(raised.value)
    assert "is not Tiny Shakespeare" in message
    assert f"--input_file {path}" in message
    assert "\n" not in message
    assert sources == []
    assert path.is_dir() if kind == "folder" else path.read_bytes() == b"my own novel"


def test_the_web_comes_first_and_what_it_gave_is_kept(sources, tmp_path):
    folder = tmp_path / "new" / "data"
    path, note = tiny_shakespeare(folder)
    assert path == folder / "input.txt"
    assert path.read_bytes() == POEM
    assert "downloaded" in note
    assert contents(folder) == ["input.txt"]
    assert sources == [shakespeare.SHAKESPEARE_URL]
    assert tiny_shakespeare(folder)[0] == path
    assert sources == [shakespeare.SHAKESPEARE_URL]  # nobody is asked twice


def test_without_the_web_the_wheel_with_one_line_said(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shakespeare, "download", unreachable)
    path, note = tiny_shakespeare(tmp_path)
    assert path.read_bytes() == POEM
    assert shakespeare.SHAKESPEARE_WHEEL in note
    assert sources == ["wheel"]
    (line,) = capsys.readouterr().out.splitlines()
    assert "cannot be reached (Connection refused)" in line
    assert shakespeare.SHAKESPEARE_WHEEL in line


@pytest.mark.parametrize("broken", ["download", "unpack_wheel"])
@pytest.mark.parametrize("body", [POEM[:-1], b"", b"<html>Please log in</html>"])
def test_damaged_in_transit_is_refused_and_nothing_is_written(sources, tmp_path, monkeypatch, broken, body):
    monkeypatch.setattr(shakespeare, "download", unreachable)
    monkeypatch.setattr(shakespeare, broken, lambda *_: body)
    with pytest.raises(UserError, match="damaged") as raised:
        tiny_shakespeare(tmp_path)
    assert "\n" not in str(raised.value)
    assert contents(tmp_path) == []
    assert sources == []


def test_no_source_at_all(sources, tmp_path, monkeypatch):
    def none():
        raise UserError("Tiny Shakespeare cannot be fetched")

    monkeypatch.setattr(shakespeare, "download", unreachable)
    monkeypatch.setattr(shakespeare, "unpack_wheel", none)
    with pytest.raises(UserError, match="cannot be fetched"):
        tiny_shakespeare(tmp_path)
    assert contents(tmp_path) == []
    assert sources == []


def test_a_folder_that_cannot_be_made(sources, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"a file")
    with pytest.raises(UserError):
        tiny_shakespeare(file / "data")
    assert sources in ([], [shakespeare.SHAKESPEARE_URL])


# The web, as a server on this machine

BODY = random.Random(6).randbytes(200_000)


class Handler(http.server.BaseHTTPRequestHandler):
    """/body: BODY; /chunks: BODY without a length; /torn: less than was promised; else 404."""

    def do_GET(self):
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/chunks":
            self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[: 70_000 if self.path == "/torn" else None])

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


@pytest.fixture
def direct(monkeypatch):
    """No proxy between the test and its own machine."""
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("path", ["/body", "/chunks"])
def test_download_brings_every_byte(server, path, capsys):
    assert download(server + path) == BODY
    assert capsys.readouterr().out.strip() == ""  # the bar is for terminals


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("path", ["/missing", "/torn"])
def test_a_failed_download_is_an_oserror(server, path):
    with pytest.raises(OSError, match=r"404|IncompleteRead"):
        download(server + path)


@pytest.mark.usefixtures("direct")
def test_nobody_listening_is_an_oserror_with_a_short_reason():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="refused") as raised:
            download(f"http://127.0.0.1:{unused.getsockname()[1]}/")
    assert "refused" in shakespeare.reason(raised.value)
    assert len(shakespeare.reason(raised.value)) < 60


# The wheel, by a stand-in for pip


def pip(monkeypatch, act):
    """Let `act(folder)` do pip's work; returns the commands that were run."""
    commands = []

    def run(command, **settings):
        assert settings["timeout"] > 0
        commands.append(command)
        return act(Path(command[command.index("--dest") + 1])) or subprocess.CompletedProcess(
            command, 0, "", ""
        )

    monkeypatch.setattr(shakespeare.subprocess, "run", run)
    return commands


def test_the_wheel_is_put_together_in_order(monkeypatch):
    def act(folder):
        with zipfile.ZipFile(folder / "dm_sonnet-1.36-py3-none-any.whl", "w") as wheel:
            for part in ("test", "valid", "train"):
                wheel.writestr(f"sonnet/examples/data/ts.{part}.txt", f"<{part}>")

    commands = pip(monkeypatch, act)
    assert unpack_wheel() == b"<train><valid><test>"
    assert len(commands) == 1
    assert commands[0][-1] == shakespeare.SHAKESPEARE_WHEEL
    assert "install" not in commands[0]


def fails(_folder):
    return subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution\n")


def fails_silently(_folder):
    return subprocess.CompletedProcess([], 1, "", "")


def hangs(_folder):
    raise subprocess.TimeoutExpired(["pip"], 120)


def is_missing(_folder):
    raise FileNotFoundError(2, "No such file or directory")


@pytest.mark.parametrize("act", [fails, fails_silently, hangs, is_missing])
def test_pip_that_fails_ends_in_one_line(monkeypatch, act):
    pip(monkeypatch, act)
    with pytest.raises(UserError, match="--input_file") as raised:
        unpack_wheel()
    assert "\n" not in str(raised.value)
    if act is fails:
        assert "ERROR: No matching distribution" in str(raised.value)


@pytest.mark.parametrize("kind", ["no archive", "a part is missing"])
def test_a_damaged_wheel_is_one_line(monkeypatch, kind):
    def act(folder):
        path = folder / "dm_sonnet-1.36-py3-none-any.whl"
        path.write_bytes(b"not a zip")
        if kind != "no archive":
            with zipfile.ZipFile(path, "w") as wheel:
                wheel.writestr("sonnet/examples/data/ts.train.txt", "<train>")

    pip(monkeypatch, act)
    with pytest.raises(UserError, match=r"^Tiny Shakespeare arrived damaged in dm-sonnet==1\.36: try again$"):
        unpack_wheel()
