"""`sample --interactive`: a dialogue, in which typed prompts are continued and commands change settings.

Run:    python sample.py --interactive
Lines can be edited and have a history (prompt_toolkit, an extra). Ctrl-C stops a text, Ctrl-D ends the
program. Each prompt begins a new text.
"""

import importlib.util
import os
import secrets
import shlex
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, get_origin

from nanogpt.cli.prompts import print_text
from nanogpt.errors import UserError, require
from nanogpt.inference.config import SampleConfig, SamplingParams
from nanogpt.inference.prompts import device_of, encode_prompt, generators_for
from nanogpt.inference.speculation import NgramGuesses
from nanogpt.inference.text import generate_text, resolve_logit_bias
from nanogpt.machine.device import is_out_of_memory
from nanogpt.model.gpt import GPT
from nanogpt.settings import field_types, show_value, unescape
from nanogpt.storage.files import user_folder
from nanogpt.terminal.console import warn
from nanogpt.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from prompt_toolkit.history import History

SETTABLE = (*(field.name for field in fields(SamplingParams)), "num_tokens", "seed", "stop")
"""Settings that commands can change: /temperature 0.7."""

GREETING = "Type a prompt, /help for the commands. Ctrl-C stops a text, Ctrl-D ends."

HELP = f"""\
TEXT             continue the text; \\n is a line break, \\t a tab; if it begins with /, type two
/NAME VALUE      change a setting: /temperature 0.7   /top_k none   /stop "\\n\\n" "JULIET:"
/NAME            show it
/settings        show all of them: {", ".join(SETTABLE)}
/help /quit
"""


class Dialogue:
    """The state between two lines: the model and the current settings."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, config: SampleConfig, guesses: NgramGuesses | None
    ) -> None:
        self.model, self.tokenizer, self.config, self.guesses = model, tokenizer, config, guesses
        self.commands: dict[str, Callable[[], None]] = {
            "help": lambda: print_text(HELP),
            "settings": lambda: self.show(*SETTABLE),
            "quit": quit_dialogue,
        }

    def answer(self, line: str) -> None:
        """Run a command or continue a prompt. Mistakes are reported in one line.

        Raises: EOFError for /quit.
        """
        try:
            if line.startswith("/") and not line.startswith("//"):
                self.run_command(line[1:])
            elif line:
                self.complete(unescape(line.removeprefix("/")))
        except UserError as error:
            message = str(error)
            warn(f"/{message[2:]}" if message.startswith("--") else message)
        except KeyboardInterrupt:
            print_text("\n")
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            warn("out of memory: set a smaller /num_tokens, or end other programs that use the memory")

    def run_command(self, command: str) -> None:
        """Run a command, or show or change a setting. Raises: UserError."""
        name, _, value = command.partition(" ")
        name, value = name.replace("-", "_"), value.strip()
        if name in self.commands:
            self.commands[name]()
            return
        known = ", ".join(f"/{each}" for each in (*self.commands, *SETTABLE))
        require(name in SETTABLE, f"/{name} is unknown: use {known}")
        if value:
            changed = replace(self.config, **{name: parse_value(value, field_types(SampleConfig)[name])})
            self.config = resolve_logit_bias(changed, self.tokenizer)
        self.show(name)

    def show(self, *names: str) -> None:
        """Print settings."""
        for name in names:
            print_text(f"{name:18} {show_value(getattr(self.config, name))}\n")

    def complete(self, prompt: str) -> None:
        """Continue a prompt, and print it with its text while that is generated."""
        config = self.config
        ids = encode_prompt(self.tokenizer, prompt, skip_unknown=config.unknown == "skip", flag="the prompt")
        seed = secrets.randbits(32) if config.seed is None else config.seed
        text = generate_text(
            self.model,
            self.tokenizer,
            ids.to(device_of(self.model)),
            config,
            num_tokens=config.num_tokens,
            stop=config.stop,
            generator=generators_for(self.model, [seed]),
            guesses=self.guesses,
        )
        print_text(prompt)
        for chunk in text:
            print_text(chunk)
        print_text("\n")


def check() -> None:
    """Raise UserError unless there is a terminal and prompt_toolkit."""
    require(
        sys.stdin.isatty() and sys.stdout.isatty(),
        "--interactive needs a terminal: give --prompt or --prompts_file instead",
    )
    require(
        importlib.util.find_spec("prompt_toolkit") is not None,
        "--interactive needs the package prompt_toolkit, which is not installed: "
        "pip install nanogpt[interactive]",
    )


def run(model: GPT, tokenizer: Tokenizer, config: SampleConfig, guesses: NgramGuesses | None = None) -> None:
    """Answer line after line until Ctrl-D or /quit."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    dialogue = Dialogue(model, tokenizer, config, guesses)
    commands = [f"/{name}" for name in (*dialogue.commands, *SETTABLE)]
    completer = WordCompleter(commands, sentence=True)
    session: PromptSession[str] = PromptSession(
        "> ", history=open_history(), completer=completer, complete_while_typing=False
    )
    print_text(f"{GREETING}\n")
    with interruptible(), suppress(EOFError):
        while True:
            with suppress(KeyboardInterrupt):
                dialogue.answer(session.prompt())


def quit_dialogue() -> None:
    """End the dialogue, as Ctrl-D does."""
    raise EOFError


def parse_value(text: str, kind: Any) -> Any:
    """The value of a setting of type `kind` from its text. Raises: UserError for an open quotation mark."""
    if get_origin(kind) is tuple:
        return () if text.lower() == "none" else tuple(map(unescape, split_quoted(text)))
    if text.lower() == "none":
        return None
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    return text


def split_quoted(text: str) -> list[str]:
    """Split at spaces outside quotation marks. Backslashes stay."""
    words = shlex.shlex(text, posix=True)
    words.whitespace_split, words.escape, words.commenters = True, "", ""
    try:
        return list(words)
    except ValueError as error:
        raise UserError(f"{text} has no closing quotation mark: add it") from error


@contextmanager
def interruptible() -> Generator[None]:
    """Let every Ctrl-C in the block raise KeyboardInterrupt; as usual, a second one ends the process."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


# --- history ---


def open_history() -> "History":
    """The history of typed lines: a file that only its owner reads, or memory if none can be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = user_folder("state") / "history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)
