"""Sampling needs the checkpoint alone, stops where told, and names what it cannot do."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.config import SampleConfig, TrainConfig, UserError
from nanogpt.sample import main, unescape, until
from nanogpt.train import fit


@pytest.fixture
def sampling(config: TrainConfig, capsys) -> SampleConfig:
    """A trained checkpoint, its data folder deleted."""
    fit(config)
    shutil.rmtree(config.data_dir)
    capsys.readouterr()
    return SampleConfig(checkpoint=str(Path(config.out_dir) / "ckpt.pt"), num_tokens=40, seed=1, device="cpu")


def test_prints_the_prompt_and_as_many_tokens_as_asked(sampling: SampleConfig, capsys) -> None:
    assert main(replace(sampling, prompt="From")) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("From")
    assert len(printed) == len("From") + 40 + len("\n")


def test_a_seed_repeats_and_samples_differ(sampling: SampleConfig, capsys) -> None:
    main(replace(sampling, num_samples=2))
    first = capsys.readouterr().out
    main(replace(sampling, num_samples=2))
    assert capsys.readouterr().out == first
    one, other = re.split(r"\n-{40}\n", first)
    assert one != other


def test_temperature_zero_is_the_same_for_every_seed(sampling: SampleConfig, capsys) -> None:
    printed = set()
    for seed in (1, 2, None):
        main(replace(sampling, temperature=0.0, seed=seed))
        printed.add(capsys.readouterr().out)
    assert len(printed) == 1


def test_unknown_prompt_character_is_named_with_its_position(sampling: SampleConfig) -> None:
    with pytest.raises(UserError, match=r"--prompt: character 'é' \(U\+00E9\) at position 3"):
        main(replace(sampling, prompt="caté"))


def test_stop_ends_the_text_before_it(sampling: SampleConfig, capsys) -> None:
    main(replace(sampling, temperature=0.0, num_tokens=200))
    whole = capsys.readouterr().out
    stop = whole[60:64]
    main(replace(sampling, temperature=0.0, num_tokens=200, stop=(stop,)))
    assert capsys.readouterr().out == whole[: whole.index(stop, 1)] + "\n"


def test_before_the_first_evaluation_last_pt_is_suggested(sampling: SampleConfig) -> None:
    best = Path(sampling.checkpoint)
    best.unlink()
    with pytest.raises(UserError, match=r"give --checkpoint .*last\.pt"):
        main(sampling)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_k": 0}, "--top_k 0"),
        ({"top_p": 0.0}, "--top_p 0.0"),
        ({"top_p": 1.5}, "--top_p 1.5"),
        ({"num_tokens": -1}, "--num_tokens -1"),
        ({"num_samples": 0}, "--num_samples 0"),
        ({"prompt": ""}, "--prompt"),
        ({"stop": ("",)}, "--stop"),
    ],
)
def test_nonsense_is_refused(values, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        SampleConfig(**values)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [(r"\n", "\n"), (r"a\tb", "a\tb"), (r"\\n", r"\n"), (r"\x", r"\x"), ("\\", "\\"), (r"\\\n", "\\\n")],
)
def test_unescape(typed: str, meant: str) -> None:
    assert unescape(typed) == meant


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_until_equals_cutting_the_whole_text(text: str, stops: list[str], data: st.DataObject) -> None:
    """However the text is cut into pieces."""
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    edges = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    expected = text
    for end in range(len(text) + 1):  # the stop string that is complete first ends the text
        done = [text[:end].index(stop) for stop in stops if stop in text[:end]]
        if done:
            expected = text[: min(done)]
            break
    result = "".join(until(pieces, stops))
    if all(len(piece) <= 1 for piece in pieces):
        assert result == expected
    else:  # a piece may complete several stop strings at once: the leftmost counts
        found = [text.index(stop) for stop in stops if stop in text]
        assert (result == text) if not found else not any(stop in result for stop in stops)


def test_text_appears_token_by_token(sampling: SampleConfig) -> None:
    """The first characters can be read while the rest is being made; then the reader leaves."""
    command = [sys.executable, "-m", "nanogpt.cli", "sample", "--checkpoint", sampling.checkpoint]
    command += ["--num_tokens", "1000000", "--prompt", "From", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stderr
    assert process.stdout.read(20).startswith("From")
    assert process.poll() is None
    process.stdout.close()
    assert process.wait(30) == 0
    assert process.stderr.read() == ""
    process.stderr.close()
