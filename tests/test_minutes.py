"""--minutes: the choice of settings, the decision when the rate decays, and the time that is kept."""

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.checkpoint.format import Progress, load_checkpoint, save_checkpoint
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.cli.parse import parse
from nanogpt.config import TrainConfig, decay_spans, model_config
from nanogpt.distributed.world import ALONE
from nanogpt.errors import UserError
from nanogpt.machine.device import pick_device
from nanogpt.model.size import flops_per_token, meta_model
from nanogpt.training import autosize, deadline
from nanogpt.training import fit as fit_module
from nanogpt.training import run as run_module
from nanogpt.training.autosize import Text, choose_settings
from nanogpt.training.checkpointing import BYTES_PER_SECOND
from nanogpt.training.fit import fit
from nanogpt.training.optimizer import learning_rate, lr_multiplier
from nanogpt.training.run import Deadline

CPU = pick_device("cpu")
SHAKESPEARE = Text(1_003_854, 111_540, 65)


@pytest.fixture
def speed(monkeypatch):
    """A machine on which a token takes its FLOPs over `speed.flops` seconds, and no time is measured."""
    machine = SimpleNamespace(flops=2e11, measured=[])

    def seconds_per_token(config, vocab_size, _device, _dtype, **_):
        machine.measured.append((config.n_layer, config.n_embd))
        return flops_per_token(meta_model(model_config(config, vocab_size))) / machine.flops

    monkeypatch.setattr(autosize, "seconds_per_token", seconds_per_token)
    return machine


# --- the choice ---


def test_more_time_is_a_larger_model_that_sees_more_tokens(speed, capsys):
    chosen = [choose_settings(TrainConfig(minutes=m), SHAKESPEARE, CPU) for m in (0.2, 1, 5, 20, 60)]
    sizes = [flops_per_token(meta_model(model_config(config, 65))) for config in chosen]
    tokens = [config.max_iters * config.batch_size * config.block_size for config in chosen]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 3 * sizes[0]
    assert tokens[-1] > 1.5 * tokens[0]
    assert capsys.readouterr().out.count("\n") == 3 * len(chosen)


def test_a_faster_machine_has_a_larger_model(speed):
    small = choose_settings(TrainConfig(minutes=5), SHAKESPEARE, CPU)
    speed.flops *= 100
    large = choose_settings(TrainConfig(minutes=5), SHAKESPEARE, CPU)
    assert (large.n_embd, large.block_size) > (small.n_embd, small.block_size)


def test_a_text_that_is_seen_often_is_regularized(speed):
    little, much = (
        choose_settings(TrainConfig(minutes=20), replace(SHAKESPEARE, train_tokens=n), CPU)
        for n in (100_000, 100_000_000)
    )
    assert (little.dropout, little.weight_decay) > (0.0, 0.0)
    assert (much.dropout, much.weight_decay) == (0.0, 0.0)


def test_a_text_too_short_for_the_time_ends_early_with_a_small_model_and_small_batches(speed, capsys):
    speed.flops = 1e14
    config = choose_settings(TrainConfig(minutes=5), SHAKESPEARE, CPU)
    batch = config.batch_size * config.block_size
    assert config.max_iters == SHAKESPEARE.useful_tokens(tables=False) // batch
    assert batch == autosize.SPARE_BATCH
    assert (config.ngram_vocab, config.dropout) == (0, 0.2)
    size = flops_per_token(meta_model(model_config(replace(config, block_size=1), 65)))
    assert size <= autosize.FLOPS_PER_CHARACTER * SHAKESPEARE.train_tokens
    assert "the text is too short" in (said := capsys.readouterr().out)
    assert "16.0 times the text, and it ends early" in said
    longer = replace(SHAKESPEARE, train_tokens=10**9)
    assert choose_settings(TrainConfig(minutes=5), longer, CPU).ngram_vocab > 0
    assert "early" not in capsys.readouterr().out


def test_a_text_that_is_seen_often_has_tables_and_a_longer_context_or_is_seen_more_often_without(speed):
    speed.flops = 3e11
    chosen = [choose_settings(TrainConfig(minutes=minutes), SHAKESPEARE, CPU) for minutes in (5, 15, 30)]
    times = [c.max_iters * c.batch_size * c.block_size / SHAKESPEARE.train_tokens for c in chosen]
    assert times[0] < times[1] <= autosize.TABLE_REPEATS + 0.01
    assert autosize.PLAIN_REPEATS < times[2] <= autosize.MAX_REPEATS
    assert [config.ngram_vocab for config in chosen] == [32_768, 32_768, 0]
    assert [config.block_size for config in chosen] == [128, 256, 256]


def test_a_short_text_has_a_shallow_model_with_small_tables_and_is_seen_less_often(speed):
    text = replace(SHAKESPEARE, train_tokens=200_000)
    config = choose_settings(TrainConfig(minutes=60), text, CPU)
    assert config.n_layer < autosize.DEEP
    assert config.ngram_vocab == autosize.MIN_ROWS
    assert config.max_iters * config.batch_size * config.block_size / 200_000 == pytest.approx(4, rel=0.1)


def test_given_settings_stay(speed):
    config = TrainConfig(minutes=5, n_layer=3, n_head=6, fixed=("n_head", "dropout"), mlp="swiglu")
    chosen = choose_settings(config, SHAKESPEARE, CPU)
    assert (chosen.n_layer, chosen.n_head, chosen.dropout, chosen.mlp) == (
        3,
        6,
        TrainConfig.dropout,
        "swiglu",
    )
    assert chosen.n_embd % 12 == 0
    chosen = choose_settings(TrainConfig(minutes=5, n_embd=120), SHAKESPEARE, CPU)
    assert chosen.n_embd == 120
    assert chosen.n_embd % chosen.n_head == 0


def test_a_given_batch_says_how_many_updates_there_are(speed, capsys):
    few, many = (choose_settings(TrainConfig(minutes=1, batch_size=n), SHAKESPEARE, CPU) for n in (512, 16))
    assert few.max_iters * 512 == pytest.approx(many.max_iters * 16, rel=0.1)
    choose_settings(TrainConfig(minutes=1, batch_size=10**6), SHAKESPEARE, CPU)
    assert "about 1 update of" in capsys.readouterr().out


def test_flags_that_are_given_are_fixed_even_at_their_default():
    config = parse(TrainConfig, ["--minutes", "5", "--n-layer=6", "--no-bias"], "train")
    assert {"minutes", "n_layer", "bias"} <= set(config.fixed)
    assert not parse(TrainConfig, ["--n-layer=6"], "train").fixed


@pytest.mark.parametrize("train_tokens", [10, 300, 5000])
def test_any_text_gets_settings_that_it_is_long_enough_for(speed, train_tokens):
    chosen = choose_settings(TrainConfig(minutes=10), Text(train_tokens, 5, 7), CPU)
    assert chosen.block_size < train_tokens


def test_measuring_takes_a_small_part_of_the_time(speed, monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def seconds_per_token(*_, **__):
        clock.now += 2.0
        return 1e-9

    monkeypatch.setattr(autosize, "seconds_per_token", seconds_per_token)
    monkeypatch.setattr(autosize.time, "perf_counter", lambda: clock.now)
    choose_settings(TrainConfig(minutes=1), SHAKESPEARE, CPU)
    first = last = 2.0  # the first shape pays for what a training pays anyway, and the last is not cut off
    assert clock.now <= first + 60 * autosize.MEASURING_SHARE + last


def test_who_says_when_it_ends_is_clear(speed):
    config = parse(TrainConfig, ["--minutes", "5", "--max_iters", "100"], "train")
    with pytest.raises(UserError, match="--minutes decides when the training ends, and so does --max_iters"):
        choose_settings(config, SHAKESPEARE, CPU)
    preset = parse(TrainConfig, ["--minutes", "5", "--preset", "qwen3"], "train")
    chosen = choose_settings(preset, SHAKESPEARE, CPU)
    assert (chosen.schedule, chosen.mlp, chosen.n_kv_head) == ("constant", "swiglu", 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"minutes": 0.0}, "--minutes 0.0"),
        ({"minutes": -1.0}, "--minutes -1.0"),
        ({"fixed": ("layers",)}, "--fixed layers"),
        ({"decays": ("10",)}, "--decays 10"),
        ({"decays": ("10:5",)}, "--decays 10:5"),
        ({"decays": ("20:50", "10:40")}, "not in the order"),
    ],
)
def test_mistakes_are_named(flags, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**flags)


# --- the rate ---


def test_a_constant_rate_decays_linearly():
    config = TrainConfig(schedule="constant", warmup_iters=0, min_lr=0.0, max_iters=100, decays=("60:100",))
    rates = [lr_multiplier(step, config) for step in range(101)]
    assert rates[:61] == [1.0] * 61
    assert rates[80] == pytest.approx(0.5)
    assert rates[100] == 0.0


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 200)), max_size=4),
    st.integers(0, 300),
)
def test_a_new_decay_begins_where_the_rate_is_and_changes_nothing_before(pairs, step):
    spans, start = [], 0
    for gap, length in pairs:
        start += gap
        spans.append((start, start + length))
    decays = tuple(f"{a}:{b}" for a, b in spans)
    assert decay_spans(decays) == spans
    config = TrainConfig(schedule="constant", warmup_iters=0, max_iters=10_000, decays=decays)
    if spans:
        before = replace(config, decays=decays[:-1])
        for earlier in range(spans[-1][0] + 1):
            assert lr_multiplier(earlier, config) == lr_multiplier(earlier, before)
    assert lr_multiplier(step + 1, config) <= lr_multiplier(step, config)


# --- the time ---


def big(run):
    """The tensors of a run that takes a second to save."""
    return {"weight": torch.empty(int(BYTES_PER_SECOND) // 4, device="meta")}


class FakeRun(SimpleNamespace):
    """As much of a run as keep_to_time uses, on a machine with a clock of its own."""

    def __init__(self, minutes, clock, update_s):
        config = TrainConfig(
            minutes=minutes, schedule="constant", cooldown=0.7, max_iters=10**6, eval_interval=300
        )
        super().__init__(config=config, progress=Progress(), world=ALONE, first_step=0, saved=[])
        self.deadline, self.clock, self.update_s = Deadline(clock.now), clock, update_s
        self.disk = BYTES_PER_SECOND
        self.deadline.evaluation_s = 10 * update_s(0.0)
        self.dataset = SimpleNamespace(
            train=range(10**9), val=range(20_000), tokenizer=SimpleNamespace(vocab_size=65)
        )
        self.checkpointer = SimpleNamespace(
            begin_save=self.begin_save, finish_save=self.finish_save, saved_step=0, pending=None,
            bytes_per_second=BYTES_PER_SECOND,
        )  # fmt: skip
        self.console = SimpleNamespace(set_total=lambda _: None)

    def begin_save(self, run):
        self.checkpointer.pending = run.progress.step, run.config.decays

    def finish_save(self):
        """The newest decisions are durable from here on."""
        if self.checkpointer.pending:
            self.checkpointer.saved_step, decays = self.checkpointer.pending
            self.saved.append(decays)
            self.checkpointer.pending = None

    def train(self):
        while self.progress.step < self.config.max_iters:
            deadline.keep_to_time(self)
            for start, end in decay_spans(self.config.decays):  # saved before it is acted on
                assert self.progress.step < start or f"{start}:{end}" in self.saved[-1]
            if self.progress.step % self.config.eval_interval == 0 != self.progress.step:
                self.evaluate()
            self.clock.now += self.update_s(self.clock.now)
            self.progress.step += 1
        deadline.keep_to_time(self)
        self.evaluate()
        self.clock.now += 2 * big(self)["weight"].nbytes / self.disk  # ckpt.pt and last.pt

    def evaluate(self):
        self.clock.now += 10 * self.update_s(self.clock.now)
        self.progress.evaluated_at = self.progress.step
        deadline.keep_to_time(self)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(now=100.0)
    monkeypatch.setattr(run_module, "time", SimpleNamespace(perf_counter=lambda: now.now))
    monkeypatch.setattr(deadline, "named_tensors", big)
    return now


@pytest.mark.parametrize(
    "slowdown",
    [
        lambda _: 1.0,
        lambda t: 3.0 if t > 130 else 1.0,  # another program, before the decay
        lambda t: 3.0 if t > 180 else 1.0,  # in the decay
        lambda t: 0.3 if t > 180 else 1.0,
        lambda t: 3.0 if t % 40 < 20 else 1.0,
    ],
    ids=["steady", "slow soon", "slow late", "fast late", "to and fro"],
)
def test_the_time_is_kept_whatever_becomes_of_the_machine(clock, slowdown, capsys):
    run = FakeRun(2.0, clock, lambda t: 0.05 * slowdown(t))
    run.train()
    assert clock.now - 100 == pytest.approx(120, rel=0.1)
    assert run.config.decays == run.saved[-1]
    assert len(run.saved) < 15
    assert lr_multiplier(run.config.max_iters - 1, run.config) < 0.2
    first = decay_spans(run.config.decays)[0]
    assert "The learning rate falls from step" in capsys.readouterr().out
    assert first[0] > 10


def test_a_slow_disk_has_its_time_at_the_end(clock):
    run = FakeRun(1.0, clock, lambda _: 0.05)
    run.disk = run.checkpointer.bytes_per_second = BYTES_PER_SECOND / 8  # 16 s for two files
    run.train()
    assert clock.now - 100 == pytest.approx(60, rel=0.03)


def test_a_training_ends_when_the_text_has_no_more_to_teach(clock):
    run = FakeRun(2.0, clock, lambda _: 0.05)
    run.dataset.train = range(64 * 256 * 50)
    run.train()
    assert run.progress.step == autosize.MAX_REPEATS * 50
    assert clock.now - 100 < 60
    tables = FakeRun(2.0, clock, lambda _: 0.05)
    tables.dataset.train = range(64 * 256 * 50)
    tables.config = replace(tables.config, ngram_vocab=1000)
    tables.train()
    assert tables.progress.step == Text.of(tables.dataset).useful_tokens(tables=True) // (64 * 256)
    assert tables.progress.step < run.progress.step
    assert lr_multiplier(run.config.max_iters - 1, run.config) < 0.2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.3, 3.0), min_size=6, max_size=6))
def test_the_time_is_kept_on_any_machine(factors):
    with pytest.MonkeyPatch.context() as patch:
        now = SimpleNamespace(now=0.0)
        patch.setattr(run_module, "time", SimpleNamespace(perf_counter=lambda: now.now))
        patch.setattr(deadline, "named_tensors", big)
        run = FakeRun(2.0, now, lambda t: 0.03 * factors[min(5, int(t / 20))])
        run.train()
    # A machine that becomes many times faster at the very end is done early: the rate is near 0 by then.
    assert 0.8 * 120 < now.now < 1.1 * 120 + 5


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.02, 0.6), min_size=8, max_size=8))
def test_a_decision_never_begins_before_an_earlier_one(seconds):
    """With few updates, on a machine whose speed changes at each."""
    with pytest.MonkeyPatch.context() as patch:
        now = SimpleNamespace(now=0.0)
        patch.setattr(run_module, "time", SimpleNamespace(perf_counter=lambda: now.now))
        patch.setattr(deadline, "named_tensors", big)
        run = FakeRun(0.06, now, lambda t: seconds[int(t / 0.4) % 8])
        run.train()  # decay_spans refuses any other order
    assert run.config.decays


# --- whole trainings ---


@pytest.fixture
def short(config: TrainConfig, monkeypatch) -> TrainConfig:
    """A training of a few seconds whose model is given, by a clock that is the same on any machine."""
    looks, start = itertools.count(), time.perf_counter()
    clock = SimpleNamespace(perf_counter=lambda: start + 0.01 * next(looks))
    monkeypatch.setattr(run_module, "time", clock)
    monkeypatch.setattr(fit_module, "time", clock)
    monkeypatch.setattr(fit_module, "measure_evaluation", lambda _: 0.1)
    return replace(config, minutes=0.06, n_layer=1, n_head=2, n_embd=32, block_size=16, batch_size=8)


def test_a_repetition_with_the_recorded_numbers_is_the_same_training(short, tmp_path, capsys):
    result = fit(short)
    assert result.reason == "finished"
    folder = RunFolder(Path(short.out_dir))
    saved = folder.saved_config()
    assert saved.decays
    assert saved.max_iters == result.step
    again = replace(saved, minutes=None, out_dir=str(tmp_path / "again"))
    fit(again)
    ours, theirs = (load_checkpoint(Path(c.out_dir) / "last.pt") for c in (saved, again))
    torch.testing.assert_close(ours.model, theirs.model, rtol=0, atol=0)
    assert "For 0.06 min: 1 layer of 32" in capsys.readouterr().out


def test_a_resumed_run_counts_what_was_used_and_keeps_what_was_decided(short):
    fit(short)
    path = Path(short.out_dir) / "last.pt"
    before = load_checkpoint(path)
    assert before.progress["used_s"] > 0
    before = replace(before, progress=before.progress | {"used_s": 60 * short.minutes})
    save_checkpoint(path, before)
    result = fit(replace(before.train_config, resume=True, max_iters=before.progress["step"] + 3))
    assert result.step <= before.progress["step"] + 3
    after = load_checkpoint(path)
    assert after.progress["used_s"] >= before.progress["used_s"]
    assert after.train_config.decays[: len(before.train_config.decays)] == before.train_config.decays


def test_metrics_have_the_rates_of_the_decay(short):
    fit(replace(short, log_interval=1))
    rows = [json.loads(line) for line in (Path(short.out_dir) / "metrics.jsonl").read_text().splitlines()]
    saved = RunFolder(Path(short.out_dir)).saved_config()
    rates = {row["step"]: row["lr"] for row in rows if "lr" in row}
    assert rates == {step: learning_rate(step - 1, saved) for step in range(1, saved.max_iters + 1)}
    assert rates[saved.max_iters] < max(rates.values()) == short.learning_rate
