"""Several GPUs of one machine train as one does: NCCL, DDP, FSDP. Skipped where there are fewer than two.

NANOGPT_TEST_DEVICE=cpu runs it with two processes over gloo.
"""

import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from nanogpt.checkpoint.format import load_checkpoint
from nanogpt.config import TrainConfig
from nanogpt.training.fit import fit

from .conftest import numbers

ROOT = Path(__file__).parents[2]

CHILD = """
import faulthandler, sys
faulthandler.dump_traceback_later(200)  # shows where, should it hang
from nanogpt.config import TrainConfig
from nanogpt.training.fit import main
sys.exit(main(TrainConfig(**{settings!r})))
"""

PROCESSES = 2


@pytest.fixture(autouse=True)
def enough(place: torch.device) -> None:
    if place.type == "cuda" and torch.cuda.device_count() < PROCESSES:
        pytest.skip("needs two GPUs")


def torchrun(tmp_path: Path, config: TrainConfig) -> str:
    """What a training of two processes said on standard output. It must end well."""
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(settings=asdict(config)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_gpus_train_as_one(config: TrainConfig, tmp_path: Path, kind: str, optimizer: str) -> None:
    """With dropout off, whose masks differ, and a batch that does not divide evenly."""
    config = replace(
        config, dropout=0.0, batch_size=9, optimizer=optimizer, dtype="float32", learning_rate=3e-3
    )
    fit(config)
    two = replace(config, parallel=kind, out_dir=str(tmp_path / "two"))
    torchrun(tmp_path, two)
    for losses in ("train_loss", "val_loss"):
        assert numbers(two, losses) == pytest.approx(numbers(config, losses), rel=2e-2)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_what_two_gpus_saved_one_goes_on_with(config: TrainConfig, tmp_path: Path, kind: str) -> None:
    config = replace(config, dropout=0.0, parallel=kind, dtype="bfloat16")
    torchrun(tmp_path, replace(config, max_iters=10))
    assert fit(replace(config, resume=True)).step == config.max_iters
    saved = load_checkpoint(Path(config.out_dir) / "last.pt")
    assert all(weight.isfinite().all() for weight in saved.model.values())
    losses = numbers(config)
    assert len(losses) == config.max_iters
    assert losses[-1] < losses[0]
