"""The command line: parse first, import the command after.

Run:    nanogpt train --max_iters 100         (= python train.py --max_iters 100)
The fields of a command's config (config.py) are its flags; tyro makes the parser, here alone.
Order: defaults < --preset < flags; with --resume: the run's own settings < flags.
"""

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

from nanogpt.config import (
    DataConfig,
    InfoConfig,
    PlanConfig,
    PresetsConfig,
    SampleConfig,
    SummaryConfig,
    TrainConfig,
    UserError,
)

EXIT_USER_ERROR, EXIT_INTERRUPT = 2, 130


@dataclass(frozen=True)
class Command:
    """A command: its settings, and where its main(config) is."""

    config: type[Any]
    module: str
    script: str = ""
    """The file in the root folder that runs it too, if there is one."""


COMMANDS = {
    "data": Command(DataConfig, "nanogpt.prepare", "data.py"),
    "data info": Command(InfoConfig, "nanogpt.data_info"),
    "model": Command(SummaryConfig, "nanogpt.summary", "model.py"),
    "plan": Command(PlanConfig, "nanogpt.plan"),
    "train": Command(TrainConfig, "nanogpt.train", "train.py"),
    "sample": Command(SampleConfig, "nanogpt.sample", "sample.py"),
    "presets": Command(PresetsConfig, "nanogpt.show_presets"),
}

IDLE_SPINS = "1000"
"""How long an idle thread of PyTorch's OpenMP spins before it sleeps. With the library's own 300,000 a
training crawls as soon as anything else wants a core (bench/RESULTS.md)."""

SEVERAL = ("--input_file", "--input-file", "--val_file", "--val-file")
"""Flags that take several values, written after one another."""

SWITCHES = {"--compile": "on", "--no_compile": "off", "--no-compile": "off"}
"""Bare forms of a flag with the values auto, on and off."""


def main() -> None:
    """Entry point of the `nanogpt` console script."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(usage())
    elif name in COMMANDS:
        sys.exit(run(name, sys.argv[2:], prog=f"nanogpt {name}"))
    else:
        print(f"nanogpt {name}: no such command: use {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def script(name: str) -> None:
    """Entry point of the command's file in the root folder."""
    sys.exit(run(name, sys.argv[1:], prog=f"python {COMMANDS[name].script}"))


def usage() -> str:
    """The list of commands."""
    lines = ["usage: nanogpt COMMAND [OPTIONS]", ""]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:9} {(command.config.__doc__ or '').strip().splitlines()[0]}")
    return "\n".join([*lines, "", "nanogpt COMMAND --help lists its options."])


def run(name: str, arguments: Sequence[str], prog: str) -> int:
    """Parse the arguments, import the command and run it. Returns the exit code.

    A mistake of the user's ends in one line on standard error; a bug keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that cannot be shown is no reason to end
            stream.reconfigure(errors="replace")
    name, arguments, prog = subcommand(name, arguments, prog)
    try:
        config = parse(COMMANDS[name].config, arguments, prog)
        os.environ.setdefault("GOMP_SPINCOUNT", IDLE_SPINS)
        command = cast(Callable[[Any], int], importlib.import_module(COMMANDS[name].module).main)
        return command(config)
    except UserError as error:
        return complain(str(error))
    except BrokenPipeError:  # the reader of a pipe has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a folder that is a file, a read-only disk, ...
        if error.filename is None:
            raise
        return complain(f"{error.filename}: {error.strerror}")
    except ModuleNotFoundError as error:
        if (error.name or "nanogpt").partition(".")[0] == "nanogpt":
            raise
        return complain(f"{error.name} is not installed: pip install -c constraints.txt -e .")
    except KeyboardInterrupt:
        return EXIT_INTERRUPT


def complain(message: str) -> int:
    """Say what is wrong, in one line, even if several processes made the same mistake.

    Returns the exit code.
    """
    from nanogpt.console import speaks

    if speaks():
        print(f"error: {message}", file=sys.stderr)
    return EXIT_USER_ERROR


def parse(cls: type[Any], arguments: Sequence[str], prog: str) -> Any:
    """The config that the arguments describe. `--help` prints and exits.

    Errors: UserError, in one line, if they cannot be understood.
    """
    import tyro

    arguments = repeat_flags(expand_switches(arguments))
    names = {field.name for field in fields(cls)}
    early = Early()
    if names & {"preset", "resume"}:
        with contextlib.suppress(SystemExit), quiet():
            early, _ = tyro.cli(Early, args=arguments, return_unknown_args=True, add_help=False)
    default = starting_point(cls, early)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                cls,
                args=arguments,
                prog=prog,
                default=default,
                use_underscores=True,
                config=(tyro.conf.UseAppendAction,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{flatten(printed.getvalue())}; see {prog} --help") from None


@dataclass(frozen=True)
class Early:
    """The flags that decide what all the others default to."""

    preset: str | None = None
    resume: bool = False
    out_dir: str = TrainConfig.out_dir


def quiet() -> contextlib.AbstractContextManager[Any]:
    """Hide what is printed on standard error: the full parse reports it."""
    return contextlib.redirect_stderr(io.StringIO())


def starting_point(cls: type[Any], early: Early) -> Any:
    """The config whose values stand where no flag is given."""
    if early.resume:
        from nanogpt.run_folder import RunFolder

        saved = RunFolder(Path(early.out_dir)).saved_config()
        return replace(saved, out_dir=early.out_dir) if saved else cls()
    if early.preset is None:
        return cls()
    from nanogpt import presets

    preset = presets.get(early.preset)
    names = {field.name for field in fields(cls)}
    common = names & {field.name for field in fields(preset)}
    values = {name: getattr(preset, name) for name in common}
    if "vocab_size" in names:
        values["vocab_size"] = presets.PRESETS[early.preset].vocab_size
    return cls(**values)


def expand_switches(arguments: Sequence[str]) -> list[str]:
    """Write bare switches out: --compile as --compile on, --no_compile as --compile off."""
    expanded: list[str] = []
    for argument, following in zip_longest(arguments, arguments[1:]):
        bare = argument in SWITCHES and following not in ("auto", "on", "off")
        expanded += ["--compile", SWITCHES[argument]] if bare else [argument]
    return expanded


def repeat_flags(arguments: Sequence[str]) -> list[str]:
    """Write lists out: --input_file a b as --input_file=a --input_file=b, which takes a bare - too."""
    expanded: list[str] = []
    flag = ""
    for argument, following in zip_longest(arguments, arguments[1:]):
        if argument in SEVERAL and following is not None and is_value(following):
            flag = argument
        elif flag and is_value(argument):
            expanded.append(f"{flag}={argument}")
        else:
            expanded.append(argument)
            flag = ""
    return expanded


def is_value(argument: str) -> bool:
    """Whether an argument is no flag: a bare - is standard input."""
    return argument == "-" or not argument.startswith("-")


def subcommand(name: str, arguments: Sequence[str], prog: str) -> tuple[str, Sequence[str], str]:
    """Take `data info DIR` for what it means: the command "data info" with --data_dir DIR."""
    if name != "data" or arguments[:1] != ["info"]:
        return name, arguments, prog
    rest = arguments[1:]
    bare = bool(rest) and not rest[0].startswith("-")
    return "data info", ["--data_dir", *rest] if bare else rest, f"{prog} info"


def flatten(box: str) -> str:
    """Tyro's framed error message in one line, without its frame and its pointer to --help."""
    words: list[str] = []
    for line in box.splitlines():
        text = line.strip("│ ").strip()
        if text.startswith("For full helptext"):
            break
        if text and not set(text) & set("─╭╰"):
            words.append(text)
    return " ".join(words).rstrip(".") or "the arguments cannot be understood"


if __name__ == "__main__":
    main()
