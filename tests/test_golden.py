"""What an earlier version wrote still loads, resumes and samples: data folders, checkpoints, a sharded one.

golden.tar.xz was written by commit 6c7079b, before the packages: data folders of characters (data), bytes
(bytes) and byte-pair tokens (bpe); runs on the first with Muon and an average (run), on the last with AdamW
(bpe-run), on the second with FSDP in two processes (fsdp). All of 6 steps. golden-ngrams.tar.xz
was written by commit 0d9ba82, when pairs of tokens were hashed and AdamW updated the n-gram tables.
golden-formats.tar.xz has a run of every format of checkpoints, with data of every format: each made by the
commit in FORMATS with a model of width 4, to step 6. That commit then went on to step 9 itself: without
dropout where it drew other masks than today, or those of two processes. A new format gets a row there, with
files from the last commit that wrote the old one. golden-pairs.tar.xz is data of format 3, with masks.
"""

import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanogpt import __version__
from nanogpt.checkpoint import format as checkpoints
from nanogpt.checkpoint.format import load_checkpoint, load_model, write_sealed
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.cli.main import run_command
from nanogpt.cli.sample import main as sample
from nanogpt.data import vocab_file
from nanogpt.data.dataset import load_dataset
from nanogpt.inference.config import SampleConfig
from nanogpt.storage import seals
from nanogpt.training.fit import fit

RUNS = {"run": "data", "bpe-run": "bpe", "fsdp": "bytes"}

LOGITS = {
    "run": [0.196800, 0.117140, 0.255959, -0.267133, -0.282976],
    "bpe-run": [-0.610873, -0.670017, -0.635452, -0.647812, -0.600874],
    "fsdp": [-0.600230, -0.521285, -0.691612, -0.570463, -0.535095],
}
"""The first logits for the tokens 0, 1, 2, as that commit computed them."""


FORMATS = {
    "format-1-unsealed": ("e424a97", "data-1-first", 25.0520),
    "format-1": ("6b766dd", "data-1", 42.7365),
    "format-2": ("d2f9bf5", "data-1", 26.1533),
    "format-2-bare": ("f0118b3", "data-2-unsealed", 26.1533),
    "format-3": ("67dfd4f", "data-2", 25.9404),
    "format-3-sharded": ("67dfd4f", "data-2", 25.9584),
    "format-4": ("0d9ba82", "data-2", 25.6447),
    "format-5": ("7a40d87", "data-2", 26.1356),
    "format-5-sharded": ("7a40d87", "data-2", 25.9584),
    "format-5-lora": ("7a40d87", "data-2", 31.3320),
}
"""Run -> the commit that wrote it, its data, and the sum of all weights (their absolute values) that this
commit reached at step 9."""

DATA_FORMATS = {"data-1-first": 1, "data-1": 1, "data-2-unsealed": 2, "data-2": 2, "pairs": 3}
"""Data folder -> its format. The first of format 1 has no numbers of tokens."""


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files, which is the working folder."""
    for name in ("golden.tar.xz", "golden-ngrams.tar.xz", "golden-formats.tar.xz", "golden-pairs.tar.xz"):
        with tarfile.open(Path(__file__).with_name(name)) as archive:
            archive.extractall(tmp_path, **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "kind"), [("data", "char"), ("bytes", "byte"), ("bpe", "bpe")])
def test_data_folders_load(golden: Path, name: str, kind: str) -> None:
    dataset = load_dataset(golden / name)
    assert dataset.tokenizer.to_dict()["kind"] == kind
    text = dataset.tokenizer.decode(map(int, dataset.train))
    assert text.startswith("The owl and the pussy-cat went to sea\nIn a beautiful")


def test_a_folder_of_pairs_loads(golden: Path) -> None:
    dataset = load_dataset(golden / "pairs")
    assert dataset.val_mask is not None
    counted = dataset.val[:][dataset.val_mask[:] == 1]
    completions = "Some honey, and plenty of money.<|endoftext|>A year and a day.<|endoftext|>"
    assert dataset.tokenizer.decode(counted.tolist()) == completions
    assert dataset.tokenizer.decode(dataset.val[: dataset.first_prompt].tolist()) == "What did they take?\n"


@pytest.mark.parametrize("name", RUNS)
def test_models_give_the_logits_that_they_gave(golden: Path, name: str) -> None:
    path = golden / name / ("ckpt.pt" if name == "fsdp" else "last.pt")
    model, _ = load_model(path, "cpu")
    logits = model(torch.tensor([[0, 1, 2]]))[0]
    torch.testing.assert_close(logits[0, -1, :5], torch.tensor(LOGITS[name]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_resumed_to_their_end_and_sampled(golden: Path, name: str, capsys) -> None:
    saved = RunFolder(Path(name)).saved_config()
    assert saved is not None
    assert saved.data_dir == RUNS[name]
    result = fit(replace(saved, resume=True, max_iters=9, out_dir=name))
    assert (result.step, result.reason) == (9, "finished")
    capsys.readouterr()
    sample(SampleConfig(checkpoint=f"{name}/last.pt", prompt="The owl", num_tokens=5, device="cpu"))
    assert capsys.readouterr().out.startswith("The owl")


def test_ngram_tables_go_on_as_they_were(golden: Path) -> None:
    """The same rows, and the same optimizer: the sums at step 9 are those that the commit itself reached."""
    saved = RunFolder(Path("ngram-run")).saved_config()
    assert saved is not None
    assert saved.ngram_pairs == "hashed"
    fit(replace(saved, resume=True, max_iters=9, out_dir="ngram-run"))
    weights = load_checkpoint(Path("ngram-run/last.pt")).model
    for name, total in (("ngram_embedding.pairs", 22.7496), ("ngram_embedding.triples", 23.2074)):
        assert weights[f"{name}.weight"].abs().sum().item() == pytest.approx(total, rel=1e-4)


def test_every_format_has_a_file(golden: Path) -> None:
    formats = {torch.load(f"{name}/last.pt", weights_only=True)["format"] for name in FORMATS}
    assert formats == set(range(1, checkpoints.FORMAT_VERSION + 1))
    assert set(DATA_FORMATS.values()) == set(range(1, vocab_file.MASKED_VERSION + 1))
    for name, version in DATA_FORMATS.items():
        assert torch.load(f"{name}/vocab.pt", weights_only=True)["format"] == version


@pytest.mark.parametrize("name", [name for name in DATA_FORMATS if name != "pairs"])
def test_data_of_every_format_loads(golden: Path, name: str) -> None:
    data = load_dataset(Path(name), verify_bytes=None)
    assert data.tokenizer.decode(map(int, data.train)).startswith("1 A small wheel turns within a larger one")
    assert (len(data.train), len(data.val)) == (491, 55)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_resumed_to_where_its_own_commit_came(golden: Path, name: str, capsys) -> None:
    _, data, total = FORMATS[name]
    saved = RunFolder(Path(name)).saved_config()
    assert saved is not None
    assert saved.data_dir == data
    result = fit(replace(saved, resume=True, max_iters=9, out_dir=name))
    assert (result.step, result.reason) == (9, "finished")
    reached = load_checkpoint(Path(name) / "last.pt")
    weights = reached.average or reached.model
    assert sum(weight.abs().sum().item() for weight in weights.values()) == pytest.approx(total, rel=1e-4)
    capsys.readouterr()
    sample(SampleConfig(checkpoint=f"{name}/last.pt", prompt="A small", num_tokens=5, device="cpu"))
    assert capsys.readouterr().out.startswith("A small")


@pytest.mark.parametrize("name", [*FORMATS, *DATA_FORMATS])
def test_every_format_is_described(golden: Path, name: str, capsys) -> None:
    assert run_command("info", [name, "--verify", "--json"], "info") == 0
    found = json.loads(capsys.readouterr().out)
    version = DATA_FORMATS[name] if name in DATA_FORMATS else int(name.split("-")[1])
    assert found["version"].startswith(f"format {version}")
    assert found["tokenizer"]["vocab_size"] == (34 if name == "pairs" else 29)
    if name in FORMATS:
        _, data, _ = FORMATS[name]
        assert found["data"]["folder"] == data
        assert found["data"]["folder_has_it"] is True
        assert found["progress"]["step"] == 6
        assert [point["step"] for point in found["curve"]] == [3, 6]
        assert run_command("info", ["--diff", name, f"{name}/last.pt", "--json"], "info") == 0
        weights = json.loads(capsys.readouterr().out)["weights"]
        assert len(weights) > 10
        assert {one["status"] for one in weights} == {"equal"}


def test_a_checkpoint_of_the_future_is_refused_with_what_it_needs(golden: Path, capsys) -> None:
    newest = checkpoints.FORMAT_VERSION
    content = torch.load("format-5/last.pt", weights_only=True) | {"format": newest + 1, "experts": 8}
    path = Path("format-5/last.pt")
    write_sealed(path, content)
    raw = path.read_bytes()
    named = ["--checkpoint", str(path)]
    for command in (["sample", *named], ["eval", *named], ["info", str(path)], ["info", "format-5"]):
        assert run_command(command[0], command[1:], command[0]) == 2
        says = f"has format {newest + 1}, and this NanoGPT ({__version__}) reads 1 to {newest}: update"
        assert says in capsys.readouterr().err
    assert run_command("train", ["--resume", "--out_dir", "format-5"], "train") == 2
    assert path.read_bytes() == raw


def test_data_of_the_future_are_refused_with_what_they_need(golden: Path, capsys) -> None:
    path = Path("data-2/vocab.pt")
    content = torch.load(path, weights_only=True)
    seals.save_with_checksum(path, content | {"format": 4}, save=torch.save)
    for command in (["train", "--data_dir", "data-2"], ["data", "info", "data-2"], ["info", "data-2"]):
        assert run_command(command[0], command[1:], command[0]) == 2
        says = (
            f"data-2 has format 4, and this NanoGPT ({__version__}) reads 1 to 3: update NanoGPT, or prepare"
        )
        assert says in capsys.readouterr().err
