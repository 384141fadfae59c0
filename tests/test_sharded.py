"""A sharded checkpoint is complete or passed over, and holds the tensors as they were when the save began."""

import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nanogpt.checkpoint import sharded
from nanogpt.checkpoint.format import load_checkpoint, save_checkpoint
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.config import TrainConfig
from nanogpt.errors import UserError


@pytest.fixture
def alone_in_a_group():
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sharded.background_group.cache_clear()
    yield
    sharded.background_group.cache_clear()
    dist.destroy_process_group()


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4, 6)}, 2: {"exp_avg": torch.randn(6)}}
    weights = {
        "token_embedding.weight": torch.randn(4, 6),
        "blocks.0.norm.weight": torch.randn(6, dtype=torch.bfloat16),
    }
    return sharded.flatten(weights, {"token_embedding.weight": torch.randn(4, 6)}, [moments, {}])


def test_flatten_and_unflatten_are_inverse():
    model, average = {"a.b": torch.ones(1)}, {"a.b": torch.ones(2)}
    states = [{3: {"exp_avg": torch.ones(3), "step": torch.ones(4)}}, {}]
    assert sharded.unflatten(sharded.flatten(model, average, states), 2) == (model, average, states)


def test_what_is_written_is_what_the_tensors_were(alone_in_a_group, tensors, tmp_path):
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    writing = sharded.begin_save(tmp_path / "5", tensors)
    for tensor in tensors.values():
        tensor.zero_()  # the training goes on
    digests = writing.result()
    assert set(digests) == {path.name for path in (tmp_path / "5").iterdir()}
    sharded.verify(tmp_path / "5", digests)
    found = sharded.load_full(tmp_path / "5")
    assert found.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    sharded.load(tmp_path / "5", tensors)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())


def test_a_folder_that_cannot_be_written_is_an_error(alone_in_a_group, tensors, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"^cannot write .*/file/5: Not a directory$"):
        sharded.begin_save(tmp_path / "file" / "5", tensors).result()


def written(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return sharded.begin_save(folder, tensors).result()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_damage_is_noticed(alone_in_a_group, tensors, tmp_path, name):
    digests = written(tmp_path, tensors)
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        sharded.verify(tmp_path, digests)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        sharded.verify(tmp_path, digests)


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_hostile_index_runs_nothing(alone_in_a_group, tensors, tmp_path):
    written(tmp_path / "5", tensors)
    (tmp_path / "5" / sharded.INDEX).write_bytes(pickle.dumps(Hostile(tmp_path / "touched")))
    with pytest.raises(UserError, match="is not a checkpoint"):
        sharded.load_full(tmp_path / "5")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"plain": 1})])
def test_an_index_that_is_none_is_an_error(tmp_path, content):
    (tmp_path / sharded.INDEX).write_bytes(content)
    with pytest.raises(UserError, match="is not a checkpoint"):
        sharded.shapes(tmp_path)


def test_an_index_of_objects_is_refused(alone_in_a_group, tmp_path):
    """torch.distributed.checkpoint would unpickle them."""
    sharded.begin_save(tmp_path, {"model.a": torch.ones(1), "model.b": "text"}).result()  # pyright: ignore
    with pytest.raises(UserError, match="BytesStorageMetadata is not allowed"):
        sharded.shapes(tmp_path)


def test_what_is_not_there_cannot_be_read(alone_in_a_group, tensors, tmp_path):
    written(tmp_path, tensors)
    with pytest.raises(UserError, match=r"^cannot read .*model\.more"):
        sharded.load(tmp_path, {"model.more": torch.empty(1)})
    (tmp_path / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"^cannot read .*No such file or directory"):
        sharded.load_full(tmp_path)


# A run folder


@pytest.fixture
def folder(alone_in_a_group, config: TrainConfig, tmp_path) -> RunFolder:
    """A run: ckpt.pt at step 10, and a sharded last.pt at step 11."""
    from nanogpt.training.fit import fit

    fit(replace(config, max_iters=10))
    folder = RunFolder(Path(config.out_dir))
    saved = load_checkpoint(folder.last)
    states = [optimizer["state"] for optimizer in saved.optimizers]
    digests = written(folder.shards / "11", sharded.flatten(saved.model, saved.average, states))
    header = replace(
        saved,
        model={}, average={}, optimizers=[group | {"state": {}} for group in saved.optimizers],
        progress=saved.progress | {"step": 11},
        shards={f"shards/11/{name}": digest for name, digest in digests.items()},
    )  # fmt: skip
    save_checkpoint(folder.last, header)
    return folder


def test_the_shards_of_a_checkpoint_are_gathered(folder):
    best, last = load_checkpoint(folder.best), load_checkpoint(folder.last)
    assert last.shards == {}
    assert last.optimizers[0]["param_groups"] == best.optimizers[0]["param_groups"]
    for name, tensor in best.model.items():
        assert torch.equal(last.model[name], tensor)
    for index, moments in best.optimizers[0]["state"].items():
        for name, moment in moments.items():
            assert torch.equal(last.optimizers[0]["state"][index][name], moment)


def test_the_shards_may_move_with_the_folder(folder, tmp_path):
    folder.path.rename(tmp_path / "elsewhere")
    assert load_checkpoint(tmp_path / "elsewhere" / "last.pt").progress["step"] == 11


def test_a_checkpoint_with_a_damaged_shard_is_passed_over(folder):
    said: list[str] = []
    assert folder.newest_valid(said.append).progress["step"] == 11
    (folder.shards / "11" / "__0_0.distcp").write_bytes(b"torn")
    for gather in (True, False):
        said.clear()
        assert folder.newest_valid(said.append, gather=gather).progress["step"] == 10
        assert len(said) == 2
        assert said[1] == "Going on from step 10 instead"
        assert said[0].endswith("is damaged (its checksum does not match): passing it over")


def test_an_earlier_run_is_archived_with_its_shards(folder):
    previous = folder.archive_previous()
    assert previous is not None
    assert load_checkpoint(previous / "last.pt").progress["step"] == 11
    assert not folder.shards.exists()


def test_other_shards_are_deleted(folder):
    for name in ("3", "12"):
        (folder.shards / name).mkdir()
    folder.delete_shards(keep=folder.shards / "11")
    assert [path.name for path in folder.shards.iterdir()] == ["11"]


def test_gathering_needs_no_process_group_and_warns_of_nothing(folder):
    dist.destroy_process_group()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_checkpoint(folder.last).progress["step"] == 11
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
