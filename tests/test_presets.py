"""Every preset is a whole configuration, is listed, and is as large as it says."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from nanogpt import presets
from nanogpt.cli import presets as show_presets
from nanogpt.cli.config import PresetsConfig
from nanogpt.config import TrainConfig, model_config
from nanogpt.errors import UserError
from nanogpt.model.size import meta_model
from nanogpt.presets import PRESETS
from nanogpt.training.fit import fit

each_preset = pytest.mark.parametrize("name", PRESETS)


def size(name: str) -> int:
    return meta_model(model_config(presets.get(name), PRESETS[name].vocab_size)).num_parameters()


@each_preset
def test_it_is_called_what_it_is_called(name: str) -> None:
    assert presets.get(name).preset == name


@each_preset
def test_it_trains(name: str, data_dir: Path, tmp_path: Path) -> None:
    """Two updates of the recipe, in a model with fewer and thinner layers."""
    small = {"n_layer": 1, "n_embd": 16 * presets.get(name).n_head, "block_size": 16, "batch_size": 4}
    small |= {"max_iters": 2, "gradient_accumulation_steps": 2, "mlp_width": None, "warmup_iters": 1}
    config = replace(presets.get(name), **small, ngram_vocab=50 * bool(presets.get(name).ngram_vocab))
    result = fit(replace(config, data_dir=str(data_dir), out_dir=str(tmp_path / "out")))
    assert result.reason == "finished"
    assert result.best_val_loss < 6


def test_sizes() -> None:
    assert 123e6 < size("gpt2") < 125e6
    assert size("best") <= 11e6
    assert 0.7e6 < size("classic") < 0.9e6
    assert size("shakespeare") == size_of(TrainConfig())


def size_of(config: TrainConfig) -> int:
    return meta_model(model_config(config, 65)).num_parameters()


def test_shakespeare_is_the_default_model() -> None:
    ours = model_config(presets.get("shakespeare"), 65)
    assert replace(ours, dropout=0.2) == replace(model_config(TrainConfig(), 65), dropout=0.2)


def test_the_table_has_a_row_for_each_and_fits_a_terminal(capsys) -> None:
    assert show_presets.main(PresetsConfig()) == 0
    printed = capsys.readouterr().out
    for name, preset in PRESETS.items():
        loss = preset.measured.loss if preset.measured else "-"
        assert re.search(rf"^ {name} .* M .* {re.escape(loss)} ", printed, re.MULTILINE)
        assert preset.purpose in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"--preset huge does not exist: choose one of .*cpu"):
        presets.get("huge")
