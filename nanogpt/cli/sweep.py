"""The `sweep` command: train every combination of some settings, several at a time, and compare the results.

Run:    nanogpt sweep --vary learning_rate=1e-3,3e-3 --vary seed=1,2,3 --jobs 2 --max_iters 500
The same command again goes on where it was. Each training has a folder in --out_dir, and a log beside it.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from nanogpt.cli.config import RunsConfig, SweepConfig
from nanogpt.cli.parse import parse
from nanogpt.cli.runs import print_table
from nanogpt.config import TrainConfig
from nanogpt.data.dataset import load_dataset
from nanogpt.errors import require
from nanogpt.sweep import runner
from nanogpt.sweep.grid import parse_vary, trials
from nanogpt.sweep.table import draw
from nanogpt.terminal.console import say
from nanogpt.training.stopping import StopRequest
from nanogpt.units import plural


def main(config: SweepConfig) -> int:
    """Run the trainings that are not done yet, and print the table of all. Returns the exit code.

    Raises: UserError if no training can be started, or after the others are done, if one failed.
    """
    require(bool(config.vary), "--vary is missing: give a setting and its values, as --vary seed=1,2,3")
    base = TrainConfig(**{field.name: getattr(config, field.name) for field in fields(TrainConfig)})
    load_dataset(Path(base.data_dir))  # fails before the first training does
    made = trials(base, {name: values(name, texts) for name, texts in map(parse_vary, config.vary)})
    todo = runner.unfinished(made)
    done, threads = len(made) - len(todo), plural(runner.threads_of_each(config.jobs), "thread")
    say(f"{plural(len(made), 'training')}, {done} of them done; {config.jobs} at a time, each on {threads}")
    say(f"Their output: {Path(base.out_dir) / '*.log'}")
    with StopRequest() as stop:
        failed = runner.run_all(todo, config.jobs, stop)
    runs = print_table(RunsConfig(path=base.out_dir))
    if stop.signal is not None:
        say("Stopped: the same command goes on from here")
        return 128 + stop.signal
    picture = Path(base.out_dir) / "losses.png"
    draw(runs, picture)
    say(f"Picture: {picture}")
    require(
        not failed,
        f"{len(failed)} of {plural(len(made), 'training')} failed: {', '.join(t.name for t in failed)}",
    )
    return 0


def values(name: str, texts: list[str]) -> dict[str, Any]:
    """The values of a setting, each under its text. Raises: UserError."""
    return {text: value(name, text) for text in texts}


def value(name: str, text: str) -> Any:
    """The value of a setting that a text stands for; on and off are those of a switch. Raises: UserError."""
    if isinstance(getattr(TrainConfig(), name), bool):
        require(text in ("on", "off"), f"--vary {name}: {text} is unknown: use on or off")
        return text == "on"
    return getattr(parse(TrainConfig, [f"--{name}", text], "nanogpt train"), name)
