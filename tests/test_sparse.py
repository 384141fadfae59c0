"""Sparse updates of tables equal dense ones, torch.optim.SparseAdam is the oracle of RowAdam."""

import copy
import math

import pytest
import torch
from torch import nn

from nanogpt.config import GPTConfig, TrainConfig
from nanogpt.model.gpt import GPT
from nanogpt.training.ema import TABLE_INTERVAL, ema_decay, update_ema
from nanogpt.training.optimizer import build_optimizers, step_optimizers
from nanogpt.training.sparse import (
    DECAY_INTERVAL,
    TABLE_RATE,
    RowAdam,
    clip_grad_norm,
    sparse_tables,
    use_sparse_gradients,
)

SETTINGS = TrainConfig(
    learning_rate=0.1, beta2=0.9, weight_decay=0.0, grad_clip=0.5, optimizer="muon", ema_decay=0.9
)


def make_model(vocab_size=11, **fields):
    torch.manual_seed(1)
    shape = {
        "block_size": 8,
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "dropout": 0.0,
        "ngram_vocab": 150,
        "bias": False,
    }
    return GPT(GPTConfig(vocab_size=vocab_size, **{**shape, **fields}))


def train(model, settings, steps=6, micro_batches=1):
    optimizers = build_optimizers(model, settings, torch.float32)
    for step in range(steps):
        torch.manual_seed(step)
        x, y = torch.randint(11, (2, 4, 8))
        for part_x, part_y in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            (model.loss(part_x, part_y) / micro_batches).backward()
        norm = clip_grad_norm(model, settings.grad_clip)
        step_optimizers(optimizers, skip=~norm.isfinite(), is_async=False)
        model.zero_grad()
    return norm


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_touched_rows_alone_give_the_numbers_of_the_dense_update(weight_decay, micro_batches):
    settings = TrainConfig(**{**vars(SETTINGS), "weight_decay": weight_decay})
    dense, sparse = make_model(), make_model()
    use_sparse_gradients(sparse)
    steps = 2 * DECAY_INTERVAL + 2
    norms = [train(model, settings, steps, micro_batches) for model in (dense, sparse)]
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(dense.state_dict(), sparse.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_sparse", [True, False])
def test_the_oracle_is_sparse_adam_without_momentum(is_sparse):
    torch.manual_seed(1)
    ours, theirs = (nn.Embedding(40, 6, sparse=True) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizers = [
        RowAdam(ours.parameters(), SETTINGS),
        torch.optim.SparseAdam(theirs.parameters(), lr=0.1 * TABLE_RATE, betas=(0.0, 0.9)),
    ]
    ours.sparse = is_sparse
    for step in range(5):
        idx = torch.randint(8 * (step + 1), (3, 7))
        for table, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            table(idx).cos().square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("is_sparse", [True, False])
def test_all_rows_decay_once_in_several_updates_by_as_much_as_in_all(is_sparse):
    torch.manual_seed(1)
    table = nn.Embedding(5, 3, sparse=is_sparse)
    before = table.weight.detach().clone()
    optimizer = RowAdam(table.parameters(), TrainConfig(learning_rate=0.01, weight_decay=0.5))
    for step in range(2 * DECAY_INTERVAL):
        optimizer.zero_grad()
        table(torch.tensor([2, 3])).sum().backward()
        optimizer.step()
        kept = (1 - 0.01 * TABLE_RATE * 0.5) ** ((step + 1) // DECAY_INTERVAL * DECAY_INTERVAL)
        torch.testing.assert_close(table.weight[[0, 1, 4]], kept * before[[0, 1, 4]])


def test_untouched_rows_stay_and_are_not_even_averaged():
    table = nn.Embedding(5, 3)
    before = table.weight.detach().clone()
    optimizer = RowAdam(table.parameters(), TrainConfig(weight_decay=0.5))
    table(torch.tensor([2, 3])).sum().backward()
    optimizer.step()
    changed = (table.weight != before).any(dim=1)
    assert changed.tolist() == [False, False, True, True, False]
    assert (optimizer.state[table.weight]["exp_avg_sq"] != 0).any(dim=1).equal(changed)


@pytest.mark.parametrize("is_sparse", [True, False])
def test_a_broken_step_changes_nothing_without_an_if(is_sparse):
    table = nn.Embedding(5, 3, sparse=is_sparse)
    optimizer = RowAdam(table.parameters(), TrainConfig())
    table(torch.tensor([2, 3])).sum().backward()
    optimizer.step()
    before = copy.deepcopy((table.state_dict(), optimizer.state_dict()["state"]))
    table.zero_grad()
    (table(torch.tensor([1, 3])) * math.inf).sum().backward()
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = (table.state_dict(), optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_clipping_without_a_limit_only_measures():
    model = make_model()
    use_sparse_gradients(model)
    x, y = torch.randint(11, (2, 4, 8))
    model.loss(x, y).backward()
    norm = clip_grad_norm(model, math.inf)
    gradients = [parameter.grad.to_dense() for parameter in model.parameters()]
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in gradients]).norm())
    clip_grad_norm(model, 0.1)
    clipped = torch.cat([parameter.grad.to_dense().flatten() for parameter in model.parameters()])
    torch.testing.assert_close(clipped.norm(), torch.tensor(0.1), rtol=1e-4, atol=0)


def test_models_of_earlier_versions_keep_their_optimizer():
    model = make_model(ngram_pairs="hashed")
    assert not sparse_tables(model)
    assert not any(isinstance(optimizer, RowAdam) for optimizer in build_optimizers(model, SETTINGS, None))


def test_the_average_of_a_table_moves_once_for_several_updates():
    weights, dense_average = make_model(), make_model()
    average = copy.deepcopy(dense_average)
    sparse_weights = copy.deepcopy(weights)
    use_sparse_gradients(sparse_weights)
    for step in range(TABLE_INTERVAL):
        with torch.no_grad():
            for model in (weights, sparse_weights):
                model.head.weight += 1
                model.ngram_embedding.triples.weight.fill_(3.0)
        update_ema(dense_average, weights, step, SETTINGS)
        update_ema(average, sparse_weights, step, SETTINGS)
        torch.testing.assert_close(average.head.weight, dense_average.head.weight)
    assert ema_decay(TABLE_INTERVAL - 1, SETTINGS) < 0.9
    for table in ("pairs", "triples"):  # their weights were constant: the same but for roundings
        found, wanted = (getattr(model.ngram_embedding, table).weight for model in (average, dense_average))
        torch.testing.assert_close(found, wanted)
