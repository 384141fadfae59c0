"""A checkpoint comes back whole or not at all: damage is seen, hostile files run nothing."""

import os
import pickle
import random
import zipfile
from dataclasses import asdict, fields, replace

import pytest
import torch

from nanogpt import __version__
from nanogpt.checkpoint import format as checkpoints
from nanogpt.checkpoint.format import (
    FORMAT_VERSION,
    Checkpoint,
    Progress,
    load_checkpoint,
    peek,
    save_checkpoint,
    write_sealed,
)
from nanogpt.config import GPTConfig, TrainConfig, to_dict
from nanogpt.errors import UserError
from nanogpt.model.gpt import GPT
from nanogpt.tokenizer.base import CharTokenizer
from nanogpt.training.optimizer import adamw

CONFIG = TrainConfig(
    block_size=4, n_layer=1, n_head=2, n_embd=8, dropout=0.0, max_iters=9, learning_rate=0.01
)
CHARS = "abc\n\u00e9"


def train_a_step(model, optimizer, seed=1):
    x = torch.randint(len(CHARS), (2, 5), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x[:, :-1], x[:, 1:])[1].backward()
    optimizer.step()


def model_and_optimizer(seed=1):
    torch.manual_seed(seed)
    shape = {field.name: getattr(CONFIG, field.name) for field in fields(CONFIG)}
    names = {field.name for field in fields(GPTConfig)} - {"vocab_size"}
    model = GPT(GPTConfig(**{name: shape[name] for name in names}, vocab_size=len(CHARS)))
    return model, adamw(model.parameters(), CONFIG)


@pytest.fixture(scope="module")
def original():
    """The checkpoint of a small run after a step."""
    model, optimizer = model_and_optimizer()
    train_a_step(model, optimizer)
    return Checkpoint(
        config=to_dict(CONFIG),
        vocab_size=len(CHARS),
        progress=asdict(Progress(step=1, best_val_loss=1.0 / 3.0, elapsed_s=0.1)),
        model=model.state_dict(),
        average={},
        optimizers=[optimizer.state_dict()],
        scaler={"scale": 65536.0, "growth_factor": 2.0},
        precision={"device": "cpu", "dtype": "float32"},
        tokenizer=CharTokenizer.train(CHARS).to_dict(),
        fingerprint="0123abcd",
    )


@pytest.fixture
def path(tmp_path, original):
    """That checkpoint in a file."""
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, original)
    return path


@pytest.fixture(scope="module")
def raw(tmp_path_factory, original):
    """The bytes of that file."""
    path = tmp_path_factory.mktemp("raw") / "ckpt.pt"
    save_checkpoint(path, original)
    return path.read_bytes()


def same(a, b):
    """Equal in every value, type, dtype and order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Checkpoint):
        return same(vars(a), vars(b))
    return a == b


def refusal(path):
    with pytest.raises(UserError) as raised:
        load_checkpoint(path)
    message = str(raised.value)
    assert "\n" not in message
    return message


# Whole


def test_what_is_saved_is_loaded(path, original):
    loaded = load_checkpoint(path)
    assert same(loaded, original)
    assert loaded.format == FORMAT_VERSION
    assert loaded.train_config == CONFIG
    assert loaded.model_config == GPTConfig(
        block_size=4, n_layer=1, n_head=2, n_embd=8, dropout=0.0, vocab_size=len(CHARS)
    )
    assert Progress(**loaded.progress) == Progress(step=1, best_val_loss=1.0 / 3.0, elapsed_s=0.1)


def test_torch_reads_it_without_nanogpt(path, original):
    assert same(torch.load(path, weights_only=True), vars(original))


def test_the_comparison_sees_a_difference(original):
    model = dict(original.model)
    model["final_norm.bias"] = model["final_norm.bias"] + 1e-7
    assert not same(replace(original, model=model), original)
    assert not same(replace(original, vocab_size=float(original.vocab_size)), original)


def test_infinite_loss_and_empty_parts_survive(tmp_path, original):
    bare = replace(original, progress=asdict(Progress()), optimizers=[], scaler={})
    save_checkpoint(tmp_path / "bare.pt", bare)
    assert same(load_checkpoint(tmp_path / "bare.pt"), bare)


def test_training_goes_on_from_it_bit_for_bit(path):
    """The model and the optimizer of a file take the step that those in memory would have taken."""
    model, optimizer = model_and_optimizer()
    train_a_step(model, optimizer)
    loaded = load_checkpoint(path)
    other, other_optimizer = model_and_optimizer(seed=2)
    other.load_state_dict(loaded.model)
    other_optimizer.load_state_dict(loaded.optimizers[0])
    for seed in (2, 3):
        train_a_step(model, optimizer, seed)
        train_a_step(other, other_optimizer, seed)
    assert same(dict(model.state_dict()), dict(other.state_dict()))


def test_it_does_not_share_memory_with_the_model(tmp_path, original):
    save_checkpoint(tmp_path / "one.pt", original)
    loaded = load_checkpoint(tmp_path / "one.pt")
    loaded.model["final_norm.bias"].add_(1)
    assert not torch.equal(loaded.model["final_norm.bias"], original.model["final_norm.bias"])


def test_the_tied_weight_is_in_the_file_once(raw, original):
    tensors = sum(t.numel() * t.element_size() for name, t in original.model.items() if name != "head.weight")
    moments = 2 * tensors
    assert len(raw) < tensors + moments + 25_000


def test_saving_over_another_replaces_it(path, original):
    later = replace(original, progress=asdict(Progress(step=2)))
    save_checkpoint(path, later)
    assert same(load_checkpoint(path), later)
    assert os.listdir(path.parent) == ["ckpt.pt"]  # noqa: PTH208 - names alone


def test_a_quick_look_at_the_settings(path):
    assert peek(path) == (CONFIG, 1)


def test_settings_of_a_later_version(tmp_path, original):
    save_checkpoint(tmp_path / "later.pt", replace(original, config={**original.config, "n_expert": 8}))
    with pytest.raises(UserError, match=r"another version .*n_expert"):
        _ = load_checkpoint(tmp_path / "later.pt").train_config


def test_settings_that_an_earlier_version_did_not_have(tmp_path, original):
    config = {name: value for name, value in original.config.items() if name != "patience"}
    save_checkpoint(tmp_path / "earlier.pt", replace(original, config=config))
    assert load_checkpoint(tmp_path / "earlier.pt").train_config == CONFIG


def test_a_full_disk_leaves_the_old_file(path, original):
    resource = pytest.importorskip("resource")  # CPython ignores the signal SIGXFSZ; the write fails
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    larger = replace(original, scaler={"tensor": torch.zeros(500_000)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(UserError, match="cannot write"):
            save_checkpoint(path, larger)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(load_checkpoint(path), original)


# Damaged. Warnings are silenced: nobody turns them into errors where training runs.


@pytest.mark.filterwarnings("ignore")
def test_cut_short_anywhere(tmp_path, raw):
    lengths = {0, 1, 2, 100, len(raw) // 2, *range(len(raw) - 40, len(raw))}
    lengths |= {int(len(raw) * i / 150) for i in range(150)}
    path = tmp_path / "cut.pt"
    for length in sorted(lengths - {len(raw)}):
        path.write_bytes(raw[:length])
        assert str(path) in refusal(path), length


def flipped(raw, bit):
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def whole_or_refused(path, raw, original):
    """Whether a file with these bytes is refused; if it is not, its content must be the original's."""
    path.write_bytes(raw)
    try:
        loaded = load_checkpoint(path)
    except UserError as error:
        message = str(error)
    else:
        assert same(loaded, original)
        return False
    assert "\n" not in message
    return True


@pytest.mark.filterwarnings("ignore")
def test_a_flipped_bit_anywhere(tmp_path, raw, original):
    bits = random.Random(1).sample(range(8 * len(raw)), 500)
    refused = [whole_or_refused(tmp_path / "flip.pt", flipped(raw, bit), original) for bit in bits]
    assert sum(refused) > 50  # the rest is padding between the records


@pytest.mark.filterwarnings("ignore")
def test_a_flipped_bit_in_the_table_of_contents(tmp_path, raw, original):
    start = raw.index(b"PK\x01\x02")  # the zip archive's central directory
    bits = random.Random(2).sample(range(8 * start, 8 * len(raw)), 400)
    refused = [whole_or_refused(tmp_path / "flip.pt", flipped(raw, bit), original) for bit in bits]
    assert sum(refused) > 200


@pytest.mark.filterwarnings("ignore")
def test_a_flipped_bit_in_what_the_table_of_contents_says_of_a_tensor(tmp_path, original):
    """Every bit of the entry: none of them is under a checksum."""
    path = tmp_path / "flip.pt"
    small = replace(original, model={"weight": torch.arange(1.0, 9.0)}, optimizers=[])
    save_checkpoint(path, small)
    raw = path.read_bytes()
    end = raw.rindex(b"archive/data/0") + len("archive/data/0")
    start = raw.rindex(b"PK\x01\x02", 0, end)
    for bit in range(8 * start, 8 * end):
        whole_or_refused(path, flipped(raw, bit), small)


@pytest.mark.filterwarnings("ignore")
def test_a_flipped_bit_in_the_data(tmp_path, raw, original):
    """Every record is protected by its checksum, tensors and settings alike."""
    path = tmp_path / "flip.pt"
    path.write_bytes(raw)
    with zipfile.ZipFile(path) as archive:
        infos = [info for info in archive.infolist() if info.file_size]
        contents = [(info.filename, archive.read(info)) for info in infos]
    at = 0
    for name, content in contents:
        at = raw.index(content, raw.index(name.encode(), at))
        bit = random.Random(name).randrange(8 * len(content))
        assert whole_or_refused(path, flipped(raw, 8 * at + bit), original), name


@pytest.mark.filterwarnings("ignore")
def test_a_zeroed_or_foreign_block(tmp_path, raw, original):
    """What a lost sector looks like."""
    for start in range(0, len(raw), max(512, len(raw) // 40) // 512 * 512):
        for block in (bytes(512), random.Random(start).randbytes(512)):
            damaged = (raw[:start] + block + raw[start + 512 :])[: len(raw)]
            whole_or_refused(tmp_path / "block.pt", damaged, original)


# Not a checkpoint


def test_missing(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.pt")


def test_a_folder(tmp_path):
    refusal(tmp_path)


def test_a_name_too_long_for_any_file(tmp_path):
    refusal(tmp_path / ("x" * 300))


@pytest.mark.parametrize("content", [b"", b"PK", b"To be, or not to be\n" * 50, bytes(5000)])
def test_something_else(tmp_path, content):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(content)
    assert str(path) in refusal(path)


def test_another_zip_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "ckpt.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refusal(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"weight": torch.zeros(2)}},
        {"model": {}, "optimizer": {}, "model_args": {}, "iter_num": 5, "best_val_loss": 1.0, "config": {}},
        {"weight": torch.zeros(2)},
        {"format": None},
        torch.zeros(3),
        [1, 2, 3],
        "text",
        None,
        {},
    ],
    ids=lambda content: type(content).__name__,
)
@pytest.mark.parametrize("sealed", [True, False])
def test_a_foreign_torch_file(tmp_path, content, sealed):
    path = tmp_path / "model.pt"
    if sealed:
        write_sealed(path, content)
    else:
        torch.save(content, path)
    assert "is not a NanoGPT checkpoint" in refusal(path)


def test_a_prepared_vocabulary_is_no_checkpoint(tmp_path):
    """Its format has the same number."""
    path = tmp_path / "vocab.pt"
    torch.save(
        {"format": FORMAT_VERSION, "tokenizer": {"kind": "char", "chars": "ab"}, "fingerprint": "f"}, path
    )
    assert "is not a NanoGPT checkpoint" in refusal(path)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1.0", [1]])
def test_another_format(tmp_path, original, version):
    save_checkpoint(tmp_path / "ckpt.pt", replace(original, format=version))
    message = refusal(tmp_path / "ckpt.pt")
    assert f"has format {version}, and this NanoGPT ({__version__}) reads 1 to {FORMAT_VERSION}" in message


def test_a_newer_format_with_other_parts(tmp_path, original):
    write_sealed(tmp_path / "ckpt.pt", {**vars(original), "format": FORMAT_VERSION + 1, "experts": []})
    assert "update NanoGPT" in refusal(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: {"format": FORMAT_VERSION},
        lambda content: {**content, "experts": []},
        lambda content: {name: part for name, part in content.items() if name != "model"},
        lambda content: {**content, 7: "seven"},
    ],
    ids=["bare", "one-more", "one-less", "odd-key"],
)
def test_the_right_format_and_other_parts(tmp_path, original, change):
    path = tmp_path / "ckpt.pt"
    write_sealed(path, change(vars(original)))
    assert str(path) in refusal(path)


# Hostile


class Hostile:
    """Unpickled, it runs a command."""

    def __init__(self, call, argument):
        self.call, self.argument = call, argument

    def __reduce__(self):
        return self.call, (self.argument,)


def bare_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


def torch_file(content, path):
    torch.save(content, path)


def sealed_file(content, path):
    write_sealed(path, content)


def old_torch_file(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("call", [os.system, os.mkdir, eval], ids=["system", "mkdir", "eval"])
@pytest.mark.parametrize("where", ["all", "inside"])
@pytest.mark.parametrize("write", [bare_pickle, torch_file, old_torch_file, sealed_file])
def test_a_file_that_would_run_code(tmp_path, original, write, where, call):
    marker = tmp_path / "marker"
    argument = {
        os.system: f"mkdir {marker}",
        os.mkdir: str(marker),
        eval: f"__import__('os').mkdir({str(marker)!r})",
    }
    hostile = Hostile(call, argument[call])
    content = hostile if where == "all" else {**vars(original), "tokenizer": hostile}
    path = tmp_path / "ckpt.pt"
    write(content, path)
    assert str(path) in refusal(path)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is, the caller expects it
        peek(path)
    assert not marker.exists()
    if write is bare_pickle:
        pickle.loads(path.read_bytes())
        assert marker.exists()  # it would have


def test_weights_only_is_asked_for_whatever_the_environment_says(path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    asked = []
    real = torch.load
    monkeypatch.setattr(
        checkpoints.torch, "load", lambda *args, **kwargs: (asked.append(kwargs), real(*args, **kwargs))[1]
    )
    load_checkpoint(path)
    peek(path)
    assert [kwargs["weights_only"] for kwargs in asked] == [True, True]


def test_a_checkpoint_of_format_1(tmp_path, original):
    """What the first version wrote: one optimizer, no average, fewer settings, GELU by its approximation."""
    new = ("average", "optimizers")
    old = {name: value for name, value in vars(original).items() if name not in new}
    first = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "flash_attn", "max_iters", "seed")
    old |= {
        "format": 1,
        "optimizer": original.optimizers[0],
        "config": {name: original.config[name] for name in first},
        "progress": {"step": 3, "best_val_loss": 2.0, "evaluated_at": 2, "worse_evaluations": 0, "order": 0},
    }
    write_sealed(tmp_path / "ckpt.pt", old)
    loaded = load_checkpoint(tmp_path / "ckpt.pt")
    assert (loaded.format, loaded.average, len(loaded.optimizers)) == (FORMAT_VERSION, {}, 1)
    assert loaded.train_config.mlp == loaded.model_config.mlp == "gelu_tanh"
    assert Progress(**loaded.progress).step == 3
    assert peek(tmp_path / "ckpt.pt") == (loaded.train_config, 3)
