"""The command line: parse first, import the command after.

Run:    nanogpt train --max_iters 100         (= python train.py --max_iters 100)
The fields of a command's config (config.py, data/config.py) are its flags; tyro makes the parser, here alone.
Order: defaults < --preset < flags; with --resume: the run's own settings < flags.
"""

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

from nanogpt import __version__, streams
from nanogpt.config import PlanConfig, PresetsConfig, SampleConfig, SummaryConfig, TrainConfig
from nanogpt.data.config import InspectConfig, PrepareConfig
from nanogpt.errors import UserError
from nanogpt.training import stopping

EXIT_USER_ERROR, EXIT_INTERRUPT = 2, 130


@dataclass(frozen=True)
class Command:
    """A command: its settings, and where its main(config) is."""

    config: type[Any]
    module: str
    script: str = ""
    """The file in the root folder that runs it too, if there is one."""
    writes: bool = False
    """Whether it is for the files that it writes, and what it prints may be lost; else for what it prints."""


COMMANDS = {
    "data": Command(PrepareConfig, "nanogpt.data.prepare", "data.py", writes=True),
    "data info": Command(InspectConfig, "nanogpt.data.inspect"),
    "model": Command(SummaryConfig, "nanogpt.cli.info", "model.py"),
    "plan": Command(PlanConfig, "nanogpt.cli.plan"),
    "train": Command(TrainConfig, "nanogpt.training.fit", "train.py", writes=True),
    "sample": Command(SampleConfig, "nanogpt.cli.sample", "sample.py"),
    "presets": Command(PresetsConfig, "nanogpt.cli.presets"),
}

IDLE_SPINS = "1000"
"""How long an idle thread of PyTorch's OpenMP spins before it sleeps. With the library's own 300,000 a
training crawls as soon as anything else wants a core (bench/RESULTS.md)."""

ALLOCATOR_VARIABLES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}
"""Settings of PyTorch's memory allocator on GPUs, by their names of today and before."""

SEVERAL = ("--input_file", "--input-file", "--val_file", "--val-file", "--log_to", "--log-to")
"""Flags that take several values, written after one another."""

SWITCHES = {"--compile": "on", "--no_compile": "off", "--no-compile": "off"}
"""Bare forms of a flag with the values auto, on and off."""


def main() -> None:
    """Entry point of the `nanogpt` console script, and of `python -m nanogpt`."""
    begin()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.exit(run(name, sys.argv[2:], prog=f"nanogpt {name}"))
    code = guarded(lambda: overview(name))
    if code:
        sys.exit(code)


def script(name: str) -> None:
    """Entry point of the command's file in the root folder."""
    begin()
    sys.exit(run(name, sys.argv[1:], prog=f"python {COMMANDS[name].script}"))


def begin() -> None:
    """Make the process one that nothing ends with a traceback: neither a broken stream nor a signal."""
    streams.protect_standard_streams()
    stopping.exit_quietly_on_signals()


def overview(name: str) -> int:
    """What is said without a command. Errors: UserError for one that does not exist."""
    if name not in ("-h", "--help", "--version"):
        raise UserError(f"nanogpt {name}: no such command: use {', '.join(COMMANDS)}")
    print(f"nanogpt {__version__}" if name == "--version" else usage())
    return 0


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
    return guarded(lambda: execute(*subcommand(name, arguments, prog)))


def execute(name: str, arguments: Sequence[str], prog: str) -> int:
    """Parse the arguments, import the command and run it. Returns the exit code."""
    command = COMMANDS[name]
    config = parse(command.config, arguments, prog)
    streams.raise_stdout_errors(on=not command.writes)
    prepare_environment()
    with imports_explained():
        module = importlib.import_module(command.module)
    return cast(Callable[[Any], int], module.main)(config)


def prepare_environment() -> None:
    """Set the variables that PyTorch reads when it is imported, except those that the user has set.

    Threads: the cores that this process may use. PyTorch asks for the affinity but not for the quota of a
    container. (On Windows and macOS it counts right by itself.)
    """
    os.environ.setdefault("GOMP_SPINCOUNT", IDLE_SPINS)
    if sys.platform != "linux":
        return
    from nanogpt.cores import usable_cores

    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    os.environ.setdefault("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL", "1")  # fused attention on more cards
    torch = torch_version()
    if not ALLOCATOR_VARIABLES & os.environ.keys() and "rocm" not in torch:
        renamed = not torch.startswith(("2.7.", "2.8."))  # since then the old name warns
        name = "PYTORCH_ALLOC_CONF" if renamed else "PYTORCH_CUDA_ALLOC_CONF"
        os.environ[name] = "expandable_segments:True"  # evaluation and training share memory of other sizes


def torch_version() -> str:
    """The version of the installed PyTorch, found without importing it; "" if there is none."""
    with contextlib.suppress(PackageNotFoundError):
        return version("torch")
    return ""


def guarded(action: Callable[[], int]) -> int:
    """The exit code of a command; what the user can mend, and Ctrl-C, are said without a traceback."""
    streams.raise_stdout_errors(on=True)
    try:
        try:
            return action()
        finally:
            close_bars()
            streams.flush()
    except UserError as error:
        return complain(str(error))
    except OSError as error:  # a folder that is a file, a read-only disk, ...
        if error.filename is None:
            raise
        return complain(f"{error.filename}: {error.strerror}")
    except ModuleNotFoundError as error:
        if (error.name or "nanogpt").partition(".")[0] == "nanogpt":
            raise
        return complain(f"{error.name} is not installed: pip install -c constraints.txt -e .")
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # behind the ^C
        return EXIT_INTERRUPT
    finally:
        streams.raise_stdout_errors(on=False)


@contextmanager
def imports_explained() -> Generator[None]:
    """Errors: UserError if a library is there but cannot be loaded, being made for another system say."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except (ImportError, OSError) as error:
        name = getattr(error, "name", None) or "a library"
        if name.partition(".")[0] == "nanogpt":
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{name} cannot be loaded ({reason}): install it anew with pip install --force-reinstall "
            "-c constraints.txt -e ."
        ) from error


def close_bars() -> None:
    """Take down progress bars, which an error or a signal has left, if any were made."""
    console = sys.modules.get("nanogpt.console")
    if console is not None:
        console.stop_progress_bars()


def complain(message: str) -> int:
    """Say what is wrong, in one line, even if several processes made the same mistake.

    Returns the exit code.
    """
    from nanogpt.console import one_line
    from nanogpt.streams import is_main_process

    if is_main_process():
        print(f"error: {one_line(message)}", file=sys.stderr)
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
    default = replace_lists(starting_point(cls, early), arguments)
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
        if stop.code != EXIT_USER_ERROR:  # --help, or a signal
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
        from nanogpt.checkpoint.run_dir import RunFolder

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


def replace_lists(default: Any, arguments: Sequence[str]) -> Any:
    """Empty the list of a flag that is given: its values replace the default, which tyro would extend."""
    given = {argument.partition("=")[0].lstrip("-").replace("-", "_") for argument in arguments}
    lists = [
        f.name for f in fields(default) if f.name in given and isinstance(getattr(default, f.name), tuple)
    ]
    return replace(default, **dict.fromkeys(lists, ()))


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
        text = line.strip("│| ").strip()
        if text.startswith("For full helptext"):
            break
        if set(text) - set("─-") and not text.startswith(
            ("╭─", "╰─", "+-")
        ):  # the latter where there is ASCII alone
            words.append(text)
    return " ".join(words).rstrip(".") or "the arguments cannot be understood"
