"""The documentation cannot go stale: every command in it parses, every link leads somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from nanogpt import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SCRIPTS = {command.script: name for name, command in cli.COMMANDS.items()}


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(command, arguments) of every line of a shell block that runs one of ours."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if len(words) > 1 and words[0] in ("python", "nanogpt"):
                name, arguments, _ = cli.subcommand(SCRIPTS.get(words[1], words[1]), words[2:], "")
                if name in cli.COMMANDS:
                    found.append((name, list(arguments)))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(page: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, arguments in commands(page):
        if "--help" not in arguments:
            cli.parse(cli.COMMANDS[name].config, arguments, name)


def test_the_readme_shows_every_command() -> None:
    assert {name for name, _ in commands(ROOT / "README.md")} == {
        "data",
        "data info",
        "plan",
        "train",
        "sample",
        "presets",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target


def test_every_training_flag_is_documented() -> None:
    from dataclasses import fields

    from nanogpt.config import TrainConfig

    text = (ROOT / "docs" / "training.md").read_text("utf-8")
    assert not [field.name for field in fields(TrainConfig) if f"--{field.name}" not in text]


def test_the_readme_maps_every_file() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    files = {path.name for path in (ROOT / "nanogpt").glob("*.py")} - {"__init__.py"}
    assert not [name for name in sorted(files) if f"[`{name}`]" not in text and f"/{name}`]" not in text]
