"""`nanogpt export` refuses what it cannot do in a line, replaces nothing unasked, and leaves nothing half."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from exported import QWEN3, REFUSED, saved

from nanogpt.cli.export import main
from nanogpt.cli.main import run_command
from nanogpt.config import TrainConfig
from nanogpt.errors import UserError
from nanogpt.export import registry
from nanogpt.export.config import ExportConfig, ExportDtype, FormatName
from nanogpt.export.registry import FORMATS
from nanogpt.model.gpt import ACTIVATIONS
from nanogpt.native import step
from nanogpt.native.build import BuildError
from nanogpt.storage import files
from nanogpt.training.fit import fit

for package in ("gguf", "onnx", "safetensors"):
    pytest.importorskip(package)

NAMES = {name: f"model{row.suffix}" for name, row in FORMATS.items()}
"""Format -> a good name for its output."""
each_format = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., ExportConfig]:
    """What makes a config for a small checkpoint."""
    path = saved(tmp_path / "ckpt.pt")

    def make(name: str, **settings: Any) -> ExportConfig:
        defaults = {"checkpoint": str(path), "output": str(tmp_path / NAMES[name])}
        return ExportConfig(format=name, **defaults | settings)  # pyright: ignore[reportArgumentType]

    return make


def left(folder: Path) -> list[str]:
    """The names in a folder but for the checkpoint's."""
    return sorted(path.name for path in folder.iterdir() if path.name != "ckpt.pt")


def content(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of every file in a folder."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


def test_the_formats_and_dtypes_are_those_of_the_flags() -> None:
    assert set(FORMATS) == set(get_args(FormatName))
    assert {dtype for row in FORMATS.values() for dtype in row.dtypes} == set(get_args(ExportDtype))


@each_format
def test_an_export_is_said_and_the_same_each_time(name: str, config, tmp_path: Path, capsys) -> None:
    assert main(config(name)) == 0
    assert f"parameters in {FORMATS[name].dtypes[0]}, format {name}" in capsys.readouterr().out
    (tmp_path / "other").touch()
    written = [
        path for path in (tmp_path / NAMES[name], *(tmp_path / NAMES[name]).rglob("*")) if path.is_file()
    ]
    assert {path.stat().st_mode for path in written} == {(tmp_path / "other").stat().st_mode}
    (tmp_path / "other").unlink()
    first = content(tmp_path / NAMES[name])
    main(config(name, overwrite=True))
    assert content(tmp_path / NAMES[name]) == first
    assert left(tmp_path) == [NAMES[name]]


@pytest.mark.parametrize("name", ["hf", "gguf"])
@pytest.mark.parametrize("misfits", REFUSED)
def test_what_a_format_cannot_carry_is_named(name: str, misfits: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "ckpt.pt", **REFUSED[misfits])
    with pytest.raises(UserError) as raised:
        main(ExportConfig(checkpoint=str(path), format=name, output=str(tmp_path / NAMES[name])))  # type: ignore[arg-type]
    able = "onnx, safetensors or html"
    assert str(raised.value) == f"--format {name} cannot carry {misfits}: use --format {able}"
    assert left(tmp_path) == []


@pytest.mark.skipif(isinstance(step.library(), BuildError), reason=str(step.library()))
@pytest.mark.parametrize("name", ["hf", "gguf", "onnx", "html"])
def test_a_changed_code_of_the_model_is_not_exported_as_the_original(name, tmp_path, monkeypatch) -> None:
    path, output = saved(tmp_path / "ckpt.pt"), tmp_path / NAMES[name]
    monkeypatch.setitem(ACTIVATIONS, "gelu", ACTIVATIONS["gelu_tanh"])
    refused = rf"--format {name} cannot carry the changed code of nanogpt/model: use --format safetensors$"
    with pytest.raises(UserError, match=refused):
        main(ExportConfig(checkpoint=str(path), format=name, output=str(output)))
    assert left(tmp_path) == []


@each_format
def test_nothing_but_an_earlier_export_is_replaced(name: str, config, tmp_path: Path) -> None:
    output = tmp_path / NAMES[name]
    for content_of_theirs in (b"", b"precious", (tmp_path / "ckpt.pt").read_bytes()):
        output.write_bytes(content_of_theirs)
        with pytest.raises(UserError, match="exists already: give another name, or --overwrite"):
            main(config(name))
        with pytest.raises(
            UserError, match=r"is not (a folder|an earlier export in this format): give another"
        ):
            main(config(name, overwrite=True))
        assert output.read_bytes() == content_of_theirs
    output.unlink()
    output.mkdir()
    (output / "letters.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"exists already|not of an export \(letters.txt\)|is not a file"):
            main(config(name, overwrite=overwrite))
    assert content(output) == {"letters.txt": b"precious"}
    known = FORMATS[name].files[-1] if FORMATS[name].files else "README.md"
    (output / "letters.txt").rename(output / known)
    with pytest.raises(UserError, match=r"exists already|not an earlier export|is not a file"):
        main(config(name, overwrite=True))
    assert content(output) == {known: b"precious"}


@each_format
def test_files_beside_the_output_stay(name: str, config, tmp_path: Path) -> None:
    for suffix in (".part", ".replaced"):
        (tmp_path / f"{NAMES[name]}{suffix}").mkdir()
        (tmp_path / f"{NAMES[name]}{suffix}" / "thesis.txt").write_text("precious")
    main(config(name))
    main(config(name, overwrite=True))
    for suffix in (".part", ".replaced"):
        assert content(tmp_path / f"{NAMES[name]}{suffix}") == {"thesis.txt": b"precious"}


@pytest.mark.skipif(sys.platform != "linux", reason="names that are not text")
@each_format
def test_a_name_that_is_no_text_is_no_mistake(name: str, config, tmp_path: Path) -> None:
    assert main(config(name, output=str(tmp_path / f"a\udcff\n{NAMES[name]}"))) == 0


@pytest.mark.parametrize("row", ['"step": 1e999', '"step": 12.5', '"val_bits_per_byte": "x", "step": 12'])
def test_odd_metrics_are_no_mistake(row: str, config, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"val_loss": 2.5, {row}}}\n')
    assert main(config("hf")) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": ""}, "--output is missing: give the file or folder to write"),
        ({"output": "/"}, "--output / has no name"),
        (
            {"output": "model.gguf"},
            "--output model.gguf is named as a file of another format: give --format gguf",
        ),
        ({"dtype": "q8_0"}, "--format hf has no --dtype q8_0: use f32, f16 or bf16"),
        ({"checkpoint": "nowhere.pt"}, "checkpoint nowhere.pt does not exist"),
        ({"output": "/dev/null/model"}, "cannot write /dev/null/model"),
    ],
    ids=["missing", "root", "suffix", "dtype", "checkpoint", "device"],
)
def test_a_mistake_ends_in_a_line(settings: dict[str, str], message: str, config) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        main(config("hf", **settings))
    assert "\n" not in str(raised.value)


def test_a_package_that_is_missing_is_named(config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"--format gguf needs the package gguf, .*: pip install nanogpt\[export\]"
    ):
        main(config("gguf"))


def test_an_unknown_format_is_refused_in_a_line_that_lists_the_known_ones(capsys) -> None:
    assert run_command("export", ["--format", "pickle", "--output", "x"], "nanogpt export") == 2
    assert "hf" in capsys.readouterr().err


@contextmanager
def disk_of(size: int) -> Generator[None]:
    """Let no file grow beyond `size` bytes: writing fails as it does on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@each_format
@pytest.mark.parametrize("size", [100, 100_000])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "replaced"])
def test_a_full_disk_leaves_what_was_there(
    name: str, size: int, existing: bool, config, tmp_path: Path
) -> None:
    before = {}
    if existing:
        main(config(name))
        before = content(tmp_path / NAMES[name])
    with disk_of(size), pytest.raises(UserError, match="cannot write ") as raised:
        main(config(name, overwrite=existing))
    assert "\n" not in str(raised.value)
    assert left(tmp_path) == ([NAMES[name]] if existing else [])
    assert not existing or content(tmp_path / NAMES[name]) == before


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    "place",
    [
        "hf.write_json",
        "hf.model_card",
        "gguf.describe",
        "gguf.pieces",
        "onnx.write_json",
        "safetensors.metadata",
        "safetensors.write_tensors",
        "html.describe",
        "html.assemble",
    ],
)
def test_a_kill_leaves_what_was_there_and_the_next_export_is_whole(
    place: str, config, tmp_path: Path
) -> None:
    name = place.partition(".")[0]
    main(config(name))
    whole = content(tmp_path / NAMES[name])
    code = (
        f"import os, nanogpt.export.registry; from nanogpt.cli.main import main\n"
        f"nanogpt.export.{place} = lambda *rest: os.kill(os.getpid(), 9)\nmain()"
    )
    arguments = ["--checkpoint", str(tmp_path / "ckpt.pt"), "--format", name, "--output"]
    for output in (tmp_path / NAMES[name], tmp_path / f"new{FORMATS[name].suffix}"):
        command = [sys.executable, "-c", code, "export", *arguments, str(output), "--overwrite"]
        done = subprocess.run(command, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert not output.exists()
    assert content(tmp_path / NAMES[name]) == whole
    main(config(name, overwrite=True))
    main(config(name, output=str(output)))
    assert left(tmp_path) == sorted([NAMES[name], output.name])
    assert content(tmp_path / NAMES[name]) == whole


def test_a_kill_between_two_renames_loses_no_export(config, tmp_path: Path) -> None:
    main(config("hf"))
    whole = content(tmp_path / "model")
    code = (
        "import os; from nanogpt.storage import files; from nanogpt.cli.main import main\n"
        "rename, kill = files.rename, lambda *rest: os.kill(os.getpid(), 9)\n"
        "files.rename = lambda old, new: (kill if old.suffix == '.part' else rename)(old, new)\n"
        "main()"
    )
    arguments = ["--checkpoint", config("hf").checkpoint, "--output", str(tmp_path / "model"), "--overwrite"]
    done = subprocess.run(
        [sys.executable, "-c", code, "export", *arguments], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert left(tmp_path) == [".model.part", ".model.replaced"]
    assert content(tmp_path / ".model.part") == content(tmp_path / ".model.replaced") == whole
    main(config("hf"))
    assert left(tmp_path) == ["model"]
    assert content(tmp_path / "model") == whole


def test_an_interrupt_between_two_renames_brings_the_old_export_back(
    config, tmp_path: Path, monkeypatch
) -> None:
    main(config("hf"))
    whole, rename = content(tmp_path / "model"), files.rename

    def interrupted(old: Path, new: Path) -> None:
        if old.suffix == ".part":
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr(files, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(config("hf", overwrite=True, dtype="f16"))
    assert left(tmp_path) == ["model"]
    assert content(tmp_path / "model") == whole


def test_the_card_has_the_curve_and_the_data_of_a_real_run(config, tmp_path: Path, request) -> None:
    run: TrainConfig = replace(request.getfixturevalue("run"), out_dir=str(tmp_path / "run"))
    result = fit(run)
    main(config("hf", checkpoint=str(tmp_path / "run")))
    card = (tmp_path / "model" / "README.md").read_text("utf-8")
    assert f"{result.best_val_loss:.4f} nats per token." in card
    assert len(re.findall(r"^\| \d+ \| [\d.]+ \| [\d.]+ \|$", card, re.MULTILINE)) == 3
    assert "- Training split: " in card
    assert " epochs" in card
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"val_loss": ', '"val_loss": 1'))
    main(config("hf", checkpoint=str(tmp_path / "run"), overwrite=True))
    assert "| step |" not in (tmp_path / "model" / "README.md").read_text("utf-8")


@pytest.fixture
def run(tmp_path: Path, text: str) -> TrainConfig:
    """A tiny run on a prepared folder."""
    from conftest import TINY, prepared

    prepared(tmp_path / "data", text)
    return TrainConfig(**TINY | QWEN3 | {"n_kv_head": 1}, data_dir=str(tmp_path / "data"))
