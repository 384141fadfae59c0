"""metrics.jsonl loses no line and keeps no false one; what cannot be written never ends a training."""

import json
import math
import os
import re
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.config import SINK_NAMES, TrainConfig
from nanogpt.errors import UserError
from nanogpt.storage import files
from nanogpt.terminal import console
from nanogpt.training.fit import fit
from nanogpt.training.metrics import (
    ConsoleSink,
    JsonLinesSink,
    Metrics,
    forget_after,
)
from nanogpt.training.plot import plot_losses
from nanogpt.training.sinks import SINKS, TensorBoardSink, WandbSink, create_sinks

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def train(step, **more):
    return {"step": step, "train_loss": 2.5, "lr": 1e-3, "tokens_per_s": 1e4, "elapsed_s": 1.0, **more}


def evaluation(step, **more):
    return {"step": step, "val_loss": 2.25, "elapsed_s": 1.0, **more}


def rows(path):
    """The lines of a file, each of which must be whole and JSON as strict readers want it."""
    text = path.read_text("utf-8")
    assert text == "" or text.endswith("\n")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def json_lines(path, step=0, evaluated_at=0):
    """The sink, open."""
    sink = JsonLinesSink(path)
    sink.rewind(step, evaluated_at)
    return sink


@contextmanager
def disk_of(size):
    """Let no file grow beyond `size` bytes: writing fails as it does on a full disk."""
    resource = pytest.importorskip("resource")  # CPython ignores the signal SIGXFSZ; the write fails
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# JSON lines


def test_one_object_a_line_as_soon_as_it_is_written(path):
    lines = json_lines(path)
    for step in range(1, 4):
        lines.write(train(step))
        assert [row["step"] for row in rows(path)] == list(range(1, step + 1))
    lines.write(evaluation(3))
    assert rows(path) == [train(1), train(2), train(3), evaluation(3)]
    lines.close()
    assert rows(path) == [train(1), train(2), train(3), evaluation(3)]


def test_what_is_there_is_appended_to(path):
    json_lines(path).write(train(1))
    before = path.read_bytes()
    json_lines(path, 1, 0).write(train(2))
    assert path.read_bytes().startswith(before)
    assert rows(path) == [train(1), train(2)]


def test_only_the_numbers_of_the_contract_are_kept(path):
    written = evaluation(1, val_bits_per_byte=1.5)
    json_lines(path).write({**written, "sample": "To be,\nor not", "best": True, "left_s": 3.0})
    assert rows(path) == [written]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_left_out(path, value):
    json_lines(path).write(train(1, grad_norm=value, train_loss=value))
    expected = train(1)
    del expected["train_loss"]
    assert rows(path) == [expected]


def test_flush_reaches_the_disk(path, monkeypatch):
    synced = []
    monkeypatch.setattr(files.os, "fsync", synced.append)
    lines = json_lines(path)
    lines.write(train(1))
    assert synced == []  # not at every line: that would slow the training
    lines.flush()
    assert len(synced) == 1


@pytest.mark.parametrize(
    ("step", "evaluated_at", "left"),
    [
        (40, 30, 7),
        (30, 30, 6),
        (30, 20, 5),  # saved after step 30, killed before it was evaluated: the evaluation is done again
        (20, 20, 4),
        (20, 10, 3),
        (15, 10, 2),
        (10, 0, 1),
        (0, 0, 0),
    ],
)
def test_resuming_forgets_exactly_what_will_be_done_again(path, step, evaluated_at, left):
    written = [train(10), evaluation(10), train(20), evaluation(20), train(30), evaluation(30), train(40)]
    first = json_lines(path)
    for record in written:
        first.write(record)
    json_lines(path, step, evaluated_at)
    assert rows(path) == written[:left]


DEEP = b"[" * 100_000 + b"\n"
FOREIGN = [b"\x00\x00\x00\n", b"[1]\n", b"{}\n", b"\n", b"3\n", b"\xff\n", b'{"step": "9"}\n', DEEP]


@pytest.mark.parametrize("line", FOREIGN, ids=range(len(FOREIGN)))
def test_a_line_that_is_not_ours_stays_and_so_does_what_follows(path, line):
    path.write_bytes(b'{"step": 1}\n' + line + b'{"step": 2}\n')
    forget_after(path, 100, 100)
    assert path.read_bytes() == b'{"step": 1}\n' + line + b'{"step": 2}\n'
    forget_after(path, 1, 0)
    assert path.read_bytes() == b'{"step": 1}\n' + line
    path.write_bytes(b'{"step": 1}\n{"step": 3}\n' + line + b'{"step": 2}\n{"step": 4}\n')
    forget_after(path, 2, 0)
    assert path.read_bytes() == b'{"step": 1}\n' + line + b'{"step": 2}\n'


@pytest.mark.parametrize("torn", [b'{"step": 3, "tr', b'{"step": 3}', b"\x00\x00", b"["])
def test_a_last_line_cut_in_half_is_dropped_and_nothing_else(path, torn):
    whole = b'{"step": 1}\n\n{"step": 2}\n'
    path.write_bytes(whole + torn)
    json_lines(path, 100, 100).write(train(5))
    assert path.read_bytes().startswith(whole + b'{"step": 5, ')


@posix
@pytest.mark.parametrize("kind", ["pipe", "endless", "folder"])
def test_what_is_no_file_is_refused_at_the_start_and_waited_for_later(path, tmp_path, kind, capsys):
    lines = json_lines(path)
    make = {"pipe": os.mkfifo, "endless": lambda path: path.symlink_to("/dev/zero"), "folder": os.mkdir}
    make[kind](path)
    with pytest.raises(UserError, match="is not a file: move it away"):
        json_lines(path)
    with pytest.raises(UserError, match="is not a file: move it away"):
        plot_losses(path, tmp_path / "loss.png")
    lines.write(train(1))
    path.rmdir() if kind == "folder" else path.unlink()
    lines.flush()
    assert rows(path) == [train(1)]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_lines_that_can_never_be_written_are_counted_at_the_end(blocked, capsys):
    lines = json_lines(blocked)
    for step in range(3):
        lines.write(train(step))
    lines.close()
    first, last = capsys.readouterr().err.splitlines()
    assert "will try again" in first
    assert last == f"{blocked} lacks the last 3 lines: No such file or directory"


def test_a_picture_leaves_out_what_is_not_ours(path, tmp_path):
    path.write_bytes(b"".join(FOREIGN) + b'{"step": 1, "train_loss": null}\n{"step": 2, "val_loss": 3}\n')
    plot_losses(path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_nothing_there_is_nothing_to_forget(path):
    forget_after(path, 0, 0)
    assert not path.exists()


@pytest.fixture
def blocked(tmp_path):
    """A metrics file that cannot be written: the folder it belongs in is missing."""
    return tmp_path / "missing" / "metrics.jsonl"


def test_lines_that_cannot_be_written_wait(blocked, capsys):
    lines = json_lines(blocked)
    lines.write(train(1))
    lines.write(train(2))
    assert not blocked.exists()
    warning = capsys.readouterr().err
    assert "cannot write" in warning
    assert "will try again" in warning
    blocked.parent.mkdir()
    lines.write(train(3))
    assert rows(blocked) == [train(1), train(2), train(3)]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("by", ["flush", "close"])
def test_lines_that_wait_are_written_by_the_next_flush(blocked, by):
    lines = json_lines(blocked)
    lines.write(train(1))
    blocked.parent.mkdir()
    getattr(lines, by)()
    assert rows(blocked) == [train(1)]
    lines.flush()
    assert rows(blocked) == [train(1)]  # once


@posix
@pytest.mark.parametrize("room", [0, 1, 50, 95, 150, 290])
def test_a_full_disk_leaves_whole_lines_and_loses_none(path, capsys, room):
    lines = json_lines(path)
    lines.write(train(1))
    with disk_of(path.stat().st_size + room):
        for step in range(2, 7):
            lines.write(train(step))
            written = [row["step"] for row in rows(path)]
            assert written == list(range(1, len(written) + 1))
    assert "cannot write" in capsys.readouterr().err
    lines.write(train(7))
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4, 5, 6, 7]


@posix
@pytest.mark.usefixtures("capsys")  # in memory: the warnings are not for the full disk
def test_a_disk_too_full_for_all_that_waits(path):
    lines = json_lines(path)
    with disk_of(0):
        for step in range(1, 200):
            lines.write(train(step))
    with disk_of(9000):  # room for some of them only
        lines.flush()
        assert [row["step"] for row in rows(path)] == list(range(1, len(rows(path)) + 1))
    lines.close()
    assert [row["step"] for row in rows(path)] == list(range(1, 200))


def test_after_a_roll_back_the_abandoned_steps_are_forgotten(path):
    lines = json_lines(path)
    for step in range(1, 6):
        lines.write(train(step, train_loss=9.0))
    lines.write(evaluation(5))
    lines.rewind(3, 0)
    assert [row["step"] for row in rows(path)] == [1, 2, 3]
    lines.write(train(4))
    assert [(row["step"], row["train_loss"]) for row in rows(path)] == [
        (1, 9.0),
        (2, 9.0),
        (3, 9.0),
        (4, 2.5),
    ]


def test_a_roll_back_forgets_unwritten_lines_too(blocked):
    lines = json_lines(blocked)
    for step in range(1, 6):
        lines.write(train(step))
    blocked.parent.mkdir()
    lines.rewind(3, 0)
    lines.flush()
    assert [row["step"] for row in rows(blocked)] == [1, 2, 3]


# TensorBoard


def tensorboard(folder, step, settings):
    """The sink, open."""
    sink = TensorBoardSink(folder, settings)
    sink.rewind(step, step)
    return sink


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    return reader


def points(reader, tag):
    return [(event.step, pytest.approx(event.value)) for event in reader.Scalars(tag)]


def test_tensorboard_can_read_it(tmp_path):
    board = tensorboard(tmp_path / "runs", 0, {"n_layer": 6, "dropout": 0.2})
    for step in (1, 2):
        board.write(
            train(step, train_loss=3.0 / step, lr=0.1 * step, grad_norm=0.5, tokens_per_s=1000 * step)
        )
    board.write(evaluation(2, val_loss=1.25, val_bits_per_byte=0.75, best=True, sample="To be,\nor not"))
    board.close()
    reader = events(tmp_path / "runs")
    assert points(reader, "loss/train") == [(1, 3.0), (2, 1.5)]
    assert points(reader, "loss/val") == [(2, 1.25)]
    assert points(reader, "bits_per_byte/val") == [(2, 0.75)]
    assert points(reader, "learning_rate") == [(1, 0.1), (2, 0.2)]
    assert points(reader, "gradient_norm") == [(1, 0.5), (2, 0.5)]
    assert points(reader, "tokens_per_s") == [(1, 1000), (2, 2000)]
    texts = {tag: str(reader.Tensors(tag)[0].tensor_proto) for tag in reader.Tags()["tensors"]}
    assert "n_layer" in texts["settings/text_summary"]
    assert "To be," in texts["sample/text_summary"]


def test_tensorboard_shows_the_same_steps_once_after_a_resume(tmp_path):
    killed = tensorboard(tmp_path / "runs", 0, {})
    for step in range(1, 6):
        killed.write(train(step, train_loss=9.0))
    killed.close()
    resumed = tensorboard(tmp_path / "runs", 3, {})
    for step in range(4, 7):
        resumed.write(train(step, train_loss=1.0))
    resumed.close()
    seen = points(events(tmp_path / "runs"), "loss/train")
    assert seen == [(1, 9.0), (2, 9.0), (3, 9.0), (4, 1.0), (5, 1.0), (6, 1.0)]


@pytest.mark.parametrize("good", [0, 3])
def test_tensorboard_shows_no_abandoned_step_after_a_roll_back(tmp_path, good):
    board = tensorboard(tmp_path / "runs", 0, {})
    for step in range(1, 6):
        board.write(train(step, train_loss=9.0))
    board.write(evaluation(5, sample="text"))
    board.rewind(good, 0)
    board.write(train(good + 1, train_loss=1.0))
    board.close()
    reader = events(tmp_path / "runs")
    assert points(reader, "loss/train") == [*((step, 9.0) for step in range(1, good + 1)), (good + 1, 1.0)]
    assert reader.Scalars("loss/val") == []


@pytest.mark.parametrize("method", ["add_scalar", "add_text", "flush", "close"])
def test_tensorboard_that_fails_says_so_once_and_stops(tmp_path, monkeypatch, capsys, method):
    board = tensorboard(tmp_path / "runs", 0, {})
    writer = board.writer
    board.flush()
    assert capsys.readouterr().err == ""

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, method, fail)
        for step in (1, 2, 3):
            board.write(train(step))
            board.write(evaluation(step, sample="text", best=False))
            board.flush()
        board.close()
    assert capsys.readouterr().err.splitlines() == ["TensorBoard stops: [Errno 28] No space left on device"]
    writer.close()


def test_tensorboard_that_cannot_begin_says_so_once_and_stops(tmp_path, capsys):
    (tmp_path / "runs").write_bytes(b"a file where the folder should be")
    board = tensorboard(tmp_path / "runs", 0, {})
    board.write(train(1))
    board.flush()
    board.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("TensorBoard stops: ")


def test_tensorboard_whose_thread_dies_prints_no_traceback(tmp_path, monkeypatch, capsys):
    from tensorboard.summary.writer.record_writer import RecordWriter

    board = tensorboard(tmp_path / "runs", 0, {})
    board.flush()
    hook = threading.excepthook

    def fail(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", fail)
    for step in (1, 2):
        board.write(train(step))
        board.flush()
    board.close()
    assert capsys.readouterr().err.splitlines() == ["TensorBoard stops: [Errno 28] No space left on device"]
    assert threading.excepthook != hook  # given back


# wandb


def test_wandb_that_is_not_installed_is_one_line_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^--log_to wandb .*: pip install nanogpt\[wandb\]$"):
        create_sinks(("jsonl", "wandb"), RunFolder(tmp_path), {})
    assert list(tmp_path.iterdir()) == []


def test_wandb_writes_an_offline_run_below_the_run_folder(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start in (0, 2):  # as if killed, and resumed
        sink = WandbSink(tmp_path / "runs", {"n_layer": 6})
        sink.rewind(start, start)
        sink.write(train(start + 1))
        sink.write(evaluation(start + 2, best=True, sample="<To be>"))
        sink.rewind(start, start)
        sink.write(train(start + 1))
        sink.close()
    assert "wandb stops" not in capsys.readouterr().err
    name = (tmp_path / "runs" / "wandb_id.txt").read_text()
    runs = sorted((tmp_path / "runs" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert all((run / f"run-{name}.wandb").stat().st_size > 0 for run in runs)


def test_wandb_that_fails_says_so_once_and_stops(tmp_path, monkeypatch, capsys):
    class Wandb(ModuleType):
        @staticmethod
        def Settings(**_settings):  # noqa: N802
            return None

        @staticmethod
        def init(**_settings):
            raise OSError("no network")

    monkeypatch.setitem(sys.modules, "wandb", Wandb("wandb"))
    sink = WandbSink(tmp_path / "runs", {})
    sink.rewind(0, 0)
    sink.write(train(1))
    sink.flush()
    sink.close()
    assert capsys.readouterr().err.splitlines() == ["wandb stops: no network"]


# The stream, and the table of sinks


def test_every_sink_gets_every_row():
    class Recorder:
        def __init__(self):
            self.seen = []

        def rewind(self, step, evaluated_at):
            self.seen.append((step, evaluated_at))

        def write(self, row):
            self.seen.append(row)

        def flush(self):
            self.seen.append("flush")

        def close(self):
            self.seen.append("close")

    sinks = [Recorder(), Recorder()]
    stream = Metrics(sinks)
    stream.rewind(3, 2)
    stream.write({"step": 4})
    stream.flush()
    stream.close()
    assert [sink.seen for sink in sinks] == [[(3, 2), {"step": 4}, "flush", "close"]] * 2


def test_the_flag_takes_exactly_the_sinks_that_there_are():
    assert tuple(SINKS) == SINK_NAMES


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ("jsonl",)),
        ({"tensorboard": True}, ("jsonl", "tensorboard")),
        ({"log_to": ("tensorboard",)}, ("jsonl", "tensorboard")),
        ({"log_to": ("wandb", "jsonl", "wandb"), "tensorboard": True}, ("jsonl", "wandb", "tensorboard")),
        ({"log_to": ()}, ("jsonl",)),
    ],
)
def test_metrics_jsonl_is_always_a_sink_and_each_is_one_once(settings, names):
    assert TrainConfig(**settings).sinks == names


def test_a_training_logs_to_what_log_to_names(config):
    fit(replace(config, log_to=("tensorboard",)))
    out = Path(config.out_dir)
    assert [event.step for event in events(out / "runs").Scalars("loss/val")] == [10, 20, 30]
    assert rows(out / "metrics.jsonl")


# The console


@pytest.fixture
def no_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    console.terminal.cache_clear()
    yield
    console.terminal.cache_clear()


@pytest.mark.usefixtures("no_terminal")
def test_plain_lines_where_there_is_no_terminal(capsys):
    sink = ConsoleSink(200)
    sink.write(train(10, train_loss=2.34567, lr=3e-4, tokens_per_s=12345.6, left_s=125.0))
    with sink.evaluating(3) as advance:
        for _ in range(3):
            advance()
    sample = "\nTo be,\n[b]or[/b] not :heart:\n"
    sink.write(evaluation(10, val_loss=2.0, val_bits_per_byte=1.23451, best=True, sample=sample))
    sink.write(evaluation(20, val_loss=2.5, best=False, sample="x"))
    sink.advance(20)
    sink.flush()
    sink.close()
    seen = capsys.readouterr()
    assert seen.err == ""
    assert "\x1b" not in seen.out
    assert "\r" not in seen.out
    assert [line for line in seen.out.split("\n") if line] == [
        "step 10/200  loss 2.3457  lr 3.0e-04  12,346 tok/s  left 2 min 5 s",
        "step 10: validation loss 2.0000, 1.2345 bits a byte  best so far",
        "    To be,",
        "    [b]or[/b] not :heart:",
        "step 20: validation loss 2.5000",
        "    x",
    ]


class Screen:
    """A text file that says it is a terminal."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.fixture
def screen(monkeypatch):
    """What is shown on a terminal 100 columns wide."""
    screen = Screen()
    shown = Console(
        file=screen, force_terminal=True, width=100, highlight=False, soft_wrap=True, legacy_windows=False
    )
    monkeypatch.setattr(console, "terminal", lambda: shown)
    return screen


def plain(screen):
    """The text without the terminal's control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.text)


def test_a_bar_on_a_terminal(screen):
    sink = ConsoleSink(200)
    sink.write(train(10, train_loss=2.34567, left_s=125.0))
    sink.close()
    assert "10/200" in plain(screen)
    assert "loss 2.3457" in plain(screen)
    assert "step 10/200" not in plain(screen)  # the bar says it


@pytest.mark.parametrize("sample", ["[bold]x[/bold] [/]", "I :heart: thee :cat:", "https://a.b/c 1.5"])
def test_generated_text_is_shown_on_a_terminal_as_it_is(screen, sample):
    sink = ConsoleSink(200)
    sink.write(evaluation(10, best=False, sample=sample))
    sink.close()
    assert f"    {sample}\n" in plain(screen)


# The picture


@pytest.mark.parametrize(
    "records",
    [
        [],
        [train(1)],
        [evaluation(1)],
        [{"step": 3, "lr": 1e-3}],
        [train(step, train_loss=3 / step) for step in range(1, 50)] + [evaluation(49)],
    ],
    ids=["empty", "one-point", "one-evaluation", "no-loss", "run"],
)
def test_a_picture_of_any_run(path, tmp_path, records):
    path.touch()
    lines = json_lines(path)
    for record in records:
        lines.write(record)
    plot_losses(path, tmp_path / "loss.png")
    picture = (tmp_path / "loss.png").read_bytes()
    assert picture.startswith(PNG)
    assert picture.rstrip().endswith(b"IEND\xaeB`\x82")
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "metrics.jsonl"]  # noqa: PTH208 - names alone
