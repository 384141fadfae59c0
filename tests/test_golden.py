"""What an earlier version wrote still loads, resumes and samples: data folders, checkpoints, a sharded one.

golden.tar.xz was written by commit 6c7079b, before the packages: data folders of characters (data), bytes
(bytes) and byte-pair tokens (bpe); runs on the first with Muon and an average (run), on the last with AdamW
(bpe-run), on the second with FSDP in two processes (fsdp). All of 6 steps. golden-ngrams.tar.xz
was written by commit 0d9ba82, when pairs of tokens were hashed and AdamW updated the n-gram tables.
"""

import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanogpt.checkpoint.format import load_checkpoint, load_model
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.cli.sample import main as sample
from nanogpt.data.dataset import load_dataset
from nanogpt.inference.config import SampleConfig
from nanogpt.training.fit import fit

GOLDEN = Path(__file__).with_name("golden.tar.xz")

RUNS = {"run": "data", "bpe-run": "bpe", "fsdp": "bytes"}

LOGITS = {
    "run": [0.196800, 0.117140, 0.255959, -0.267133, -0.282976],
    "bpe-run": [-0.610873, -0.670017, -0.635452, -0.647812, -0.600874],
    "fsdp": [-0.600230, -0.521285, -0.691612, -0.570463, -0.535095],
}
"""The first logits for the tokens 0, 1, 2, as that commit computed them."""


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files, which is the working folder."""
    for path in (GOLDEN, GOLDEN.with_name("golden-ngrams.tar.xz")):
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path, **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "kind"), [("data", "char"), ("bytes", "byte"), ("bpe", "bpe")])
def test_data_folders_load(golden: Path, name: str, kind: str) -> None:
    dataset = load_dataset(golden / name)
    assert dataset.tokenizer.to_dict()["kind"] == kind
    text = dataset.tokenizer.decode(map(int, dataset.train))
    assert text.startswith("The owl and the pussy-cat went to sea\nIn a beautiful")


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
