"""The dialogue: prompts are continued, commands change settings, nothing but Ctrl-D and /quit ends it."""

import os
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from nanogpt.cli import interactive
from nanogpt.cli.interactive import GREETING, parse_value
from nanogpt.cli.sample import main
from nanogpt.config import GPTConfig
from nanogpt.errors import UserError
from nanogpt.inference.config import SampleConfig
from nanogpt.inference.text import generate_text
from nanogpt.model.gpt import GPT
from nanogpt.storage.files import user_folder
from nanogpt.tokenizer.base import CharTokenizer

CTRL_C, CTRL_D, UP, LEFT, BACKSPACE = "\x03", "\x04", "\x1b[A", "\x1b[D", "\x7f"
TOKENIZER = CharTokenizer.train("abcdefgh/\n")
CONFIG = SampleConfig(num_tokens=12, seed=1, device="cpu", interactive=True)

Talk = Callable[..., str]


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(1)
    return GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=8, dropout=0.0, vocab_size=10)).eval()


@pytest.fixture
def talk(model: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Talk:
    """Type keys; the printed lines are returned without the greeting, mistakes among them."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(interactive, "warn", lambda line: print(f"! {line}"))

    def typed(*lines: str, end: str = CTRL_D, config: SampleConfig = CONFIG) -> str:
        with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
            keys.send_text("".join(f"{line}\r" for line in lines) + end)
            interactive.run(model, TOKENIZER, config)
        return capsys.readouterr().out.removeprefix(f"{GREETING}\n")

    return typed


def text(model: GPT, prompt: str, **settings: object) -> str:
    """As the dialogue prints it."""
    ids = torch.tensor([TOKENIZER.encode(prompt).tolist()])
    values = {"num_tokens": 12, "generator": [torch.Generator().manual_seed(1)]} | settings
    return prompt + "".join(generate_text(model, TOKENIZER, ids, **values)) + "\n"


def test_prompts_are_continued_until_ctrl_d(model: GPT, talk: Talk) -> None:
    assert talk("abc", "", r"d\ne", "//a") == text(model, "abc") + text(model, "d\ne") + text(model, "/a")


def test_commands_change_settings(model: GPT, talk: Talk) -> None:
    assert talk("/temperature 0.5", "/top-k 3", "abc") == (
        "temperature        0.5\ntop_k              3\n" + text(model, "abc", temperature=0.5, top_k=3)
    )
    seeded = [torch.Generator().manual_seed(3)]
    assert talk("/seed 3", "abc") == "seed               3\n" + text(model, "abc", generator=seeded)
    assert talk("/num_tokens 2", "abc").endswith(text(model, "abc", num_tokens=2))
    assert talk("/top_k 3", "/top_k none", "abc").endswith(f"None\n{text(model, 'abc')}")
    assert talk("/logit_bias e=1000 \\n=2", "abc").endswith("abceeeeeeeeeeee\n")


def test_stop_strings(model: GPT, talk: Talk) -> None:
    whole = text(model, "abc")
    stop = next(char for char in whole[7:] if char != "\n")
    assert talk(f'/stop "{stop}" "x\\ny"', "abc").endswith("abc" + whole[3 : whole.index(stop, 3)] + "\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/temperature -1", "/temperature -1.0 is not 0 or a positive number: try 0.8"),
        ("/temperature hot", "/temperature hot is of type str: it must be a number"),
        ("/top_k 0", "/top_k 0 is too small"),
        ("/seed -3", "/seed -3 "),
        ("/num_tokens none", "/num_tokens None is of type NoneType"),
        ("/device cuda", "/device is unknown: use /help, /settings, /quit, /temperature, "),
        ('/stop "ab', '"ab has no closing quotation mark: add it'),
        ("/logit_bias ab=3", "/logit_bias 'ab' is 2 tokens"),
        ("/", "/ is unknown: use /help"),
        ("xyz", "the prompt: character"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(model: GPT, talk: Talk, line: str, message: str) -> None:
    said, _, rest = talk(line, "abc").partition("\n")
    assert said.startswith(f"! {message}")
    assert rest == text(model, "abc")


def test_a_value_that_only_the_model_refuses(model: GPT, talk: Talk) -> None:
    said = talk("/context_overlap 9", "abc", "/context_overlap none", "abc")
    assert "! /context_overlap 9 is more than the context, 8\n" in said
    assert said.endswith(text(model, "abc"))


def test_help_and_settings(talk: Talk) -> None:
    assert talk("/help") == interactive.HELP
    lines = talk("/settings", "/temperature").splitlines()
    assert [line.split()[0] for line in lines] == [*interactive.SETTABLE, "temperature"]
    assert lines[-1] == "temperature        1.0"


def test_quit(talk: Talk) -> None:
    assert talk("/quit", "abc", end="") == ""


def test_ctrl_c_stops_the_text_and_not_the_program(model: GPT, talk: Talk, monkeypatch) -> None:
    printed: list[str] = []

    def interrupted(chunk: str) -> None:
        printed.append(chunk)
        print(chunk, end="")
        if printed[-6:-1] and len(printed) == 6:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(interactive, "print_text", interrupted)
    said = talk("abc", "abc")
    assert signal.getsignal(signal.SIGINT) is before
    whole = text(model, "abc")
    first, second = said[: -len(whole)], said[-len(whole) :]
    assert second == whole
    assert first.endswith("\n")
    assert whole.startswith(first[:-1])
    assert len(first) < len(whole)


def test_ctrl_c_at_the_prompt_empties_the_line(model: GPT, talk: Talk) -> None:
    assert talk(f"abc{CTRL_C}d", end=CTRL_D) == text(model, "d")


def test_out_of_memory_is_one_line(model: GPT, talk: Talk) -> None:
    failures = [RuntimeError("CUDA out of memory. Tried ...")]

    def fail(*_: object) -> None:
        if failures:
            raise failures.pop()

    hook = model.register_forward_pre_hook(fail)
    try:
        said = talk("abc", "abc")
    finally:
        hook.remove()
    assert "! out of memory" in said
    assert said.endswith(text(model, "abc"))


def test_lines_are_edited_and_remembered(model: GPT, talk: Talk, tmp_path: Path) -> None:
    assert talk(f"abd{BACKSPACE}c{LEFT}{LEFT}d") == text(model, "adbc")
    assert talk(UP) == text(model, "adbc")
    path = tmp_path / "state" / "nanogpt" / "history"
    assert "+adbc" in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_without_a_place_for_the_history_there_is_none(model: GPT, talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    assert talk("abc") == text(model, "abc")


def test_the_state_folder_is_the_users(monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # which the specification says to ignore
    monkeypatch.setenv("HOME", "/home/me")
    assert user_folder("state") == Path("/home/me/.local/state/nanogpt")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert user_folder("state") == Path("/state/nanogpt")


def test_it_needs_a_terminal_and_prompt_toolkit(monkeypatch) -> None:
    with pytest.raises(UserError, match="--interactive needs a terminal"):
        main(CONFIG)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(interactive.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: pip install nanogpt\[interactive\]$"):
        main(CONFIG)


@pytest.mark.parametrize(
    ("typed", "value"), [("3", 3), ("0.5", 0.5), ("1e3", 1e3), ("NONE", None), ("x", "x")]
)
def test_values(typed: str, value: object) -> None:
    assert parse_value(typed, float | None) == value
