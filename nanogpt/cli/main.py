"""The command line: parse the arguments, then import the command and run it; report errors in one line.

Run:    nanogpt train --max_iters 100         (= python train.py --max_iters 100)
To add a command, write a config for its flags and a module with main(config), and add a row to COMMANDS.
This file knows nothing of how flags are parsed (parse.py).
"""

import contextlib
import gc
import importlib
import io
import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from nanogpt import __version__
from nanogpt.cli.config import (
    EvaluateConfig,
    InfoConfig,
    ModelSummaryConfig,
    PlanConfig,
    PresetsConfig,
    RunsConfig,
    SweepConfig,
)
from nanogpt.cli.parse import parse
from nanogpt.config import TrainConfig
from nanogpt.data.config import InspectConfig, PrepareConfig
from nanogpt.errors import UserError
from nanogpt.export.config import ExportConfig
from nanogpt.inference.config import SampleConfig
from nanogpt.server.config import ServeConfig
from nanogpt.terminal import streams
from nanogpt.training import stopping

EXIT_USER_ERROR, EXIT_INTERRUPT = 2, 130

FIRST_PROCESS_S = 10.0
"""Seconds that another process waits for the first one to report the same mistake."""


@dataclass(frozen=True)
class Command:
    """A command: the class of its settings, and the module that has its main(config)."""

    config: type[Any]
    module: str
    script: str = ""
    """Script in the root folder that runs the command too, if there is one."""
    idle_spins: int = 1_000
    """Spins after which an idle OpenMP thread of PyTorch sleeps. With the library's 300,000, training becomes
    very slow as soon as another program uses a core (bench/RESULTS.md)."""
    writes: bool = False
    """Whether the command writes files as its result, so that a closed standard output does not end it."""


SAMPLING_SPINS = 10_000
"""As many as the time between two tokens, or the threads would sleep before each."""

COMMANDS = {
    "data": Command(PrepareConfig, "nanogpt.data.prepare", "data.py", writes=True),
    "data info": Command(InspectConfig, "nanogpt.data.inspect"),
    "model": Command(ModelSummaryConfig, "nanogpt.cli.model", "model.py"),
    "plan": Command(PlanConfig, "nanogpt.cli.plan"),
    "train": Command(TrainConfig, "nanogpt.training.fit", "train.py", writes=True),
    "sweep": Command(SweepConfig, "nanogpt.cli.sweep", writes=True),
    "runs": Command(RunsConfig, "nanogpt.cli.runs"),
    "sample": Command(SampleConfig, "nanogpt.cli.sample", "sample.py", SAMPLING_SPINS),
    "eval": Command(EvaluateConfig, "nanogpt.cli.evaluate"),
    "export": Command(ExportConfig, "nanogpt.cli.export", writes=True),
    "serve": Command(ServeConfig, "nanogpt.cli.serve", idle_spins=SAMPLING_SPINS),
    "info": Command(InfoConfig, "nanogpt.cli.info"),
    "presets": Command(PresetsConfig, "nanogpt.cli.presets"),
}

ALLOCATOR_VARIABLES = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}
"""Environment variables of PyTorch's GPU memory allocator, current and earlier names."""


def main() -> None:
    """Entry point of the `nanogpt` command and of `python -m nanogpt`."""
    prepare_process()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.exit(run_command(name, sys.argv[2:], prog=f"nanogpt {name}"))
    code = report_errors(lambda: print_overview(name))
    if code:
        sys.exit(code)


def run_script(name: str) -> None:
    """Entry point of a script in the root folder, such as train.py."""
    prepare_process()
    sys.exit(run_command(name, sys.argv[1:], prog=f"python {COMMANDS[name].script}"))


def prepare_process() -> None:
    """Prepare streams and signals, so that neither ends this process with a traceback."""
    streams.protect_standard_streams()
    stopping.exit_quietly_on_signals()


def print_overview(option: str) -> int:
    """Print the list of commands, or the version. Raises: UserError if `option` is neither."""
    if option not in ("-h", "--help", "--version"):
        raise UserError(f"nanogpt {option}: no such command: use {', '.join(COMMANDS)}")
    print(f"nanogpt {__version__}" if option == "--version" else usage())
    return 0


def usage() -> str:
    """The help text: a list of the commands."""
    lines = ["usage: nanogpt COMMAND [OPTIONS]", ""]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:9} {(command.config.__doc__ or '').strip().splitlines()[0]}")
    return "\n".join([*lines, "", "nanogpt COMMAND --help lists its options."])


def run_command(name: str, arguments: Sequence[str], prog: str) -> int:
    """Parse the arguments, import the command and run it. Returns the exit code.

    A user's mistake ends in one line on standard error; a bug keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # prints ? for a character that the terminal cannot show
    return report_errors(lambda: parse_and_run(*subcommand(name, arguments, prog)))


def subcommand(name: str, arguments: Sequence[str], prog: str) -> tuple[str, Sequence[str], str]:
    """Resolve `data info DIR` to the command "data info" with --data_dir DIR; keep other commands."""
    if name != "data" or arguments[:1] != ["info"]:
        return name, arguments, prog
    rest = arguments[1:]
    bare = bool(rest) and not rest[0].startswith("-")
    return "data info", ["--data_dir", *rest] if bare else rest, f"{prog} info"


def parse_and_run(name: str, arguments: Sequence[str], prog: str) -> int:
    """Parse the arguments, import the command's module and call its main. Returns the exit code."""
    command = COMMANDS[name]
    config = parse(command.config, arguments, prog)
    streams.raise_stdout_errors(on=not command.writes)
    set_environment(command.idle_spins)
    with explain_import_errors(), uncollected_imports(), stopping.no_unwinding():
        module = importlib.import_module(command.module)
    return cast(Callable[[Any], int], module.main)(config)


@contextmanager
def uncollected_imports() -> Generator[None]:
    """Import without the garbage collector, and let it ignore the imported objects from then on (gc.freeze).

    PyTorch's modules are half a million objects, and none of them is garbage. Scanning them takes a fifth of
    the import, and at the end of the process half as long as all of it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


# --- the environment of PyTorch ---


def set_environment(idle_spins: int) -> None:
    """Set the variables that PyTorch reads when it is imported, except those that the user has set.

    idle_spins: see Command.
    OMP_NUM_THREADS becomes the number of cores that this process may use. PyTorch finds that number itself on
    Windows and macOS, but on Linux it does not see the CPU quota of a container.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", str(idle_spins))
    if sys.platform != "linux":
        return
    from nanogpt.machine.cores import usable_cores

    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    os.environ.setdefault("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL", "1")  # Flash Attention on more GPUs
    torch = torch_version()
    if not ALLOCATOR_VARIABLES & os.environ.keys() and "rocm" not in torch:
        renamed = not torch.startswith(("2.7.", "2.8."))  # PyTorch 2.9 and later warn about the old name
        name = "PYTORCH_ALLOC_CONF" if renamed else "PYTORCH_CUDA_ALLOC_CONF"
        os.environ[name] = "expandable_segments:True"  # so that evaluation and training share memory


def torch_version() -> str:
    """The version of PyTorch, read without importing it; "" if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # it takes as long as all of this file

    with contextlib.suppress(PackageNotFoundError):
        return version("torch")
    return ""


# --- errors ---


def report_errors(action: Callable[[], int]) -> int:
    """Call `action` and return its exit code. A user error or Ctrl-C ends it without a traceback."""
    streams.raise_stdout_errors(on=True)
    try:
        try:
            return action()
        finally:
            remove_progress_bars()
            streams.flush()
    except UserError as error:
        return print_error(str(error))
    except OSError as error:  # for example a read-only disk
        if error.filename is None:
            raise
        return print_error(f"{error.filename}: {error.strerror}")
    except ModuleNotFoundError as error:
        if (error.name or "nanogpt").partition(".")[0] == "nanogpt":
            raise
        return print_error(f"{error.name} is not installed: pip install -c constraints.txt -e .")
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # end the line on which the terminal shows ^C
        return EXIT_INTERRUPT
    finally:
        streams.raise_stdout_errors(on=False)


@contextmanager
def explain_import_errors() -> Generator[None]:
    """Raise UserError if an installed library cannot be loaded, for example one built for another system."""
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


def remove_progress_bars() -> None:
    """Remove progress bars that an error or a signal has left on the screen."""
    console = sys.modules.get("nanogpt.terminal.console")  # if it was not imported, there is no bar
    if console is not None:
        console.stop_progress_bars()


def print_error(message: str) -> int:
    """Print an error message in one line. Returns the exit code.

    Most mistakes occur in all processes of a distributed training. The first one reports it, and the others
    wait: the launcher ends them once the first has exited. One that is not ended has a mistake of its own.
    """
    from nanogpt.terminal.console import one_line
    from nanogpt.terminal.streams import is_main_process

    process = ""
    if not is_main_process():
        time.sleep(FIRST_PROCESS_S)
        process = f" (process {int(os.environ['RANK']) + 1} of {os.environ['WORLD_SIZE']})"
    print(f"error{process}: {one_line(message)}", file=sys.stderr)
    return EXIT_USER_ERROR
