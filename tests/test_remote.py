"""--input_file takes addresses: of the web, and of what fsspec reads. Secrets in them are told to nobody.

No test leaves the machine: the web, the hub, S3 and Google's storage are servers on 127.0.0.1.
"""

import gzip
import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from web import HASTY, Reply, Web, serving

from nanogpt.cli import main as cli
from nanogpt.data.config import PrepareConfig
from nanogpt.data.dataset import load_dataset
from nanogpt.data.prepare import main as prepare
from nanogpt.errors import UserError
from nanogpt.text import remote
from nanogpt.text.addresses import is_address, local_name, without_secrets
from nanogpt.text.corpus import find_corpus
from nanogpt.text.documents import SkipReport
from nanogpt.text.remote import FILE_SYSTEMS, fetch

VERSE = "From fairest creatures we desire increase,\nThat thereby beauty's rose might never die,\n"


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server, and no proxy before it."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(remote, "PATIENCE", HASTY)
    with serving() as server:
        yield server


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, empty."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


def texts(names: list[str], downloads: Path, report: SkipReport | None = None) -> list[str]:
    """The documents in files and at addresses."""
    chunks = find_corpus(names, downloads=downloads).chunks(report or SkipReport())
    return [chunk.raw.decode() for chunk in chunks]


# --- addresses ---


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("https://me:secret@host:8080/a.txt?token=secret#secret", "https://host:8080/a.txt?..."),
        ("HTTPS://secret@[::1]:80/a%20b.txt", "https://[::1]:80/a%20b.txt"),
        ("https://me:sec/ret@host/a.txt", "https://..."),
        ("https://me:sec?ret@host/a.txt", "https://..."),
        ("http://host/a@b.txt#secret", "http://host/a@b.txt"),
        ("s3://key:secret@bucket/what?.txt", "s3://bucket/what?.txt"),
        ("hf://datasets/me/books@main/a#1.parquet", "hf://datasets/me/books@main/a#1.parquet"),
        ("books/a?b@c.txt", "books/a?b@c.txt"),
        ("C:\\books\\a.txt", "C:\\books\\a.txt"),
        ("-", "-"),
    ],
)
def test_what_is_shown_of_an_address(name: str, shown: str):
    assert without_secrets(name) == shown
    assert is_address(name) == (name.partition(":")[0].lower() in ("https", "http", "s3", "hf"))


def test_a_file_address_is_a_local_file(tmp_path: Path):
    path = tmp_path / "a b?.txt"
    path.write_text(VERSE)
    assert local_name(path.as_uri()) == str(path)
    assert texts([path.as_uri()], tmp_path / "downloads") == [VERSE]
    assert not (tmp_path / "downloads").exists()
    with pytest.raises(UserError, match="another machine"):
        local_name("file://books/a.txt")


@pytest.mark.parametrize(
    "name", ["zip://a.txt::http://h/a.zip", "reference://x", "gopher://h/a", "local:///a"]
)
def test_a_protocol_that_is_not_known_is_one_line_with_those_that_are(name: str, tmp_path: Path):
    known = "file, gcs, gs, hf, http, https, memory, s3"
    with pytest.raises(UserError, match=rf"{name.partition(':')[0]}:// is not known: use {known}$"):
        fetch(name, tmp_path)


@pytest.mark.parametrize("protocol", FILE_SYSTEMS)
def test_a_missing_package_is_one_line(protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(_: str) -> None:
        raise ImportError("Install x")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(
        UserError, match=rf"needs the package {FILE_SYSTEMS[protocol][0]}: pip install nanogpt\["
    ):
        fetch(f"{protocol}://bucket/a.txt", tmp_path)


@pytest.mark.parametrize("address", ["http://[h/a.txt", "http:///a.txt", "http://h:99999/a.txt", "https://"])
def test_an_address_that_is_none_is_one_line(address: str, tmp_path: Path):
    with pytest.raises(UserError, match="not a valid address"):
        fetch(address, tmp_path)


def test_the_web_has_no_globs(tmp_path: Path):
    with pytest.raises(UserError, match=r"http://h/\*\.txt names several files"):
        fetch("http://h/*.txt", tmp_path)


# --- texts ---


def zipped(name: str, text: str) -> bytes:
    """A zip archive with one file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, text)
    return file.getvalue()


RECORD = json.dumps({"text": VERSE}) + "\n"


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("a.txt", VERSE.encode(), {}),
        ("download?file=a.jsonl", VERSE.encode(), {}),
        ("a.jsonl?download=true", RECORD.encode(), {}),
        ("a.jsonl.gz", gzip.compress(RECORD.encode()), {}),
        ("a.jsonl.gz", gzip.compress(RECORD.encode()), {"Content-Encoding": "gzip"}),
        ("a.jsonl", gzip.compress(RECORD.encode()), {"Content-Encoding": "gzip"}),
        ("a.zip", zipped("b.jsonl", RECORD), {}),
    ],
)
def test_formats_are_those_of_local_files(
    web: Web, tmp_path: Path, path: str, body: bytes, headers: dict[str, str]
):
    web.replies = [Reply(body, headers=headers)]
    assert texts([f"{web.url}/{path}"], tmp_path) == [VERSE]


def test_messages_name_the_address(web: Web, tmp_path: Path):
    web.replies = [Reply(b"[1]\n{}\n")]
    report = SkipReport()
    local = tmp_path / "local.txt"
    local.write_text(VERSE)
    assert texts([f"{web.url}/a.jsonl?key=secret", str(local)], tmp_path, report) == [VERSE]
    assert report.broken[0].startswith(f"{web.url}/a.jsonl?...:1: ")
    web.replies = [Reply(b"\0\1\2\xff" * 1000)]
    with pytest.raises(UserError, match=f"^--input_file {web.url}/b.txt is not a text file"):
        texts([f"{web.url}/b.txt"], tmp_path)


def test_the_data_command_reads_addresses_once(web: Web, tmp_path: Path, capsys):
    folder, local = tmp_path / "data", tmp_path / "local.txt"
    local.write_text("A local file.\n" * 20)
    web.replies = [Reply(gzip.compress(RECORD.encode() * 20))]
    config = PrepareConfig(input_file=(str(local), f"{web.url}/a.jsonl.gz"), data_dir=str(folder))
    assert prepare(config) == 0
    assert load_dataset(folder).characters == 20 * len("A local file.\n" + VERSE)
    assert prepare(config) == 0
    assert len(web.requests) == 1
    out = capsys.readouterr().out
    assert f"Downloading {web.url}/a.jsonl.gz to {folder / 'downloads'}" in out
    assert f"{web.url}/a.jsonl.gz: 1 file downloaded before" in out
    assert "already prepared" in out


def test_a_preparation_after_a_failed_download_goes_on(web: Web, tmp_path: Path):
    body = VERSE.encode() * 500
    address = f"{web.url}/a.txt"
    config = PrepareConfig(input_file=(address,), data_dir=str(tmp_path))
    web.replies = [Reply(body, sends=10_000), Reply(status=404)]
    with pytest.raises(UserError, match="404"):
        prepare(config)
    web.replies = [Reply(body)]
    assert prepare(config) == 0
    assert web.ranges()[-1] == "bytes=10000-"
    assert load_dataset(tmp_path).characters == len(body)


def test_eval_reads_addresses(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    web.replies = [Reply(VERSE.encode())]
    assert texts([f"{web.url}/a.txt"], None) == [VERSE]  # type: ignore[arg-type]
    assert [*(tmp_path / "nanogpt" / "downloads").glob("*/a.txt")]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match="home"):
        fetch(f"{web.url}/a.txt")


# --- secrets ---


def test_secrets_are_sent_and_never_told(web: Web, tmp_path: Path, capsys):
    folder = tmp_path / "data"
    address = web.url.replace("//", "//me:hushhush@") + "/a.txt?token=hushhush"
    config = ["--input_file", address, "--data_dir", str(folder)]
    for bad in (Reply(status=403), Reply(b"\0\1\2\xff" * 999), Reply(b""), Reply(b"x"), Reply(status=500)):
        web.replies = [bad]
        assert cli.run_command("data", config, "data") == 2
        for file in folder.glob("downloads/*/a.txt"):
            file.unlink()
    web.replies = [Reply(VERSE.encode() * 20, sends=700), Reply(VERSE.encode() * 20)]
    assert cli.run_command("data", config, "data") == 0
    path, headers = web.requests[-1]
    assert path == "/a.txt?token=hushhush"
    assert headers["Authorization"] == "Basic bWU6aHVzaGh1c2g="
    (folder / "train.pt").unlink()
    with pytest.raises(UserError, match=r"a\.txt\?\.\.\."):
        load_dataset(folder)
    said = capsys.readouterr()
    assert f"{web.url}/a.txt?..." in said.out
    assert "hushhush" not in said.out + said.err
    for file in folder.rglob("*"):
        assert file.is_dir() or b"hushhush" not in file.read_bytes(), file


@pytest.mark.parametrize(
    "address", ["S3://key:hush@bucket/a", "memory://key:hu/sh@bucket/a", "gs://hush@b/a"]
)
def test_a_login_in_an_address_of_a_bucket_is_refused_unsaid(address: str, tmp_path: Path):
    with pytest.raises(UserError, match="was given with a login: leave it out") as raised:
        fetch(address, tmp_path)
    assert "hu" not in str(raised.value)


def test_a_password_is_not_sent_to_another_host(web: Web, tmp_path: Path):
    with serving() as other:
        web.replies = [Reply(status=302, headers={"Location": other.url.replace("127.0.0.1", "localhost")})]
        other.replies = [Reply(VERSE.encode())]
        fetch(web.url.replace("//", "//me:hush@") + "/a.txt", tmp_path)
        assert "Authorization" in web.requests[0][1]
        assert "Authorization" not in other.requests[0][1]


# --- fsspec ---


def test_globs_folders_and_local_files_in_their_order(memory: Any, tmp_path: Path):
    for name in (
        "b/2.txt",
        "b/1.txt",
        "b/.hidden.txt",
        "b/c/3.txt",
        "b/c/.git/config",
        "d/4.jsonl",
        "d/5.md",
    ):
        text = name if name.endswith("txt") else json.dumps({"text": name})
        memory.pipe(f"/{name}", text.encode())
    local = tmp_path / "local.txt"
    local.write_text("local")
    downloads = tmp_path / "downloads"
    assert texts(["memory://b", str(local), "memory://d/*.jsonl"], downloads) == [
        "b/1.txt", "b/2.txt", "b/c/3.txt", "local", "d/4.jsonl",
    ]  # fmt: skip
    assert texts(["memory://b/?.txt", "memory:///b/1.txt"], downloads) == ["b/1.txt", "b/2.txt"]
    assert texts(["memory://*/*.jsonl"], downloads) == ["d/4.jsonl"]
    for name in ("memory://b/*.csv", "memory://nowhere", "memory://b/6.txt"):
        with pytest.raises(UserError, match="check the address"):
            texts([name], downloads)


class Torn(io.BytesIO):
    """A file whose connection is lost after each megabyte."""

    left = 1 << 20

    def read(self, size: int | None = -1, /) -> bytes:
        if not self.left:
            raise TimeoutError("the read timed out")
        data = super().read(min(size or 0, self.left))
        self.left -= len(data)
        return data


@pytest.mark.parametrize("changes", [False, True])
def test_a_lost_connection_goes_on_where_it_was(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: bool
):
    body, starts, whole = os.urandom(3 << 20), list[int](), memory.open
    memory.pipe("/a.bin", body)

    def torn(path: str, mode: str, **_: object) -> Torn:
        file = Torn(memory.store[path].getvalue())
        if len(starts) == 2 and changes:
            with whole(path, "wb") as new:
                new.write(body[::-1])
        seek = file.seek
        monkeypatch.setattr(file, "seek", lambda position: [starts.append(position), seek(position)])
        return file

    monkeypatch.setattr(memory, "open", torn)
    ((_, path),) = fetch("memory://a.bin", tmp_path, HASTY)
    assert path.read_bytes() == (body[::-1] if changes else body)
    assert starts == ([0, 1 << 20, 2 << 20, 0, 1 << 20, 2 << 20] if changes else [0, 1 << 20, 2 << 20])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError("no"), r"is refused: log in \(.*\)"),
        (
            ValueError("Bad bucket:\nname"),
            "cannot be read: Bad bucket: name",
        ),
        (ConnectionError("reset"), r"failed \(reset\): check the address, or try again later"),
    ],
)
def test_the_errors_of_a_file_system_are_one_line(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(memory, "info", fail)
    with pytest.raises(UserError, match=f"^--input_file memory://a.txt {said}$"):
        fetch("memory://a.txt", tmp_path, HASTY)
