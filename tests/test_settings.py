"""Settings take what equals a plain value, refuse the rest by name, and so can always be loaded again."""

import enum
import io
import os
import subprocess
import sys
from dataclasses import fields, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nanogpt.checkpoint.format import load_checkpoint, load_model
from nanogpt.cli import main as cli
from nanogpt.config import (
    Architecture,
    GPTConfig,
    OptimizerName,
    TrainConfig,
    from_dict,
    to_dict,
)
from nanogpt.data.config import PrepareConfig
from nanogpt.errors import UserError
from nanogpt.inference.config import SampleConfig
from nanogpt.settings import Settings
from nanogpt.training.fit import fit

CONFIGS = [Architecture, GPTConfig, *dict.fromkeys(command.config for command in cli.COMMANDS.values())]


class Word(str, enum.Enum):
    MUON = "muon"


class Count(enum.IntEnum):
    THREE = 3


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("name", "given", "plain"),
    [
        ("n_layer", np.int64(3), 3),
        ("n_layer", np.uint8(3), 3),
        ("n_layer", 3.0, 3),
        ("n_layer", np.float64(3), 3),
        ("n_layer", np.array(3), 3),
        ("n_layer", torch.tensor(3), 3),
        ("n_layer", Count.THREE, 3),
        ("n_layer", Fraction(3), 3),
        ("dropout", np.float32(0.25), 0.25),
        ("dropout", 0, 0.0),
        ("dropout", Fraction(1, 4), 0.25),
        ("learning_rate", 1, 1.0),
        ("max_seconds", np.int32(9), 9.0),
        ("bias", np.bool_(False), False),
        ("bias", 1, True),
        ("patience", None, None),
        ("micro_batch", np.int64(4), 4),
        ("micro_batch", np.str_("auto"), "auto"),
        ("optimizer", Word.MUON, "muon"),
        ("optimizer", np.str_("muon"), "muon"),
        ("out_dir", Path("a") / "b", os.path.join("a", "b")),  # noqa: PTH118 - as a text
        ("out_dir", Text("a"), "a"),
        ("preset", Text("cpu"), "cpu"),
    ],
)
def test_what_equals_a_plain_value_becomes_it(name, given, plain):
    value = getattr(TrainConfig(**{name: given}), name)
    assert value == plain
    assert type(value) is type(plain)


def test_lists_become_tuples_of_texts():
    config = PrepareConfig(input_file=["a", Path("b"), Text("c")], val_file=np.array(["d"]))
    assert config == PrepareConfig(input_file=("a", "b", "c"), val_file=("d",))
    assert [type(name) for name in config.input_file] == [str] * 3
    assert SampleConfig(stop=iter(["x"])).stop == ("x",)


WRONG = [
    (TrainConfig, "optimizer", "sgd", "--optimizer sgd is unknown: use adamw or muon"),
    (TrainConfig, "norm", "batchnorm", "--norm batchnorm is unknown: use layernorm or rmsnorm"),
    (TrainConfig, "schedule", "linear", "--schedule linear is unknown: use cosine, trapezoid or constant"),
    (TrainConfig, "dtype", "bf16", "--dtype bf16 is unknown: use auto, float32, bfloat16 or float16"),
    (TrainConfig, "dtype", torch.bfloat16, "--dtype torch.bfloat16 is unknown: use auto"),
    (TrainConfig, "compile", "maybe", "--compile maybe is unknown: use auto, on or off"),
    (TrainConfig, "compile", True, "--compile True is unknown: use auto, on or off"),
    (TrainConfig, "micro_batch", "many", "--micro_batch many is unknown: use a whole number or auto"),
    (TrainConfig, "n_layer", "1", "--n_layer '1' is of type str: it must be a whole number"),
    (TrainConfig, "n_layer", True, "--n_layer True is of type bool: it must be a whole number"),
    (TrainConfig, "n_layer", 1.5, "--n_layer 1.5 is of type float"),
    (TrainConfig, "n_layer", None, "--n_layer None is of type NoneType"),
    (TrainConfig, "n_layer", np.array([3]), "--n_layer array([3]) is of type ndarray"),
    (TrainConfig, "n_layer", 10**5000, "is too large: it must be below 2**63"),
    (TrainConfig, "dropout", True, "--dropout True is of type bool: it must be a number"),
    (TrainConfig, "dropout", Decimal("0.5"), "--dropout Decimal('0.5') is of type Decimal"),
    (TrainConfig, "learning_rate", np.float32("nan"), "--learning_rate nan is not a finite number"),
    (TrainConfig, "max_seconds", float("inf"), "--max_seconds inf is not a finite number"),
    (TrainConfig, "max_seconds", "60", "--max_seconds '60' is of type str: it must be a number or None"),
    (TrainConfig, "max_seconds", 10**400, "it must be a number or None"),
    (TrainConfig, "bias", 2, "--bias 2 is of type int: it must be True or False"),
    (TrainConfig, "bias", "no", "--bias no is of type str: it must be True or False"),
    (TrainConfig, "bias", None, "it must be True or False"),
    (TrainConfig, "out_dir", None, "--out_dir None is of type NoneType: it must be a text"),
    (TrainConfig, "out_dir", b"out", "--out_dir b'out' is of type bytes"),
    (TrainConfig, "out_dir", "a\0b", "holds a NUL character: leave it out"),
    (TrainConfig, "device", torch.device("cpu"), "--device device(type='cpu') is of type device"),
    (TrainConfig, "out_dir", ["a\n" * 1000], "is of type list"),
    (GPTConfig, "logit_cap", float("nan"), "--logit_cap nan is not a finite number"),
    (PrepareConfig, "split", "head", "--split head is unknown: use tail or documents"),
    (PrepareConfig, "input_file", "a.txt", "--input_file 'a.txt' is of type str: it must be a list of texts"),
    (PrepareConfig, "input_file", Path("a"), "it must be a list of texts"),
    (PrepareConfig, "input_file", ["a", 1], "it must be a list of texts"),
    (PrepareConfig, "train_split", "0.9", "--train_split '0.9' is of type str: it must be a number"),
    (SampleConfig, "unknown", "ignore", "--unknown ignore is unknown: use error or skip"),
    (SampleConfig, "top_k", 2.5, "--top_k 2.5 is of type float: it must be a whole number or None"),
    (SampleConfig, "num_tokens", 10**22, "is too large"),
]


@pytest.mark.parametrize(("cls", "name", "value", "message"), WRONG, ids=range(len(WRONG)))
def test_what_does_not_is_refused_by_name_in_one_short_line(cls, name, value, message):
    with pytest.raises(UserError) as raised:
        cls(**{name: value})
    line = str(raised.value)
    assert message in line
    assert line.startswith(f"--{name} ")
    assert "\n" not in line
    assert len(line) < 200


def test_every_command_has_settings_that_are_checked():
    for cls in CONFIGS:
        assert issubclass(cls, Settings)
        for item in fields(cls):
            with pytest.raises(UserError, match=f"--{item.name} "):
                cls(**{item.name: object()})


def test_settings_import_neither_torch_nor_numpy():
    code = "import nanogpt.config, sys; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


NUMBERS = st.one_of(
    st.integers(-2, 600),
    st.integers(),
    st.sampled_from([2**62, 2**63 - 1, 2**63, 2**2040, -(2**70), 10**400]),
    st.floats(),
    st.fractions(),
    st.integers(-100, 100).map(np.int16),
    st.integers(0, 2**63 - 1).map(np.int64),
    st.floats(width=32).map(np.float32),
    st.floats(0, 1).map(np.float64),
    st.floats(0, 1).map(np.longdouble),
    st.integers(0, 9).map(np.array),
    st.integers(0, 9).map(torch.tensor),
)
CHOICES = sorted(
    {choice for item in fields(TrainConfig) for one in get_args(item.type) for choice in get_args(one)}
    | set(get_args(OptimizerName))
    | {"rmsnorm", "rope", "swiglu", "trapezoid", "cpu", "on", "fsdp", "blocks", "bfloat16"}
)
TEXTS = st.one_of(
    st.sampled_from(CHOICES),
    st.text(max_size=20),
    st.text(st.characters(categories=["Cs", "Ll"]), max_size=5),  # file names that are not UTF-8
    st.sampled_from(CHOICES).map(np.str_),
    st.sampled_from(CHOICES).map(Text),
    st.sampled_from(CHOICES).map(Path),
    st.binary(max_size=5),
)
VALUES = st.one_of(
    NUMBERS,
    TEXTS,
    st.booleans(),
    st.booleans().map(np.bool_),
    st.none(),
    st.sampled_from([Word.MUON, Count.THREE, object(), torch.bfloat16, torch.float32, np.zeros(2)]),
    st.lists(TEXTS, max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
)


def plain(value):
    """Whether a value is of plain types alone, no subclasses."""
    return type(value) in (bool, int, float, str, type(None)) or (
        type(value) is tuple and all(type(item) is str for item in value)
    )


@hypothesis_settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(CONFIGS), st.data())
def test_whatever_builds_comes_back_from_a_file_and_whatever_does_not_is_a_user_error(cls, data):
    names = [item.name for item in fields(cls)]
    if not names:
        return
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    values = {name: data.draw(VALUES, label=name) for name in chosen}
    try:
        config = cls(**values)
    except UserError:
        return
    assert all(plain(getattr(config, name)) for name in names)
    assert replace(config) == config
    file = io.BytesIO()
    torch.save(to_dict(config), file)
    file.seek(0)
    again = from_dict(cls, torch.load(file, weights_only=True))
    assert again == config
    assert all(type(getattr(again, name)) is type(getattr(config, name)) for name in names)


def test_a_training_with_numpy_numbers_and_paths_is_resumed_and_sampled(config, tmp_path):
    numbers = {"n_layer": np.int64(1), "n_embd": np.int32(16), "learning_rate": np.float32(0.01)}
    others = {"bias": np.bool_(True), "max_iters": np.int64(2), "data_dir": Path(config.data_dir)}
    out = tmp_path / "run"
    fit(replace(config, **numbers, **others, out_dir=out))
    resumed = replace(load_checkpoint(out / "last.pt").train_config, resume=True, max_iters=np.int64(4))
    assert fit(resumed).step == 4
    model, _ = load_model(out / "last.pt", "cpu")
    assert model.config.n_layer == 1


def test_a_wrong_choice_writes_nothing(config, tmp_path):
    with pytest.raises(UserError, match="--optimizer sgd is unknown"):
        fit(replace(config, optimizer="sgd", out_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
