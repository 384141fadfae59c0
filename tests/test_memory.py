"""Memory is counted before an update as it turns out to be; a limit on it is seen."""

from dataclasses import replace

import pytest
import torch

from nanogpt.config import TrainConfig, model_config
from nanogpt.machine import cores, device
from nanogpt.model.gpt import GPT
from nanogpt.model.size import meta_model
from nanogpt.training import memory_estimate
from nanogpt.training import optimizer as optim_module
from nanogpt.training.memory_estimate import Memory
from nanogpt.training.optimizer import build_optimizers

SMALL = TrainConfig(n_layer=3, n_head=2, n_embd=64, block_size=64, batch_size=8, device="cpu")
CPU = torch.device("cpu")


def predict(config: TrainConfig, micro: int = 8, processes: int = 1, dtype=torch.float32) -> Memory:
    return memory_estimate.predict(model_config(config, 65), config, CPU, dtype, micro, processes)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_gradients_and_optimizer_state_are_those_of_a_real_update(optimizer):
    config = replace(SMALL, optimizer=optimizer)
    predicted = predict(config)
    model = GPT(model_config(config, 65))
    optimizers = build_optimizers(model, config, torch.bfloat16)
    x, y = torch.randint(65, (2, 8, 64))
    model.loss(x, y).backward()
    for one in optimizers:
        one.step()
    assert predicted.weights == sum(p.nbytes for p in model.parameters())
    assert predicted.gradients == sum(p.grad.nbytes for p in model.parameters())
    states = [state for one in optimizers for state in one.state.values()]
    moments = sum(value.nbytes for state in states for value in state.values() if torch.is_tensor(value))
    assert predicted.optimizer == pytest.approx(moments, rel=0.01)


def test_activations_are_at_least_what_autograd_keeps():
    """And grow with the batch; checkpointing saves most of them."""
    torch.manual_seed(1)
    model = GPT(model_config(SMALL, 65))
    kept: dict[int, torch.Tensor] = {}
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.loss(*torch.randint(65, (2, 8, 64)))
    least = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in mine)
    off, half, selective, blocks = (
        predict(replace(SMALL, grad_checkpoint=mode), micro).activations
        for mode, micro in (("off", 8), ("off", 4), ("selective", 8), ("blocks", 8))
    )
    assert least <= off <= 2 * least
    assert half == pytest.approx(off / 2, rel=0.1)
    assert blocks < 0.7 * off
    assert blocks < selective < 0.9 * off


def test_averaged_weights_count():
    assert predict(replace(SMALL, ema_decay=0.9)).weights == 2 * predict(SMALL).weights


@pytest.mark.parametrize("mode", ["off", "selective", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_many_layers_follow_from_few(monkeypatch, mode, dtype, optimizer):
    config = replace(SMALL, n_layer=7, grad_checkpoint=mode, optimizer=optimizer)
    followed = predict(config, dtype=dtype)
    monkeypatch.setattr(memory_estimate, "FEW_LAYERS", 7)
    assert followed == predict(config, dtype=dtype)


LLAMA = {
    "positions": "rope",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "n_kv_head": 1,
    "qk_norm": True,
    "bias": False,
}


@pytest.mark.parametrize(
    ("settings", "vocab_size", "dtype", "kind"),
    [
        ({}, 65, torch.float32, "cpu"),
        ({"optimizer": "muon", "ema_decay": 0.9, "n_layer": 1}, 5000, torch.bfloat16, "cuda"),
        (LLAMA, 65, torch.bfloat16, "cpu"),
        (LLAMA | {"n_embd": 16, "head_dim": 256, "batch_size": 64}, 65, torch.float32, "cpu"),
        ({"flash_attn": False, "n_head": 8, "block_size": 256}, 65, torch.float32, "cuda"),
        ({"ngram_vocab": 4096, "mlp": "relu2", "logit_cap": 15.0}, 1100, torch.bfloat16, "cuda"),
        ({"dropout": 0.2, "mlp_width": 700, "n_embd": 32, "batch_size": 1}, 5000, torch.float32, "cpu"),
        ({"block_size": 8, "batch_size": 2, "n_layer": 5, "tied": False}, 65, torch.bfloat16, "cuda"),
    ],
    ids=str,
)
def test_no_update_takes_more_than_the_formula_says(settings, vocab_size, dtype, kind):
    config = replace(SMALL, **settings)
    shape = model_config(config, vocab_size)
    with device.simulated(device.KINDS[kind]):
        counted = memory_estimate.predict(shape, config, CPU, dtype, config.batch_size)
    bound = memory_estimate.at_most(shape, meta_model(shape).num_parameters(), config.batch_size)
    assert counted.total - counted.weights <= bound


def test_counting_takes_no_memory_and_leaves_no_trace():
    state = torch.get_rng_state()
    huge = replace(SMALL, n_layer=96, n_head=96, n_embd=12_288, block_size=2048)
    assert predict(huge, 512).total > 2**41
    assert torch.equal(torch.get_rng_state(), state)


def test_a_shard_of_a_model_takes_its_share_and_what_is_gathered():
    config = replace(SMALL, parallel="fsdp")
    full, shard = predict(config), predict(config, processes=4)
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(shard, name) == pytest.approx(getattr(full, name) / 4, abs=1)
    assert full.gathered == 0
    assert shard.activations == full.activations + shard.gathered
    assert shard.gathered < 3 * full.weights
    extra = shard.need(CPU) - shard.total - shard.activations
    assert extra == pytest.approx(1.25 * (full.weights + full.optimizer), abs=2)
    assert shard.need(torch.device("cuda")) == shard.total


def test_muon_takes_a_few_matrices_at_a_time(monkeypatch):
    config = replace(SMALL, optimizer="muon", grad_checkpoint="blocks", n_layer=8)
    at_once = predict(config, micro=1).step
    monkeypatch.setattr(optim_module, "MAX_STACKED_ELEMENTS", 1)
    assert predict(config, micro=1).step < at_once / 4


def test_a_cpu_that_stands_in_for_a_gpu_counts_without_its_own_ways():
    """On a GPU attention in bfloat16 keeps no (T, T) weights, and dropout keeps a bit for each activation."""
    config = replace(SMALL, block_size=512, dropout=0.2)
    usual = predict(config, dtype=torch.bfloat16)
    with device.simulated(device.KINDS["cuda"]):
        elsewhere = predict(config, dtype=torch.bfloat16)
    assert elsewhere.activations < 0.7 * usual.activations
    assert elsewhere.held == usual.held
    assert predict(config, dtype=torch.bfloat16) == usual


class Unpadded(type(device.KINDS["cuda"])):
    """A GPU that takes any number of logits."""

    vocab_multiple = 1


@pytest.mark.parametrize("vocab_size", [1100, 5000])  # in one, and in chunks
def test_a_padded_output_layer_is_counted(vocab_size):
    """Wider logits and one more copy of the weight; in one, a second gradient of the logits too."""
    config, counted = replace(SMALL, block_size=512, n_layer=2), []
    for kind in (Unpadded(), device.KINDS["cuda"]):
        with device.simulated(kind):
            shape = model_config(config, vocab_size)
            counted.append(memory_estimate.predict(shape, config, CPU, torch.bfloat16, 4))
    plain, padded = counted
    columns = -(-vocab_size // 128) * 128
    copies = 2 * columns * SMALL.n_embd if vocab_size == 5000 else 2 * 4 * 512 * columns
    assert plain.held == padded.held
    assert plain.activations < padded.activations < plain.activations * columns / vocab_size + 1.1 * copies


def test_a_loss_in_many_chunks_is_counted(monkeypatch):
    """Of all logits only those of a chunk exist at once."""
    shape, config = model_config(SMALL, 5000), replace(SMALL, block_size=64)
    whole = memory_estimate.predict(shape, config, CPU, torch.bfloat16, 8)
    monkeypatch.setattr(device.CPU, "logits_per_chunk", 5000 * 64)
    chunked = memory_estimate.predict(shape, config, CPU, torch.bfloat16, 8)
    assert chunked.held == whole.held
    assert chunked.activations < whole.activations - 5000 * 64 * 4


# How much is free


@pytest.fixture
def limits(tmp_path, monkeypatch):
    """Write the files of a control group."""
    monkeypatch.setattr(cores, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(cores, "CGROUP_MEMBERSHIP", tmp_path / "membership")

    def write(folder: str, files: dict[str, str]):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)

    return write


STAT = "anon 1\ninactive_file 300\n"


@pytest.mark.parametrize(
    ("root", "line", "limit", "usage"),
    [
        ("", "0::{}\n", "memory.max", "memory.current"),
        ("memory/", "9:memory:{}\n", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_the_narrowest_control_group_counts(limits, tmp_path, root, line, limit, usage):  # noqa: PLR0917
    limits(f"{root}job", {limit: "5000", usage: "1000", "memory.stat": STAT})
    limits(f"{root}job/step", {limit: "9000", usage: "600", "memory.stat": STAT})
    (tmp_path / "membership").write_text(line.format("/job/step"))
    assert memory_estimate.cgroup_room() == 4300
    (tmp_path / "membership").write_text(line.format("/other"))
    assert memory_estimate.cgroup_room() == float("inf")


def test_no_limit_is_no_limit(limits, tmp_path):
    limits("job", {"memory.max": "max\n", "memory.current": "1000", "memory.stat": STAT})
    (tmp_path / "membership").write_text("0::/job\n")
    assert memory_estimate.cgroup_room() == float("inf")


def test_what_is_free_is_at_most_what_the_machine_has():
    assert 0 < memory_estimate.free(CPU) < 2**50
