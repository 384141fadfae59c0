"""The `info` command: what a file or folder is, or what differs between two.

Run:    nanogpt info out
        nanogpt info --diff out/ckpt.pt my_gpt.safetensors
No weights are read, except for --diff and --verify. The result goes to standard output.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.cli.config import InfoConfig
from nanogpt.errors import require
from nanogpt.info.curve import BARS
from nanogpt.info.description import Description, size_of
from nanogpt.info.difference import compare
from nanogpt.info.registry import describe
from nanogpt.info.show import difference_lines, lines
from nanogpt.machine.device import explain_out_of_memory
from nanogpt.terminal.console import late_progress_bar, say


def main(config: InfoConfig) -> int:
    """Describe a file or folder, or compare two. Returns the exit code.

    Raises: UserError if one of them is damaged; if a part alone is, after the rest is described.
    """
    described = [describe_one(Path(name), config) for name in config.diff or (config.path,)]
    if config.diff:
        compare_two(described[0], described[1], config)
    elif config.json:
        print(json.dumps(described[0].to_json(), allow_nan=False))
    else:
        print_lines(lines(described[0], ascii_only=not can_show(BARS)))
    for one in described:
        require(not one.damage, one.damage)
    return 0


def compare_two(a: Description, b: Description, config: InfoConfig) -> None:
    """Compare the two of --diff."""
    count, shows_bar = a.parameters or 0, not config.json
    with explain_out_of_memory(), late_progress_bar("Comparing", count, enabled=shows_bar) as advance:
        found = compare(a, b, advance)
    if config.json:
        print(json.dumps({"a": a.to_json(), "b": b.to_json(), **found.to_json()}, allow_nan=False))
    else:
        print_lines(difference_lines(a, b, found))


def describe_one(path: Path, config: InfoConfig) -> Description:
    """Describe a file or folder, with a progress bar if --verify takes long."""
    files = [path] if path.is_file() else [*path.glob("*.pt"), RunFolder(path).shards]
    total = sum(map(size_of, files)) if config.verify else 0
    with late_progress_bar("Verifying", total, size_in_bytes=True, enabled=not config.json) as advance:
        return describe(path, verified=config.verify, advance=advance)


def print_lines(shown: Iterable[str]) -> None:
    """Print lines, of which the first is a title."""
    for number, line in enumerate(shown):
        say(line, style=None if number else "bold")


def can_show(text: str) -> bool:
    """Whether standard output can show these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
