"""A storm: whatever happens at whatever moment, no run and no data is lost, nothing ends in a traceback.

Run:    python -m pytest tests/storm
        NANOGPT_STORM_SEEDS=7,8,9 python -m pytest tests/storm          for other storms
What happens is drawn from the seed; when it happens is up to the machine. Marked long: `-m "not long"` leaves
it out.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lives import STREAMS, Life
from waiting import written_rows

from nanogpt.checkpoint.format import load_checkpoint
from nanogpt.checkpoint.kept import kept_checkpoints
from nanogpt.data.dataset import load_dataset
from nanogpt.errors import UserError

SEEDS = [int(seed) for seed in os.environ.get("NANOGPT_STORM_SEEDS", "1").split(",")]

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="/dev/full, signals and limits of Linux"),
    pytest.mark.parametrize("seed", SEEDS),
]

TEXT = "".join(
    f"{n} From fairest creatures we desire increase,\nThat thereby beauty's rose\n" for n in range(60)
)

TINY = [
    "--block_size",
    "16",
    "--n_layer",
    "1",
    "--n_head",
    "2",
    "--n_embd",
    "16",
    "--batch_size",
    "4",
    "--warmup_iters",
    "2",
    "--eval_interval",
    "40",
    "--log_interval",
    "1",
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--dropout",
    "0.1",
    "--learning_rate",
    "1e-2",
    "--no_compile",
    "--keep_checkpoints",
    "4",
]
"""A training of a second or so."""


@pytest.fixture
def chance(seed: int, request: pytest.FixtureRequest) -> random.Random:
    return random.Random(f"{request.node.name} {seed}")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a text and the data folder made of it."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "other.txt").write_text(TEXT[::-1] * 2, encoding="utf-8")
    life = Life(["data", "--input_file", "text.txt"], tmp_path)
    assert life.end() == 0, life.said
    return tmp_path


def well_said(life: Life, code: int) -> None:
    """A mistake, or an accident, ends in a line and code 2; nothing ends in a traceback."""
    assert "Traceback" not in life.said, life.said
    assert "Warning" not in life.said, life.said
    assert code in (0, 2), (code, life.said)
    if code == 2:
        assert life.said.strip(), "it ended with 2, and said nothing"


def files_of(folder: Path) -> dict[str, bytes]:
    """The contents of the token files and what describes them."""
    return {name: (folder / name).read_bytes() for name in ("train.pt", "val.pt", "vocab.pt")}


def step_of(path: Path) -> int:
    return int(load_checkpoint(path).progress["step"])


def logged(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    rows = written_rows(path)
    return [row["step"] for row in rows if "train_loss" in row]


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs ended with the same weights, moments, logged losses and kept steps, bit for bit."""
    assert list(kept_checkpoints(one / "checkpoints")) == list(kept_checkpoints(other / "checkpoints"))
    ours, theirs = (load_checkpoint(folder / "last.pt") for folder in (one, other))
    assert ours.progress | {"elapsed_s": 0} == theirs.progress | {"elapsed_s": 0}
    for name, tensor in theirs.model.items():
        assert torch.equal(ours.model[name], tensor), name
    for a, b in zip(ours.optimizers, theirs.optimizers, strict=True):
        for number, state in b["state"].items():
            assert all(torch.equal(a["state"][number][key], value) for key, value in state.items())
    assert logged(one) == logged(other) == list(range(1, theirs.progress["step"] + 1))


def never_stopped(place: Path, updates: int) -> Path:
    """The run that nothing happened to."""
    life = Life(["train", *TINY, "--max_iters", str(updates), "--out_dir", "never"], place)
    assert life.end() == 0, life.said
    return place / "never"


# Kills


def test_trainings_that_are_killed(place: Path, chance: random.Random) -> None:
    """At random moments, while they start, train, save, evaluate or set an earlier run aside."""
    never, out = never_stopped(place, 300), place / "out"
    for _ in range(12):
        again = ["--resume"] if (out / "last.pt").exists() else TINY
        life = Life(
            ["train", *again, "--max_iters", "300", "--save_seconds", "0.02", "--out_dir", "out"], place
        )
        if again is TINY:
            life.wait_for((out / "last.pt").exists)
        life.process.join(chance.uniform(0.0, 0.5))
        life.send(signal.SIGKILL)
        assert life.end() in (0, -signal.SIGKILL), life.said
        assert "Traceback" not in life.said, life.said
    life = Life(["train", "--resume", "--out_dir", "out"], place)
    assert life.end() == 0, life.said
    assert_same_run(out, never)


def test_new_trainings_that_are_killed_while_they_set_the_earlier_one_aside(place, chance):
    """Each earlier run is whole, in out or in out/previous, and resumes from where it was."""
    never = never_stopped(place, 40)
    shutil.copytree(never, place / "out")
    words = ["train", *TINY, "--max_iters", "40", "--out_dir", "out", "--seed", "5"]
    for _ in range(20):
        life = Life(words, place)
        life.wait_for(lambda: (place / "out" / "previous").exists() or "Using CPU" in life.said)  # noqa: B023
        life.process.join(chance.uniform(0.0, 0.05))
        life.send(signal.SIGKILL)
        life.end()
    life = Life(words, place)
    assert life.end() == 0, life.said
    found = [path for path in (place / "out").rglob("last.pt") if load_checkpoint(path).config["seed"] != 5]
    assert len(found) == 1
    assert_same_run(found[0].parent, never)
    assert (found[0].parent / "ckpt.pt").exists()


def test_preparations_that_are_killed(place: Path, chance: random.Random) -> None:
    """With --overwrite: afterwards there is the old data set or the new one, whole."""
    sets: dict[str, dict[str, bytes]] = {}
    for name in ("text", "other"):
        began = time.monotonic()
        assert Life(["data", "--input_file", f"{name}.txt", "--data_dir", name], place).end() == 0
        lasts = time.monotonic() - began
        sets[name] = files_of(place / name)
    turn = ["other", "text"]
    for number in range(40):
        name = turn[number % 2]
        life = Life(["data", "--input_file", f"{name}.txt", "--overwrite"], place)
        life.process.join(chance.uniform(0.2, 1.0) * lasts)
        life.send(signal.SIGKILL)
        life.end()
        dataset = load_dataset(place / "data")  # nothing less than a whole one, which may finish the swap
        there = {path: content for path, content in files_of(place / "data").items() if path != "vocab.pt"}
        assert there in [{p: c for p, c in one.items() if p != "vocab.pt"} for one in sets.values()]
        assert dataset.fingerprint in [load_dataset(place / name).fingerprint for name in sets]
    assert Life(["data", "--input_file", "other.txt", "--overwrite"], place).end() == 0
    assert files_of(place / "data") == sets["other"]


# Signals and terminals


ENDS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGQUIT": 131, "SIGXCPU": 152}


def test_trainings_that_are_told_to_stop_whatever_became_of_the_terminal(place, chance):
    """Each is saved at the step it has logged, and goes on as if it had never stopped."""
    never, out = never_stopped(place, 400), place / "out"
    assert (
        Life(["train", *TINY, "--max_iters", "400", "--out_dir", "out", "--max_seconds", "1e-9"], place).end()
        == 0
    )
    for _ in range(14):
        name, streams = (
            chance.choice(list(ENDS)),
            {"out": chance.choice(STREAMS), "err": chance.choice(STREAMS)},
        )
        before = step_of(out / "last.pt")
        if before >= 400:
            break
        words = ["train", "--resume", "--max_seconds", "None", "--max_iters", "400", "--save_seconds", "1000"]
        life = Life([*words, "--eval_interval", "40", "--out_dir", "out"], place, **streams)
        life.wait_for(lambda before=before: len(logged_safely(out)) > before + 2)
        if chance.random() < 0.3:
            life.send(signal.SIGUSR1)  # a warning: it saves and goes on
        life.send(getattr(signal, name))
        code = life.end()
        assert code in (ENDS[name], 0), (name, streams, code, life.said)
        assert "Traceback" not in life.said, (name, streams, life.said)
        assert step_of(out / "last.pt") == max(logged(out)) > before, (name, streams, code)
    assert Life(["train", "--resume", "--max_seconds", "None", "--out_dir", "out"], place).end() == 0
    ours, theirs = (load_checkpoint(folder / "last.pt") for folder in (out, never))
    assert all(torch.equal(ours.model[name], tensor) for name, tensor in theirs.model.items())


def logged_safely(folder: Path) -> list[int]:
    """The steps logged so far, of a file that is being written."""
    try:
        return logged(folder)
    except ValueError:
        return []


@pytest.mark.parametrize(
    "words",
    [["sample", "--num_tokens", "20"], ["data", "info"], ["presets"], ["model"], ["train", "--help"],
     ["--help"], ["train", "--nonsense"], ["sample", "--checkpoint", "nowhere"]],
    ids=" ".join,
)  # fmt: skip
def test_commands_whose_output_nobody_can_read(place: Path, chance: random.Random, words: list[str]) -> None:
    """They end with 0 or 2, say why where they can, and leave no traceback."""
    life = Life(["train", *TINY, "--max_iters", "2"], place)
    assert life.end() == 0, life.said
    for out, err in [(kind, "log") for kind in STREAMS] + [
        ("log", chance.choice(STREAMS)),
        ("closed", "closed"),
    ]:
        life = Life(words, place, out=out, err=err)
        code = life.end()
        assert code in (0, 2), (out, err, code, life.said)
        assert "Traceback" not in life.said, (out, err, life.said)


# Damage


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 3)):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


def zeros(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    first = chance.randrange(len(content))
    last = min(len(content), first + chance.randint(1, 4096))
    content[first:last] = bytes(last - first)
    path.write_bytes(content)


def garbage(path: Path, chance: random.Random) -> None:
    path.write_bytes(chance.randbytes(chance.randint(0, 5000)))


def grown(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randint(1, 100)))


def brackets(path: Path, chance: random.Random) -> None:
    path.write_text("[" * 100_000 + "\n")


def gone(path: Path, chance: random.Random) -> None:
    path.unlink()


def folder(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path, chance: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def swapped(path: Path, chance: random.Random) -> None:
    other = chance.choice([p for p in path.parent.iterdir() if p.is_file() and p.suffix == ".pt"])
    shutil.copy(other, path) if other != path else flip(path, chance)


DAMAGE: list[Callable[[Path, random.Random], None]] = [
    flip, flip, flip, cut, cut, zeros, zeros, garbage, grown, brackets, gone, folder, fifo, endless, swapped,
]  # fmt: skip

TARGETS = ["data/train.pt", "data/val.pt", "data/vocab.pt", "out/last.pt", "out/ckpt.pt", "out/metrics.jsonl"]


def test_files_that_are_damaged(place: Path, chance: random.Random) -> None:
    """Damage of any kind is a line, or does no harm: what goes on ends as if nothing had been."""
    never = never_stopped(place, 60)
    life = Life(["train", *TINY, "--max_iters", "60", "--out_dir", "out", "--max_seconds", "1e-9"], place)
    assert life.end() == 0, life.said
    good = place / "good"
    for name in ("data", "out"):
        shutil.copytree(place / name, good / name)
    commands = [
        ["train", "--resume", "--max_seconds", "None", "--out_dir", "out"],
        ["sample", "--num_tokens", "5", "--seed", "1"],
        ["data", "info"],
        ["data", "--input_file", "text.txt"],
    ]
    for _ in range(60):
        for name in ("data", "out"):
            shutil.rmtree(place / name)
            shutil.copytree(good / name, place / name)
        target, how, words = chance.choice(TARGETS), chance.choice(DAMAGE), chance.choice(commands)
        how(place / target, chance)
        life = Life(words, place)
        code = life.end()
        try:
            well_said(life, code)
            if code == 0 and words[0] == "train":
                ours, theirs = (load_checkpoint(place / run / "last.pt") for run in ("out", "never"))
                assert all(torch.equal(ours.model[key], value) for key, value in theirs.model.items())
        except (AssertionError, UserError) as error:
            raise AssertionError(f"{target}, {how.__name__}, {' '.join(words)}: {error}") from error
    assert never.exists()


# Flags


VALUES = [
    "0", "1", "-1", "3", "0.5", "1e-3", "1e400", "nan", "inf", "-inf", "None", "True", "", " ", "auto", "on",
    "99999999999999999999999", "../..", "/", ".", "/dev/null", "/dev/full", "/dev/zero", "text.txt", "data",
    "\x00", "\x1b[31m", "a\nb", "é\udc80", "x" * 10_000, "muon", "rope", "cpu", "char", "bpe", "257", "65536",
]  # fmt: skip


def test_flags_of_any_kind(place: Path, chance: random.Random) -> None:
    """Random values for random flags: each works, or is refused in a line."""
    from dataclasses import fields

    from nanogpt.cli import main as cli

    life = Life(["train", *TINY, "--max_iters", "2"], place)
    assert life.end() == 0, life.said
    usual = {
        "train": [*TINY, "--max_iters", "2", "--out_dir", "run"],
        "sample": ["--num_tokens", "3"],
        "data": ["--input_file", "text.txt", "--data_dir", "made"],
        "model": [],
        "data info": [],
    }
    big = {
        "n_embd",
        "n_layer",
        "batch_size",
        "block_size",
        "mlp_width",
        "ngram_vocab",
        "max_iters",
        "num_tokens",
    }
    for _ in range(80):
        name = chance.choice(list(usual))
        flags = [item.name for item in fields(cli.COMMANDS[name].config) if item.name not in big]
        words = [*name.split(), *usual[name]]
        for flag in chance.sample(flags, min(len(flags), chance.randint(1, 2))):
            value = chance.choice(VALUES).replace("\x00", "?")
            words += [f"--{flag}", *([value] if chance.random() < 0.9 else [])]
        life = Life(words, place)
        code = life.end()
        try:
            well_said(life, code)
            last = life.said.strip().splitlines()[-1:] if code == 2 else []
            assert all(len(line) < 1500 for line in last), "a line of more than 1,500 characters"
        except AssertionError as error:
            raise AssertionError(f"{words}: {error}") from error


# Full disks


def test_disks_that_are_full(place: Path, chance: random.Random) -> None:
    """Wherever it is full: a line that says so, and what was there before is there and whole."""
    never_stopped(place, 60)
    life = Life(["train", *TINY, "--max_iters", "60", "--out_dir", "out", "--max_seconds", "1e-9"], place)
    assert life.end() == 0, life.said
    before, old = step_of(place / "out" / "last.pt"), files_of(place / "data")
    sizes = [path.stat().st_size for path in (place / "out").glob("*.pt")]
    for _ in range(16):
        words = chance.choice(
            [
                ["data", "--input_file", "other.txt", "--overwrite"],
                [
                    "data",
                    "--input_file",
                    "other.txt",
                    "--overwrite",
                    "--tokenizer",
                    "bpe",
                    "--vocab_size",
                    "300",
                ],
                ["train", "--resume", "--max_seconds", "None", "--out_dir", "out", "--save_seconds", "0"],
            ]
        )
        most = chance.choice(
            [0, 100, 1000, 4000, chance.randrange(1, max(sizes)), chance.randrange(1, max(sizes))]
        )
        life = Life(words, place, most=most, out="null")
        code = life.end()
        well_said(life, code)
        if words[0] == "data" and code != 0:
            load_dataset(place / "data")
            assert files_of(place / "data") == old, (words, most, life.said)
        elif words[0] == "data":
            assert Life(["data", "--input_file", "text.txt", "--overwrite"], place).end() == 0
            assert files_of(place / "data") == old
        assert step_of(place / "out" / "last.pt") >= before
    life = Life(["train", "--resume", "--max_seconds", "None", "--out_dir", "out"], place)
    assert life.end() == 0, life.said
    ours, theirs = (load_checkpoint(place / run / "last.pt") for run in ("out", "never"))
    assert all(torch.equal(ours.model[name], tensor) for name, tensor in theirs.model.items())
