"""The examples give a training the time they promise, and call commands that parse."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from nanogpt.cli import main as cli
from nanogpt.cli.parse import parse

EXAMPLES = Path(__file__).parent.parent / "examples"
SHELL = sorted(EXAMPLES.glob("*.sh"))
CLUSTER = [*SHELL, *sorted(EXAMPLES.glob("*.yaml"))]

SLOWEST_SAVE = 60
"""Seconds that a save may need: 12 GB, moments included, at 0.2 GB/s."""

TORCHRUN = 30
"""Seconds after SIGTERM in which torchrun kills its processes, unless it is told otherwise."""


def number(text: str, pattern: str) -> int:
    """The one number that the pattern finds."""
    found = re.findall(pattern, text)
    assert len(found) == 1, (pattern, found)
    return int(found[0])


def timeout_of_torchrun(text: str) -> int:
    """Seconds that torchrun leaves its processes after SIGTERM."""
    uncommented = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return number(uncommented, r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT(?:=|, value: )\D*(\d+)")


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_a_shell_example_parses(path: Path):
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("path", CLUSTER, ids=lambda path: path.name)
def test_torchrun_leaves_time_to_save(path: Path):
    assert timeout_of_torchrun(path.read_text()) >= SLOWEST_SAVE > TORCHRUN


def test_slurm_kills_after_torchrun_would():
    text = (EXAMPLES / "slurm.sh").read_text()
    notice = number(text, r"(?m)^#SBATCH --signal=TERM@(\d+)$")
    assert timeout_of_torchrun(text) < notice
    assert f"SIGTERM comes {notice} seconds early" in text


def test_slurm_gives_its_tasks_their_cores():
    text = (EXAMPLES / "slurm.sh").read_text()
    lines = text.splitlines()
    export = lines.index('export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"')
    assert export < next(i for i, line in enumerate(lines) if line.startswith("exec srun"))
    assert number(text, r"--cpus-per-task=(\d+)") >= number(text, r"--gpus-per-node=(\d+)")
    assert number(text, r"--gpus-per-node=(\d+)") == number(text, r"--nproc_per_node=(\d+)")


def test_kubernetes_kills_after_torchrun_would():
    text = (EXAMPLES / "kubernetes.yaml").read_text()
    assert timeout_of_torchrun(text) < number(text, r"terminationGracePeriodSeconds: (\d+)")
    assert number(text, r'nprocPerNode: "(\d+)"') == number(text, r"nvidia.com/gpu: (\d+)")


@pytest.mark.parametrize("path", CLUSTER, ids=lambda path: path.name)
def test_its_training_parses(path: Path):
    """The flags behind train.py, with the shell's variables standing for themselves."""
    text = path.read_text().replace("\\\n", " ")
    call = next(line for line in text.splitlines() if re.search(r"torchrun.* train\.py", line.split("#")[0]))
    flags = call.split("train.py", 1)[1].replace('"$@"', "").strip(" ,]").replace(",", " ")
    config = parse(cli.COMMANDS["train"].config, shlex.split(flags), "train")
    assert config.out_dir != "out"
