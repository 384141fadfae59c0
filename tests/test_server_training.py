"""The server and a training: kept checkpoints as models, GET /run, its news, a run that has just begun."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import post, serving, text_of
from waiting import HANGS, wait_for, wait_until, written_rows

from nanogpt import TrainConfig, fit, generate, inspect_text, load_model, prepare
from nanogpt.checkpoint.kept import kept_checkpoints, kept_path
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.errors import UserError
from nanogpt.server import models, training
from nanogpt.server import run as server_run
from nanogpt.server.app import Service
from nanogpt.server.config import ServeConfig
from nanogpt.server.training import Reader
from nanogpt.storage.locking import lock

TEXT = "from fairest creatures we desire increase.\n" * 40
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "batch_size": 8, "warmup_iters": 2,
        "device": "cpu", "dtype": "float32", "log_interval": 1, "eval_iters": 1}  # fmt: skip
BODY = {"prompt": "from", "max_tokens": 12, "seed": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run that has kept five checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "my.txt").write_text(TEXT, "utf-8")
    prepare(folder / "my.txt", folder / "data", tokenizer="byte", quiet=True)
    config = TrainConfig(
        **TINY, data_dir=str(folder / "data"), out_dir=str(folder / "out"),
        max_iters=20, eval_interval=5, keep_checkpoints=5, learning_rate=1e-2,
    )  # fmt: skip
    fit(config, quiet=True)
    return config


@pytest.fixture
def out(trained: TrainConfig, tmp_path: Path) -> Path:
    """A copy of that run folder."""
    return shutil.copytree(trained.out_dir, tmp_path / "out")


@pytest.fixture
def config(out: Path) -> ServeConfig:
    return ServeConfig(checkpoint=str(out), port=0, device="cpu", rows=4, grace=5.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(server_run, "WATCH_SECONDS", 0.02)


def kept(out: Path) -> dict[int, Path]:
    return kept_checkpoints(out / "checkpoints")


def get(url: str) -> Any:
    return httpx.get(url, timeout=HANGS).raise_for_status().json()


# --- kept checkpoints as models ---


def test_every_kept_checkpoint_is_a_model(config: ServeConfig, out: Path):
    with serving(config) as url:
        assert [model["id"] for model in get(f"{url}/v1/models")["data"]] == [
            "out", "out@0", "out@5", "out@10", "out@15", "out@20",
        ]  # fmt: skip
        texts = {step: text_of(url, model=f"out@{step}", **BODY) for step in kept(out)}
        assert texts == {
            step: generate(load_model(path, "cpu"), "from", num_tokens=12, seed=1)
            for step, path in kept(out).items()
        }
        assert len(set(texts.values())) > 2
        assert post(url, model="out@5", **BODY).json()["model"] == "out@5"
        messages = [{"role": "user", "content": "from"}]
        chat = post(url, "/v1/chat/completions", model="out@20", messages=messages, max_tokens=2)
        assert chat.json()["model"] == "out@20"
        seen = post(url, "/inspect", text="from", model="out@0", top=1).raise_for_status().json()
        assert seen["next"]["entropy"] == pytest.approx(
            inspect_text(load_model(kept(out)[0], "cpu"), "from").next.entropy, abs=1e-4
        )
        assert 'vllm:generation_tokens_total{model_name="out@20"} 14.0' in httpx.get(f"{url}/metrics").text
        for name in (
            "out@1",
            "out@x",
            "out@-5",
            "out@05",
            "out@",
            "out@5 ",
            "out@\u0665",
            "@5",
            "other@5",
            "out5",
        ):
            error = post(url, model=name, **BODY)
            assert (error.status_code, error.json()["error"]["code"]) == (404, "model_not_found"), name


def test_a_few_are_loaded_at_a_time_whoever_asks_for_them(config: ServeConfig, out: Path, monkeypatch):
    monkeypatch.setattr(models, "MAX_KEPT", 2)
    names = [f"out@{step}" for step in kept(out)] * 4
    expected = {
        f"out@{step}": generate(load_model(path, "cpu"), "from", num_tokens=12, seed=1)
        for step, path in kept(out).items()
    }
    services: list[Service] = []
    with serving(config, services.append) as url:

        def ask(name: str) -> str:
            while (answer := post(url, model=name, **BODY)).status_code == 429:  # two others are at work
                assert "2 kept checkpoints are at work" in answer.text
            return answer.raise_for_status().json()["choices"][0]["text"]

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, names)) == [expected[name] for name in names]
        assert len(services[0].models.kept) == 2
        wait_until(lambda: sum(thread.name == "engine" for thread in threading.enumerate()) == 3)
        used = [name for name in expected if name in services[0].models.kept]
        unused = [name for name in expected if name not in used]
        for name in (used[1], used[0], unused[0]):
            ask(name)
        assert list(services[0].models.kept) == [used[0], unused[0]]  # the one used longest ago has gone


def test_one_that_is_at_work_is_not_closed(config: ServeConfig, monkeypatch):
    monkeypatch.setattr(models, "MAX_KEPT", 1)
    services: list[Service] = []
    endless = {"prompt": "a", "max_tokens": 10**6, "stream": True, "ignore_eos": True}
    with serving(replace(config, max_tokens=10**6), services.append) as url:
        with httpx.stream("POST", f"{url}/v1/completions", json=endless | {"model": "out@0"}) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert services[0].models.kept["out@0"].engine.scheduler.rows
            refused = post(url, model="out@5", **BODY)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        wait_until(lambda: not services[0].models.kept["out@0"].engine.is_busy())
        assert post(url, model="out@5", **BODY).status_code == 200


def test_a_damaged_one_is_an_error_and_a_new_one_is_loaded(config: ServeConfig, out: Path):
    with serving(config) as url:
        before = text_of(url, model="out@0", **BODY)
        whole = kept(out)[0].read_bytes()
        kept(out)[0].write_bytes(whole[:-1] + b"x")
        answer = post(url, model="out@0", **BODY)
        assert (answer.status_code, "is damaged" in answer.text) == (500, True)
        assert str(out) not in answer.text
        shutil.copy(kept(out)[20], kept(out)[0])
        assert text_of(url, model="out@0", **BODY) == text_of(url, model="out@20", **BODY) != before
        kept(out)[0].unlink()
        assert post(url, model="out@0", **BODY).status_code == 404
        assert post(url, model="out", **BODY).status_code == 200


# --- the run ---


def test_a_run_is_described(config: ServeConfig, out: Path, trained: TrainConfig):
    with serving(replace(config, name="bard")) as url:
        run = get(f"{url}/run")
        assert httpx.get(f"{url}/run/events").status_code == 204
        assert httpx.head(f"{url}/run/events").status_code == 200
    assert (run["name"], run["running"]) == ("bard", False)
    assert run["rows"] == written_rows(out / "metrics.jsonl")
    assert run["settings"]["n_embd"] == 16
    assert "out_dir" not in run["settings"]
    assert set(run["settings"]) < set(vars(trained))
    losses = {row["step"]: row["val_loss"] for row in run["rows"] if "val_loss" in row}
    assert run["checkpoints"] == [
        {"step": step, "val_loss": losses.get(step), "model": f"bard@{step}"} for step in (0, 5, 10, 15, 20)
    ]


def test_a_checkpoint_alone_has_no_run(config: ServeConfig, out: Path, tmp_path: Path):
    (tmp_path / "alone").mkdir()
    shutil.copy(out / "ckpt.pt", tmp_path / "alone")
    with serving(replace(config, checkpoint=str(tmp_path / "alone"))) as url:
        for path in ("/run", "/run/events"):
            answer = httpx.get(url + path)
            assert (answer.status_code, "no run folder" in answer.text) == (404, True)
        assert [model["id"] for model in get(f"{url}/v1/models")["data"]] == ["alone"]


LINES = [
    b"{}", b"[]", b"x", b"", b'{"step": true}', b'{"step": 1e999}', b'{"step": "1"}', b"[" * 10**5, b"\xff",
    b'{"step": 1' + b"0" * 400 + b"}", b'{"step": 1' + b"0" * 5000 + b"}", b"\x00" * 3_000_000,
]  # fmt: skip


def test_lines_that_are_no_rows_are_left_out(out: Path):
    good = b'{"step": 7, "val_loss": NaN, "lr": 0.5, "sample": "x", "train_loss": Infinity}'
    (out / "metrics.jsonl").write_bytes(b"\n".join([*LINES, good, b'{"step": 8}']))
    assert Reader(RunFolder(out), "out").read().rows == [{"step": 7, "lr": 0.5}]
    (out / "metrics.jsonl").unlink()
    if sys.platform != "win32":
        os.mkfifo(out / "metrics.jsonl")
    assert Reader(RunFolder(out), "out").read().rows == []


def test_a_long_curve_is_thinned_out(monkeypatch):
    monkeypatch.setattr(training, "MAX_ROWS", 10)
    rows = [{"step": step} | ({"val_loss": 1.0} if step == 31 else {}) for step in range(95)]
    assert [row["step"] for row in training.thinned(rows)] == sorted([*range(0, 95, 10), 31])


# --- news ---


class Stream:
    """The events of a stream, one after the other."""

    def __init__(self, answer: httpx.Response) -> None:
        self.lines = answer.iter_lines()

    def next(self) -> tuple[str, Any]:
        kind = next(line for line in self.lines if line.startswith("event: "))
        return kind.removeprefix("event: "), json.loads(next(self.lines).removeprefix("data: "))

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        while True:
            event = self.next()
            yield event
            if event[0] == "end":
                return


def events(url: str):
    return httpx.stream("GET", f"{url}/run/events", timeout=HANGS)


def test_news_come_as_they_are_written(config: ServeConfig, out: Path):
    row, late = {"step": 21, "val_loss": 0.5}, {"step": 22, "lr": 1.0}
    with serving(config) as url:
        with lock(out, "busy"):
            assert get(f"{url}/run")["running"]
            with events(url) as answer:
                stream = Stream(answer)
                with open(out / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(row))
                    file.flush()
                    file.write("\n" + json.dumps(late)[:5])
                    file.flush()
                    assert stream.next() == ("row", row)
                    file.write(json.dumps(late)[5:] + "\n")
                assert stream.next() == ("row", late)
                shutil.copy(kept(out)[20], kept_path(out / "checkpoints", 21))
                assert stream.next() == ("checkpoint", {"step": 21, "val_loss": 0.5, "model": "out@21"})
                lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
                kept(out)[21].unlink()
                (out / "metrics.jsonl").write_text("".join(lines[:3]))
                assert stream.next() == ("restart", {})
                assert [stream.next() for _ in range(3)] == [("row", json.loads(line)) for line in lines[:3]]
                assert [stream.next()[1]["step"] for _ in range(5)] == [0, 5, 10, 15, 20]
                with open(out / "metrics.jsonl", "a") as file:
                    file.write(lines[3])
                assert stream.next() == ("row", json.loads(lines[3]))
        assert not get(f"{url}/run")["running"]


def test_the_stream_ends_with_the_training_and_its_last_row(config: ServeConfig, out: Path):
    with serving(config) as url, ExitStack() as owner:
        owner.enter_context(lock(out, "busy"))
        with events(url) as answer:
            stream = Stream(answer)
            with open(out / "metrics.jsonl", "a") as file:
                file.write('{"step": 21}\n')
            owner.close()
            assert list(stream) == [("row", {"step": 21}), ("end", {})]
            assert list(stream.lines) == [""]
        assert httpx.get(f"{url}/run/events").status_code == 204


def test_a_quiet_stream_says_that_it_is_there(config: ServeConfig, out: Path, monkeypatch):
    monkeypatch.setattr(training, "HEARTBEAT_SECONDS", 0.05)
    with lock(out, "busy"), serving(config) as url, events(url) as answer:
        assert next(answer.iter_lines()) == ": still there"


def test_listeners_are_few_and_leave(config: ServeConfig, out: Path, monkeypatch):
    monkeypatch.setattr(training, "MAX_LISTENERS", 1)
    services: list[Service] = []
    with lock(out, "busy"), serving(config, services.append) as url:
        with events(url):
            wait_until(lambda: services[0].training.listeners == 1)
            assert httpx.get(f"{url}/run/events").status_code == 429
        wait_until(lambda: services[0].training.listeners == 0)


def test_a_server_that_stops_ends_its_streams(config: ServeConfig, out: Path):
    services: list[Service] = []
    with lock(out, "busy"), ThreadPoolExecutor(1) as pool:
        with serving(config, services.append) as url:
            ended = pool.submit(httpx.get, f"{url}/run/events", timeout=HANGS)
            wait_until(lambda: services[0].training.listeners == 1)
        assert ended.result().status_code == 200


# --- a run that has just begun ---


def test_a_run_without_a_checkpoint(config: ServeConfig, tmp_path: Path, out: Path, capsys):
    fresh = tmp_path / "fresh"
    with serving(replace(config, checkpoint=ServeConfig.checkpoint, run=str(fresh))) as url:
        assert f"Waiting for the first checkpoint in {fresh}" in capsys.readouterr().out
        for answer in (
            post(url, **BODY), post(url, model="fresh", **BODY), post(url, "/tokenize", prompt="a"),
            httpx.get(f"{url}/health"),
        ):  # fmt: skip
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert "no checkpoint yet" in answer.json()["error"]["message"]
        assert get(f"{url}/v1/models")["data"] == []
        assert httpx.get(f"{url}/metrics").status_code == 200
        assert get(f"{url}/run") == {
            "name": "fresh", "settings": {}, "rows": [], "running": False, "checkpoints": [],
        }  # fmt: skip
        assert httpx.get(f"{url}/run/events").status_code == 204
        fresh.mkdir()
        (fresh / "last.pt").write_bytes(b"damaged")
        wait_until(lambda: "No checkpoint yet: " in capsys.readouterr().err)
        for source, name in ((out / "last.pt", "last.pt"), (kept(out)[5], "ckpt.pt")):
            shutil.copy(source, fresh / "new")
            (fresh / "new").replace(fresh / name)
            expected = generate(load_model(fresh, "cpu"), "from", num_tokens=12, seed=1)
            wait_until(lambda: (answer := post(url, **BODY)).status_code == 200
                       and answer.json()["choices"][0]["text"] == expected)  # fmt: skip  # noqa: B023
    assert not (fresh / ".lock").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_training_is_watched_from_its_first_step_to_its_end(
    trained: TrainConfig, config: ServeConfig, tmp_path: Path
):
    live = tmp_path / "live"
    flags = TINY | {"data_dir": trained.data_dir, "out_dir": live, "max_iters": 10**6, "eval_interval": 20,
                    "keep_checkpoints": 3}  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with serving(replace(config, checkpoint=ServeConfig.checkpoint, run=str(live))) as url:
        child = subprocess.Popen(
            [sys.executable, "-m", "nanogpt", "train", *words],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert wait_for(lambda: get(f"{url}/run")["running"], child)
            with events(url) as answer:
                stream, seen = iter(Stream(answer)), []
                before = get(f"{url}/run")
                while sum(kind == "checkpoint" for kind, _ in seen) < 4:
                    seen.append(next(stream))
                assert wait_for(lambda: post(url, **BODY).status_code == 200, child)
                child.send_signal(signal.SIGTERM)
                seen += stream
            child.wait(HANGS)
        finally:
            child.kill()
            _, said = child.communicate(timeout=HANGS)
        run = get(f"{url}/run")
        first = text_of(url, model="live@0", **BODY)
    assert (child.returncode, run["running"], seen[-1]) == (143, False, ("end", {})), said
    rows = [row for kind, row in seen if kind == "row"]
    assert rows == run["rows"][-len(rows) :]
    assert run["rows"] == written_rows(live / "metrics.jsonl")
    assert {row["step"] for row in before["rows"]} | {row["step"] for row in rows} == {
        row["step"] for row in run["rows"]
    }
    told = [checkpoint["step"] for kind, checkpoint in seen if kind == "checkpoint"]
    assert told == sorted(set(told))
    assert {checkpoint["step"] for checkpoint in run["checkpoints"]} == set(kept(live))
    assert set(kept(live)) <= {*told, *(checkpoint["step"] for checkpoint in before["checkpoints"])}
    assert all(checkpoint["val_loss"] is not None for checkpoint in run["checkpoints"][1:])
    assert first == generate(load_model(kept(live)[0], "cpu"), "from", num_tokens=12, seed=1)


def test_flags_that_contradict(tmp_path: Path, out: Path):
    with pytest.raises(UserError, match=r"^--run out serves the checkpoints of that run: leave out"):
        ServeConfig(run="out", checkpoint="other.pt")
    with pytest.raises(UserError, match=r'^--run "" is empty'):
        ServeConfig(run="")
    with pytest.raises(UserError, match=r"ckpt.pt is a file: give a run folder"):
        server_run.serve(ServeConfig(run=str(out / "ckpt.pt"), port=0))
