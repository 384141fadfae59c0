"""hf://, s3:// and gs:// through their own packages, against servers on this machine that speak as those do.

Each runs in a process of its own, since the packages read their settings when they are imported.
"""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

FILES = {
    "a/1.txt": b"one",
    "a/2.txt": b"two" * 700_000,
    "a/b/3.txt": b"three",
    "a/b/.hidden": b"hidden",
    "4.txt": b"four",
}

FETCH = """
import json, sys
from pathlib import Path
from nanogpt.errors import UserError
from nanogpt.text.remote import fetch
results = []
for address in sys.argv[2:]:
    try:
        results.append([(file.shown, file.path.read_text()) for file in fetch(address, Path(sys.argv[1]))])
    except UserError as error:
        results.append(str(error))
print("RESULTS" + json.dumps(results))
"""


def list_folder(prefix: str, *, deep: bool) -> tuple[list[str], list[str]]:
    """The names that begin with a prefix, those in folders only if `deep`; and the folders."""
    names = [name for name in FILES if name.startswith(prefix)]
    folders = {prefix + name[len(prefix) :].split("/")[0] for name in names if "/" in name[len(prefix) :]}
    return [name for name in names if deep or "/" not in name[len(prefix) :]], sorted(folders)


class Storage(http.server.BaseHTTPRequestHandler):
    """The files as a bucket of S3 and of Google's storage, and as a data set of the hub."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), {key: value[0] for key, value in parse_qs(parts.query).items()}
        for pattern, answer in (
            (r"/api/datasets/me/books/tree/main/?(.*)", self.hub_tree),
            (r"/api/datasets/me/books", self.hub_facts),
            (r"/datasets/me/books/resolve/main/(.*)", self.content),
            (r"(?:/download)?/storage/v1/b/bucket/o/?(.*)", self.google),
            (r"/bucket/?(.*)", self.s3),
        ):
            if found := re.fullmatch(pattern, path):
                return answer(found[1] if found.groups() else "", query)
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        """The hub's facts about paths."""
        names = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        self.answer_json([self.hub_fact(name) for name in names if name in FILES])

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def content(self, name: str, _query: object) -> None:
        """The bytes of a file, or a range of them."""
        if name not in FILES:
            return self.answer(
                404, b"<Error><Code>NoSuchKey</Code></Error>", {"X-Error-Code": "EntryNotFound"}
            )
        body, headers = FILES[name], {"ETag": '"1"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found is None:
            return self.answer(200, body, headers)
        first, last = int(found[1]), min(int(found[2]), len(body) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
        return self.answer(206, body[first : last + 1], headers)

    def hub_fact(self, name: str) -> dict[str, object]:
        return {"type": "file", "oid": "0" * 40, "size": len(FILES[name]), "path": name}

    def hub_facts(self, _name: str, _query: object) -> None:
        self.answer_json(
            {"id": "me/books", "sha": "0" * 40, "siblings": [], "private": False, "gated": False}
        )

    def hub_tree(self, folder: str, query: dict[str, str]) -> None:
        prefix = f"{folder}/" if folder else ""
        names, folders = list_folder(prefix, deep=query.get("recursive", "").lower() == "true")
        facts = [{"type": "directory", "oid": "1" * 40, "path": path} for path in folders]
        self.answer_json([*map(self.hub_fact, names), *facts])

    def google(self, name: str, query: dict[str, str]) -> None:
        if name in FILES and query.get("alt") != "media":
            self.answer_json(self.google_fact(name))
        elif name:
            self.content(name, query)
        else:
            names, folders = list_folder(query.get("prefix", ""), deep=not query.get("delimiter"))
            items = [self.google_fact(name) for name in names]
            self.answer_json({"items": items, "prefixes": [f"{path}/" for path in folders]})

    def google_fact(self, name: str) -> dict[str, str]:
        link = f"http://{self.headers['Host']}/download/storage/v1/b/bucket/o/{name.replace('/', '%2F')}"
        date = "2026-01-01T00:00:00.000Z"
        return {
            "name": name, "bucket": "bucket", "size": str(len(FILES[name])), "etag": "1", "generation": "1",
            "updated": date, "timeCreated": date, "mediaLink": f"{link}?alt=media",
        }  # fmt: skip

    def s3(self, name: str, query: dict[str, str]) -> None:
        if "list-type" not in query:
            return self.content(name, query)
        names, folders = list_folder(query.get("prefix", ""), deep=not query.get("delimiter"))
        rows = "".join(
            f"<Contents><Key>{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;1&quot;</ETag><Size>{len(FILES[name])}</Size></Contents>"
            for name in names
        )
        if query.get("delimiter"):
            rows += "".join(f"<CommonPrefixes><Prefix>{path}/</Prefix></CommonPrefixes>" for path in folders)
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        return self.answer(200, body.encode(), {"Content-Type": "application/xml"})

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def storage() -> Iterator[str]:
    """The address of the server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Storage) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("package", "base"),
    [("huggingface_hub", "hf://datasets/me/books"), ("s3fs", "s3://bucket"), ("gcsfs", "gs://bucket")],
)
def test_files_folders_and_globs(package: str, base: str, storage: str, tmp_path: Path):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install nanogpt[remote]")
    settings = {
        "NO_PROXY": "*",
        "HF_ENDPOINT": storage,
        "HF_HOME": str(tmp_path / "hub"),
        "AWS_ENDPOINT_URL": storage,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "STORAGE_EMULATOR_HOST": storage,
        "FSSPEC_GS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it looks for another server
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "HF_"))}
    names = ("a/2.txt", "a/*.txt", "a", "nowhere.txt")
    call = [sys.executable, "-c", FETCH, tmp_path / "downloads", *(f"{base}/{name}" for name in names)]
    done = subprocess.run(call, env=kept | settings, capture_output=True, text=True, check=True)
    one, two, three = (
        (f"{base}/{name}", FILES[name].decode()) for name in ("a/1.txt", "a/2.txt", "a/b/3.txt")
    )
    found = json.loads(done.stdout.partition("RESULTS")[2])
    assert [[*map(tuple, files)] for files in found[:3]] == [[two], [one, two], [one, two, three]]
    assert found[3] == f"--input_file {base}/nowhere.txt does not exist: check the address"
