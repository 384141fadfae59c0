"""The documentation cannot go stale: its commands and its Python run, every link leads somewhere.

Each page's blocks run in their order, in a folder that holds the files which the pages speak of, with a model
and a text small enough. Commands of ours run in this process; torchrun's are parsed; of other programs the
names are known.
"""

import asyncio
import gzip
import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import prepared

import nanogpt.training.fit as fit_module
from nanogpt.cli import main as cli
from nanogpt.cli import plan
from nanogpt.cli.config import EvaluateConfig, InfoConfig, RunsConfig, SweepConfig
from nanogpt.cli.parse import parse
from nanogpt.config import SHAPE_FIELDS, TrainConfig
from nanogpt.errors import UserError
from nanogpt.export.config import ExportConfig
from nanogpt.inference.config import SampleConfig
from nanogpt.presets import PRESETS
from nanogpt.server import run as server_run
from nanogpt.server.config import ServeConfig
from nanogpt.sweep import runner
from nanogpt.sweep.grid import Trial
from nanogpt.text import tiny_shakespeare

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SCRIPTS = {command.script: name for name, command in cli.COMMANDS.items()}

OTHERS = {
    ".venv/bin/pre-commit", "basedpyright", "cat", "cd", "curl", "dpkg", "export", "git", "iconv", "make",
    "npm", "pacman", "pip", "python3", "rocm-smi", "ruff", "source", "tensorboard",
}  # fmt: skip
"""Programs that the pages name and the tests do not run."""

SMALL = TrainConfig(
    n_layer=1, n_head=2, n_embd=8, block_size=16, batch_size=8, max_iters=2, eval_interval=1, eval_iters=1,
    dtype="float32", compile="off", device="cpu",
)  # fmt: skip

SHRUNK = (
    "n_layer", "n_head", "n_kv_head", "n_embd", "mlp_width", "ngram_vocab", "block_size", "batch_size",
    "gradient_accumulation_steps", "max_iters", "eval_interval", "eval_iters", "dtype", "compile",
)  # fmt: skip
"""What a page's training is made small in. The rest is as the page says."""

EVERY = "".join(map(chr, range(32, 127)))


class Block(NamedTuple):
    """A piece of code in a page. line: that of its first line."""

    language: str
    line: int
    code: str


class Call(NamedTuple):
    """A command of ours, as it stands in a page."""

    name: str
    arguments: list[str]
    runs: bool
    """Whether one process can run it here: not with torchrun, nor on a device that is named."""
    stdin: str
    """The compressed file that is piped into it."""


def blocks(text: str) -> Iterator[Block]:
    """The code of a page, in its order."""
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield Block(found[1], text[: found.start(2)].count("\n") + 1, found[2])


def calls(block: Block) -> Iterator[Call]:
    """What a shell block runs of ours. Any other program must be known."""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        stdin = ""
        if words[:1] == ["zcat"]:
            stdin, words = words[1], words[words.index("|") + 1 :]
        if not words or words[0] in OTHERS or words[:2] in (["python", "-m"], ["nanogpt", "COMMAND"]):
            continue
        if words[:2] == ["python", "-c"]:
            compile(words[2], "-c", "exec")
            continue
        torchrun = words[0] == "torchrun"
        if torchrun:
            words = ["python", *words[words.index("train.py") :]]
        assert words[0] in ("python", "nanogpt"), f"{words[0]} is not known: see OTHERS"
        name, arguments, _ = cli.subcommand(SCRIPTS.get(words[1], words[1]), words[2:], "")
        assert name in cli.COMMANDS, line
        named = "--device" in arguments and arguments[arguments.index("--device") + 1] != "cpu"
        yield Call(name, list(arguments), not (torchrun or named), stdin)


def commands(page: Path) -> list[Call]:
    """Every command of ours in a page."""
    found = [block for block in blocks(page.read_text("utf-8")) if block.language == "bash"]
    return [call for block in found for call in calls(block)]


def random_text(size: int) -> str:
    """Words of random letters, enough of them for any vocabulary."""
    letters = np.random.default_rng(1).integers(97, 123, size).astype(np.uint8)
    return " ".join(bytes(word).decode() for word in letters.reshape(-1, 8))


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the pages speak of: texts, data folders, runs that can be resumed."""
    folder = tmp_path_factory.mktemp("shelf")
    torch.set_num_threads(1)
    text = (f"First Citizen:\nBefore we proceed any further, hear me speak. {EVERY}\n" * 30) + EVERY
    for name in (
        "my_corpus.txt",
        "novel.txt",
        "scene.txt",
        "old.txt",
        "letters/one.txt",
        "notes/two.md",
        "data/input.txt",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    records = [{"prompt": "First"}, {"prompt": "JULIET:", "id": "second", "num_tokens": 20, "stop": "\n\n"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "page.html").write_text(f"<p>{random_text(800)}")
    (folder / "mail.mbox").write_text(f"From a\nFrom: a@b.c\nSubject: s\n\n{random_text(800)}\n")
    (folder / "WhatsApp Chat with Ben.txt").write_text(f"1/2/24, 10:00 - Ben: {random_text(800)}\n")
    (folder / "books").mkdir()
    (folder / "books" / "one.txt").write_text(random_text(80_000))
    record = json.dumps({"text": "Well.", "review": {"body": random_text(80_000)}}) + "\n"
    for name, content in {"reviews.jsonl": record, "dump.jsonl": record, "dump.txt": text}.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    for name in ("data", "my_data", "library"):
        prepared(folder / name, text)
    for name in ("out", "my_model", "out/previous/1"):
        config = replace(SMALL, data_dir=str(folder / "data"), out_dir=str(folder / name), max_iters=4)
        fit_module.fit(config, keep_going=lambda step, loss: step < 2)
    return folder


@pytest.fixture
def reader(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in a copy of that folder; trainings are small, and the small text is Tiny Shakespeare."""
    folder = shutil.copytree(shelf, tmp_path / "shelf")
    monkeypatch.chdir(folder)
    digest = tiny_shakespeare.sha256((folder / "data" / "input.txt").read_bytes())
    monkeypatch.setattr(tiny_shakespeare, "SHAKESPEARE_SHA256", digest)
    fit, plan_main = fit_module.fit, plan.main

    def small(config: TrainConfig) -> TrainConfig:
        if config.resume:
            return replace(config, max_iters=4, data_dir="data", compile="off")
        names = set(SHRUNK) - set(SHAPE_FIELDS if config.init_from else ())
        shrunk = {name: getattr(SMALL, name) for name in names}
        return replace(config, **shrunk, minutes=config.minutes and 0.03)

    monkeypatch.setattr(fit_module, "fit", lambda config, *rest, **named: fit(small(config), *rest, **named))

    def run_all(todo: list[Trial], jobs: int, stop: object) -> list[Trial]:
        for trial in todo:  # one after the other, in this process, starts faster
            fit(small(trial.config), quiet=True)
        return []

    monkeypatch.setattr(runner, "run_all", run_all)
    monkeypatch.setattr(plan, "main", lambda config: plan_main(small(config)))
    monkeypatch.setattr(server_run, "serve", lambda config: asyncio.run(start_and_stop(config)))


async def start_and_stop(config: ServeConfig) -> None:
    """What `nanogpt serve` does before its first request."""
    served = server_run.load(config, asyncio.get_running_loop())
    server_run.create_app(server_run.Service(config, served))
    served.engine.close("over")
    served.engine.thread.join()


def run_page(text: str) -> None:
    """Run the blocks of a page: shell commands, and Python that goes on from block to block."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(text):
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, "the page", "exec"), names)
        elif block.language == "bash":
            for call in calls(block):
                run_call(call)


def run_call(call: Call) -> None:
    """Run a command, or parse it if it cannot run here. It must end well."""
    if "--help" in call.arguments:
        return
    if not call.runs:
        parse(cli.COMMANDS[call.name].config, call.arguments, call.name)
        return
    with pytest.MonkeyPatch.context() as patch:
        if call.stdin:
            content = gzip.decompress(Path(call.stdin).read_bytes())
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        if call.name == "data":  # the files lie there from another page
            call.arguments.append("--overwrite")
        code = cli.run_command(call.name, call.arguments, call.name)
    assert code == 0, f"{call.name} {shlex.join(call.arguments)}: exit code {code}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page: Path, reader: None) -> None:
    run_page(page.read_text("utf-8"))


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ("```bash\npython train.py --max_iter 3\n```", AssertionError),
        ("```bash\npython train.py --data_dir nowhere\n```", AssertionError),
        ("```bash\nnanogpt trian\n```", AssertionError),
        ("```bash\nwget example.org\n```", AssertionError),
        ("```bash\ntorchrun --nproc_per_node=2 train.py --max_iter 3\n```", UserError),
        ("```python\nfrom nanogpt.data import load_data\n```", ImportError),
        ("```bash\npython -c 'import torch; print('\n```", SyntaxError),
    ],
    ids=["flag", "folder", "command", "program", "torchrun", "python", "syntax"],
)
def test_a_block_that_does_not_run_is_found(block: str, error: type[Exception], reader: None) -> None:
    with pytest.raises(error):
        run_page(block)


def test_the_readme_shows_every_command() -> None:
    assert {call.name for call in commands(ROOT / "README.md")} == {
        "data",
        "data info",
        "plan",
        "eval",
        "train",
        "sample",
        "export",
        "serve",
        "info",
        "presets",
        "sweep",
        "runs",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target


def test_every_training_flag_is_documented() -> None:
    text = (ROOT / "docs" / "training.md").read_text("utf-8")
    assert not [field.name for field in fields(TrainConfig) if f"--{field.name}" not in text]


def test_every_sampling_flag_is_documented() -> None:
    text = (ROOT / "docs" / "sampling.md").read_text("utf-8")
    assert not [field.name for field in fields(SampleConfig) if f"| `--{field.name}` |" not in text]


def test_every_evaluation_flag_is_documented() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    assert not [field.name for field in fields(EvaluateConfig) if f"| `--{field.name}` |" not in text]


def test_every_export_flag_is_documented() -> None:
    text = (ROOT / "docs" / "export.md").read_text("utf-8")
    assert not [field.name for field in fields(ExportConfig) if f"| `--{field.name}` |" not in text]


def test_every_flag_of_the_server_is_documented() -> None:
    text = (ROOT / "docs" / "server.md").read_text("utf-8")
    assert not [field.name for field in fields(ServeConfig) if f"`--{field.name}`" not in text]


def test_every_flag_of_info_is_documented() -> None:
    text = (ROOT / "docs" / "info.md").read_text("utf-8")
    flags = {field.name for field in fields(InfoConfig)} - {"path"}  # given without a flag
    assert not [name for name in flags if f"| `--{name}` |" not in text]
    assert "| `PATH` |" in text


def test_every_flag_of_sweeps_is_documented() -> None:
    text = (ROOT / "docs" / "sweep.md").read_text("utf-8")
    own = {field.name for field in fields(SweepConfig)} - {field.name for field in fields(TrainConfig)}
    flags = {field.name for field in fields(RunsConfig)} - {"path"}  # given without a flag
    assert not [name for name in own | flags if f"| `--{name}` |" not in text]


def test_every_preset_is_documented() -> None:
    text = (ROOT / "docs" / "training.md").read_text("utf-8")
    assert not [name for name in PRESETS if f"| `{name}` |" not in text]


def test_the_readme_has_the_measurements_of_the_presets() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    rows = [tuple(row) for row in re.findall(r"^\| `(\w+)` \| ([\d.]+) \| (\d+ \w+) \|$", text, re.MULTILINE)]
    measured = [(name, preset.measured) for name, preset in PRESETS.items() if preset.measured]
    assert rows == [(name, found.loss, found.time) for name, found in measured]


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.measured])
def test_a_measurement_is_that_of_the_results(name: str) -> None:
    measured = PRESETS[name].measured
    assert measured
    results = (ROOT / "bench" / "RESULTS.md").read_text("utf-8")
    section = results.split(f"\n## {measured.date} · ", 1)[1].split("\n## ", 1)[0]
    assert name in section
    for loss in measured.losses:
        assert f"{loss:.4f}" in section
    assert re.search(rf"\b{measured.seconds:g}\b|\b{measured.seconds / 60:g} minutes", section)


def test_the_map_of_the_code_or_the_page_of_a_feature_has_every_file() -> None:
    text = "".join(page.read_text("utf-8") for page in (ROOT / "docs").glob("*.md"))
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nanogpt").rglob("*.py")}
    assert not [name for name in sorted(files) if f"(../{name})" not in text and "__init__" not in name]
