"""A download ends whole or not at all: whatever the server does, and whenever it is killed.

No test leaves the machine.
"""

import email.utils
import errno
import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from web import BODY, HASTY, Canned, Reply, Web, serving

from nanogpt.errors import UserError
from nanogpt.text.download import LostConnectionError, Patience, download, downloaded, safe_name
from nanogpt.text.http_origin import HttpOrigin, retry_after

OTHER = random.Random(7).randbytes(60_000)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server, and no proxy before it."""
    monkeypatch.setenv("NO_PROXY", "*")
    with serving() as server:
        yield server


def get(web: Web, folder: Path, name: str = "a.txt", patience: Patience = HASTY) -> bytes:
    """What a download brings."""
    url = f"{web.url}/{name}"
    return download(HttpOrigin(url, url, patience), folder, patience=patience).read_bytes()


def refusal(web: Web, folder: Path, name: str = "a.txt", patience: Patience = HASTY) -> str:
    """The message of a download that cannot be had. No text passes as one that is whole."""
    url = f"{web.url}/{name}"
    with pytest.raises(UserError) as raised:
        get(web, folder, name, patience)
    assert downloaded(HttpOrigin(url, url), folder) is None
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"--input_file {url} ")
    return message


# --- lost connections ---


def test_every_byte_comes_in_one_request_and_nobody_is_asked_twice(web: Web, tmp_path: Path):
    web.replies = [Reply(BODY)]
    assert get(web, tmp_path) == BODY
    assert get(web, tmp_path) == BODY
    assert web.ranges() == [None]


def test_after_a_lost_connection_the_rest_is_asked_for(web: Web, tmp_path: Path, capsys):
    web.replies = [Reply(BODY, sends=20_000), Reply(BODY, sends=10_000), Reply(BODY)]
    assert get(web, tmp_path) == BODY
    assert web.ranges() == [None, "bytes=20000-", "bytes=30000-"]
    assert web.requests[1][1]["If-Range"] == '"1"'
    assert "ended early after 20,000 of 50,000 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("chunked", [False, True])
def test_after_a_stall_the_rest_is_asked_for(web: Web, tmp_path: Path, chunked: bool, capsys):
    web.replies = [Reply(BODY, sends=20_000, stalls=True, chunked=chunked), Reply(BODY)]
    assert get(web, tmp_path, patience=replace(HASTY, stall=0.2, attempts=100)) == BODY
    assert "sent nothing for" in capsys.readouterr().err


def test_a_chunked_body_that_breaks_off_is_not_taken_for_its_end(web: Web, tmp_path: Path):
    web.replies = [Reply(BODY, sends=20_000, chunked=True), Reply(BODY, chunked=True)]
    assert get(web, tmp_path) == BODY
    assert web.ranges() == [None, "bytes=20000-"]


def test_a_server_that_ignores_ranges_starts_over(web: Web, tmp_path: Path):
    web.replies = [
        Reply(BODY, sends=20_000),
        Reply(BODY, ranges=False, sends=30_000),
        Reply(BODY, ranges=False),
    ]
    assert get(web, tmp_path) == BODY


def test_without_a_version_all_is_asked_for_again(web: Web, tmp_path: Path):
    web.replies = [Reply(BODY, etag=None, sends=20_000), Reply(OTHER, etag=None)]
    assert get(web, tmp_path) == OTHER
    assert web.ranges() == [None, None]


@pytest.mark.parametrize("conditions", [True, False], ids=["If-Range", "ignores If-Range"])
@pytest.mark.parametrize("etags", [('"1"', '"2"'), ('W/"1"', 'W/"2"')], ids=["strong", "weak"])
def test_a_file_that_changes_starts_over(web: Web, tmp_path: Path, etags: tuple[str, str], conditions: bool):
    old = Reply(BODY, etag=etags[0], sends=20_000)
    web.replies = [old, Reply(OTHER, etag=etags[1], conditions=conditions)]
    assert get(web, tmp_path) == OTHER


def test_the_date_is_a_version_too(web: Web, tmp_path: Path):
    date = {"Last-Modified": "Mon, 05 Oct 2026 10:00:00 GMT"}
    web.replies = [Reply(BODY, etag=None, headers=date, sends=20_000, conditions=False)]
    web.replies.append(replace(web.replies[0], sends=None))
    assert get(web, tmp_path) == BODY
    assert web.ranges() == [None, "bytes=20000-"]
    assert web.requests[1][1]["If-Range"] == date["Last-Modified"]


@pytest.mark.parametrize("seed", range(12))
def test_in_any_storm_the_text_is_that_of_one_version_or_none(web: Web, tmp_path: Path, seed: int):
    chance = random.Random(seed)
    versions = {'"1"': BODY, 'W/"2"': OTHER, None: OTHER[:40_000]}
    for _ in range(12):
        etag = chance.choice([*versions, '"1"', '"1"'])
        reply = Reply(
            versions[etag], etag=etag, ranges=chance.random() < 0.8, conditions=chance.random() < 0.8
        )
        reply.sends = chance.choice([None, 0, *(chance.randrange(40_000) for _ in range(4))])
        reply.chunked = chance.random() < 0.2
        reply.status = chance.choice([200, 200, 200, 503])
        web.replies.append(reply)
    for _ in range(4):  # four runs of a command
        with suppress(UserError):
            assert get(web, tmp_path) in versions.values()
        names = {path.name for path in tmp_path.iterdir()}
        assert names in ({"a.txt", "record.json"}, {"part", "record.json"}, {"record.json"}, set())


# --- lies ---


def test_a_body_that_is_always_shorter_than_said_is_an_error(web: Web, tmp_path: Path):
    web.replies = [Reply(BODY, length=60_000), Reply(BODY, length=10_000, total="60000")]
    assert "ended early after 50,000 of 60,000 bytes, 5 times in a row" in refusal(web, tmp_path)
    web.replies = [Reply(BODY, length=60_000), Reply(status=416)] * 5
    assert "ended early after 50,000 of 60,000 bytes, 5 times in a row" in refusal(web, tmp_path / "416")


def test_a_rest_that_is_longer_than_said_is_an_error(web: Web, tmp_path: Path):
    web.replies = [Reply(BODY[:30_000], sends=20_000), Reply(BODY, total="30000")]
    assert "more than the 30,000 bytes" in refusal(web, tmp_path)


@pytest.mark.parametrize("total", ["49999", "*"])
def test_another_length_of_the_same_version(web: Web, tmp_path: Path, total: str):
    """A star is no other length."""
    web.replies = [Reply(BODY, sends=20_000), Reply(BODY, total=total), Reply(BODY)]
    assert get(web, tmp_path) == BODY
    assert len(web.requests) == (2 if total == "*" else 3)


def test_without_any_length_a_line_says_so(web: Web, tmp_path: Path, capsys):
    web.replies = [Reply(BODY, length=-1)]
    assert get(web, tmp_path) == BODY
    assert "comes without a length" in capsys.readouterr().err


def test_an_empty_file_is_a_file(web: Web, tmp_path: Path):
    web.replies = [Reply(b"")]
    assert get(web, tmp_path) == b""


# --- what servers answer ---


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, "check the address"),
        (403, "login"),
        (401, "login"),
        (410, "Gone"),
        (204, "204"),
        (599, "unknown"),
    ],
)
def test_a_status_that_is_no_file_is_one_line(web: Web, tmp_path: Path, status: int, said: str):
    web.replies = [Reply(status=status)]
    message = refusal(web, tmp_path)
    assert f"HTTP {status}" in message
    assert said in message
    assert len(web.requests) == 1


def test_an_error_that_passes_is_waited_for_as_long_as_the_server_asks(web: Web, tmp_path: Path):
    date = email.utils.formatdate(time.time() + 200, usegmt=True)
    web.replies = [
        Reply(status=503),
        Reply(status=429, headers={"Retry-After": "7"}),
        Reply(status=429, headers={"Retry-After": date}),
        Reply(status=429, headers={"Retry-After": "whenever"}),
        Reply(BODY),
    ]
    waits = list[float]()
    assert get(web, tmp_path, patience=Patience(sleep=waits.append)) == BODY
    assert waits[:2] == [1, 7]
    assert 4 < waits[2] <= 200
    assert waits[3] == 8


def test_pauses_double_up_to_a_limit_and_end(web: Web, tmp_path: Path):
    web.replies = [Reply(status=500)]
    waits = list[float]()
    message = refusal(web, tmp_path, patience=Patience(pause=10, longest_pause=30, sleep=waits.append))
    assert "HTTP 500 (Internal Server Error), 6 times in a row: try again later" in message
    assert waits == [10, 20, 30, 30, 30]


def test_too_long_a_wait_is_an_error(web: Web, tmp_path: Path):
    web.replies = [Reply(status=429, headers={"Retry-After": "9" * 400})]
    assert "Too Many Requests), and asks to wait" in refusal(web, tmp_path)
    assert retry_after("3600") == 3600
    assert retry_after("Mon, 05 Oct 2020 10:00:00 GMT") == retry_after("Mon, 99 Oct") == 0


def test_redirects_are_followed_up_to_a_limit(web: Web, tmp_path: Path):
    web.replies = [Reply(status=302, headers={"Location": "/elsewhere"}), Reply(BODY)]
    assert get(web, tmp_path) == BODY
    assert [path for path, _ in web.requests] == ["/a.txt", "/elsewhere"]
    web.replies = [Reply(status=302, headers={"Location": "/a.txt"})]
    assert "from address to address" in refusal(web, tmp_path / "loop")
    web.replies = [Reply(status=302, headers={"Location": "file:///etc/passwd"})]
    assert "leads to none" in refusal(web, tmp_path / "file")


def test_a_step_from_https_to_http_is_refused(tmp_path: Path):
    step = namedtuple("Response", "status_code history url")  # noqa: PYI024
    origin = HttpOrigin("https://h/a.txt", "https://h/a.txt")
    with pytest.raises(UserError, match="from https to http"):
        origin.check(step(200, [step(302, [], "https://h/a.txt")], "http://h/a.txt"))  # type: ignore[arg-type]


def test_a_host_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with serving() as closed:
        pass
    assert "cannot be reached (" in refusal(closed, tmp_path)

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "check the name of the host" in refusal(Web("http://nowhere.invalid"), tmp_path)


@pytest.mark.parametrize("name", ["data.jsonl", "data.txt"])
def test_a_page_in_place_of_a_file_is_refused(web: Web, tmp_path: Path, name: str):
    page = {"Content-Type": "text/html; charset=utf-8"}
    web.replies = [Reply(b"\n<!DOCTYPE HTML><title>Log in</title>", headers=page)]
    assert "a web page, not of a" in refusal(web, tmp_path, name)
    web.replies = [Reply(b'{"text": "<html>"}\n', headers=page)]  # PHP says so of everything
    assert get(web, tmp_path, name) == b'{"text": "<html>"}\n'


@pytest.mark.parametrize(
    ("name", "file"), [("article", "article.html"), ("a.htm", "a.htm"), ("", "text_.html")]
)
def test_a_page_is_a_page_where_no_other_file_is_named(web: Web, tmp_path: Path, name: str, file: str):
    web.replies = [Reply(b"<html>", headers={"Content-Type": "text/html"})]
    assert get(web, tmp_path, name) == b"<html>"
    assert (tmp_path / file).exists()


@pytest.mark.parametrize(
    ("name", "encoding", "file"),
    [
        ("a.txt", "gzip", "a.txt.gz"),
        ("a.txt", "zstd", "a.txt.zst"),
        ("a.txt.gz", "x-gzip", "a.txt.gz"),
        ("a.tgz", "gzip", "a.tgz"),
        ("a.zst", "gzip", "a.zst.gz"),
    ],
)
def test_a_compressed_transfer_is_a_compressed_file(
    web: Web, tmp_path: Path, name: str, encoding: str, file: str
):
    web.replies = [Reply(BODY, headers={"Content-Encoding": encoding}, sends=20_000)]
    web.replies.append(replace(web.replies[0], sends=None))
    assert get(web, tmp_path, name) == BODY
    assert (tmp_path / file).read_bytes() == BODY


def test_an_unknown_compression_is_refused(web: Web, tmp_path: Path):
    web.replies = [Reply(BODY, headers={"Content-Encoding": "br"})]
    assert "the encoding br" in refusal(web, tmp_path)


# --- the disk ---


def test_a_full_disk_is_said_before_the_first_byte(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")  # noqa: PYI024
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, len(BODY) - 1))
    web.replies = [Reply(BODY)]
    assert "make room" in refusal(web, tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "*")
    assert get(web, tmp_path) == BODY


@pytest.mark.parametrize("endless", [True, False])
def test_a_disk_that_fills_up_is_cleared_of_what_may_never_end(tmp_path: Path, endless: bool):
    def full(position: int) -> None:
        if position == 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")

    origin = Canned(full, None if endless else len(BODY))
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        download(origin, tmp_path)
    assert (tmp_path / "part").exists() == (not endless)
    origin.at = int
    assert download(origin, tmp_path).read_bytes() == BODY
    assert origin.starts == [0, 0 if endless else 20_000]


def test_a_folder_that_cannot_be_made(web: Web, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    web.replies = [Reply(BODY)]
    with pytest.raises(UserError, match="cannot write"):
        get(web, tmp_path / "file" / "folder")


@pytest.mark.parametrize(
    "change",
    [
        lambda part, record: part.write_bytes(BODY[:10]),
        lambda part, record: part.unlink(),
        lambda part, record: record.write_bytes(b"[" * 100_000),
        lambda part, record: record.write_text(json.dumps(json.loads(record.read_text()) | {"saved": -5})),
        lambda part, record: record.write_text(json.dumps(json.loads(record.read_text()) | {"saved": "x"})),
        lambda part, record: record.write_text(json.dumps(json.loads(record.read_text()) | {"file": "../x"})),
        lambda part, record: record.write_text(json.dumps(json.loads(record.read_text()) | {"new": 1})),
        lambda part, record: record.write_text(json.dumps(json.loads(record.read_text()) | {"whole": True})),
    ],
)
def test_a_part_that_is_not_as_recorded_is_dropped(web: Web, tmp_path: Path, change):
    web.replies = [Reply(BODY, sends=20_000), Reply(status=404)]
    refusal(web, tmp_path)
    change(tmp_path / "part", tmp_path / "record.json")
    web.replies = [Reply(BODY)]
    assert get(web, tmp_path) in (BODY, BODY[:20_000])
    assert not (tmp_path.parent / "x").exists()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/a/novel.txt", "novel.txt"),
        ("/a/../../etc/passwd", "passwd"),
        ("/a/..", "_."),
        ("/a/.hidden.txt", "_hidden.txt"),
        ("/a\\b:c?.txt", "a_b_c_.txt"),
        ("", "text_"),
        ("/part", "text_part"),
        ("/record.json", "text_record.json"),
        ("/" + "x" * 300 + ".txt", "x" * 56 + ".txt"),
    ],
)
def test_a_name_leads_nowhere_else(path: str, name: str):
    assert safe_name(path) == name


# --- kills ---


def test_ctrl_c_keeps_what_has_come(tmp_path: Path, capsys):
    def interrupt(position: int) -> None:
        if position == 30_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(Canned(interrupt), tmp_path)
    assert "30,000 of 50,000 bytes are here" in capsys.readouterr().err
    again = Canned(int)
    assert download(again, tmp_path).read_bytes() == BODY
    assert again.starts == [30_000]


def test_bytes_behind_the_last_sync_are_dropped(tmp_path: Path):
    """After a power cut they may be zeros."""

    def lose(position: int) -> None:
        if position == 30_000:
            raise LostConnectionError("is gone")

    with pytest.raises(UserError, match="is gone after 30,000 of 50,000 bytes, 5 times in a row"):
        download(Canned(lose), tmp_path, patience=HASTY)
    with open(tmp_path / "part", "ab") as file:
        file.write(bytes(10_000))
    again = Canned(int)
    assert download(again, tmp_path).read_bytes() == BODY
    assert again.starts == [30_000]


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from nanogpt.text import download as module
from web import Canned
left = [int(sys.argv[2])]
def step(*_):
    left[0] -= 1
    if left[0] < 0:
        os._exit(9)
def stepping(function):
    def call(*arguments, **named):
        step()
        result = function(*arguments, **named)
        step()
        return result
    return call
module.SAVE_SECONDS = -1
os.replace, os.truncate = stepping(os.replace), stepping(os.truncate)
Path.unlink = stepping(Path.unlink)
module.download(Canned(step), Path(sys.argv[1]))
"""


def test_a_kill_at_any_moment_leaves_no_half_text(tmp_path: Path):
    """One process after the other downloads the same, each killed two steps later than the last."""
    script = KILLED.format(tests=str(Path(__file__).parent))
    for steps in count(0, 2):
        folder = tmp_path / str(steps)
        done = subprocess.run([sys.executable, "-c", script, folder, str(steps)], check=False)
        assert done.returncode in (0, 9)
        path = downloaded(Canned(int), folder)
        assert path is None or path.read_bytes() == BODY
        assert download(Canned(int), folder).read_bytes() == BODY
        assert sorted(file.name for file in folder.iterdir()) == ["a.txt", "record.json"]
        if done.returncode == 0:
            break
    assert steps > 20
