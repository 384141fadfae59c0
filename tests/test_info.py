"""nanogpt info: every kind of file is described without its weights, compared, or refused in one line."""

import json
import math
import os
import pickle
import re
import shlex
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import prepared
from exported import LETTERS, QWEN3, checkpoint, saved, source
from hypothesis import given
from hypothesis import strategies as st
from test_initialize import nanogpt_weights, save_nanogpt

from nanogpt.checkpoint.format import load_checkpoint, save_checkpoint
from nanogpt.cli.main import run_command
from nanogpt.cli.parse import parse
from nanogpt.config import GPTConfig, TrainConfig, to_dict
from nanogpt.data.config import InspectConfig
from nanogpt.data.inspect import main as data_info
from nanogpt.export.registry import FORMATS, export
from nanogpt.export.source import Evaluation
from nanogpt.info.curve import ASCII_BARS, BARS, sparkline
from nanogpt.info.description import num_parameters
from nanogpt.info.difference import PIECE, compare, compare_tensors
from nanogpt.info.gguf_header import read_header
from nanogpt.info.registry import KINDS, describe
from nanogpt.info.show import curve_text, lines, wrap_command
from nanogpt.model.size import meta_model
from nanogpt.tokenizer.base import ByteTokenizer, CharTokenizer
from nanogpt.training.fit import fit

NAMES = {
    "hf": "exported",
    "gguf": "m.gguf",
    "safetensors": "m.safetensors",
    "html": "m.html",
    "onnx": "graph",
}


def info(*arguments: str | Path) -> int:
    """Run the command. Returns its exit code."""
    return run_command("info", [str(argument) for argument in arguments], "nanogpt info")


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """What the command prints with --json."""
    capsys.readouterr()
    assert info("--json", *arguments) == 0
    return json.loads(capsys.readouterr().out)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What the command prints."""
    capsys.readouterr()
    assert info(*arguments) == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The line with which the command refuses."""
    capsys.readouterr()
    assert info(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


# --- our own files ---


def test_a_checkpoint_says_what_it_holds(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)  # where no folder `data` is
    path = saved(tmp_path / "ckpt.pt", ema_decay=0.0, **QWEN3)
    found, held = as_json(capsys, path), load_checkpoint(path)
    assert found["config"] == to_dict(held.model_config)
    assert found["parameters"] == meta_model(held.model_config).num_parameters()
    assert found["training"] == json.loads(json.dumps(held.config))
    assert found["tokenizer"]["vocab_size"] == LETTERS.vocab_size
    assert found["data"] == {"fingerprint": "f" * 64, "folder": "data", "folder_has_it": None}
    assert found["progress"]["step"] == 12
    assert found["bytes"] == path.stat().st_size
    assert found["sizes"]["weights"] == sum(weight.nbytes for weight in held.model.values())
    again = parse(TrainConfig, shlex.split(found["recipe"])[2:], "train")
    assert to_dict(again) == held.config


def test_weights_that_share_memory_are_counted_once(tmp_path: Path, capsys) -> None:
    path = saved(tmp_path / "ckpt.pt")
    weights = load_checkpoint(path).model
    total = sum(weight.nbytes for name, weight in weights.items() if name != "head.weight")
    assert as_json(capsys, path)["sizes"]["weights"] == total


def test_no_weight_is_read_unless_it_is_verified(tmp_path: Path, capsys) -> None:
    """All bytes of the largest weight are changed: only --verify and --diff see it."""
    path = saved(tmp_path / "ckpt.pt")
    before = as_json(capsys, path)
    assert printed(capsys, path, "--verify").count("verified") == 1
    raw, weight = path.read_bytes(), load_checkpoint(path).model["blocks.0.mlp.fc.weight"].numpy().tobytes()
    path.write_bytes(raw.replace(weight, bytes(len(weight))))
    assert as_json(capsys, path) == before
    for arguments in ([path, "--verify"], ["--diff", path, path]):
        assert "is damaged (its checksum does not match)" in refusal(capsys, *arguments)


def test_a_run_folder(config: TrainConfig, capsys) -> None:
    fit(config)
    out = Path(config.out_dir)
    text, found = printed(capsys, out), as_json(capsys, out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    assert [(point["step"], point["val_loss"]) for point in found["curve"]] == losses
    assert found["data"]["folder_has_it"] is True
    assert "Curve" in text
    assert re.search(r"Newest +last\.pt, step 30: weights", text)
    (out / "previous" / "1").mkdir(parents=True)
    assert "Earlier runs" in printed(capsys, out)
    prepared(Path(config.data_dir), "Another text, without numbers.\n" * 9, overwrite=True)
    assert as_json(capsys, out)["data"]["folder_has_it"] is False
    (out / "last.pt").write_bytes(b"cut short")
    assert info(out) == 2
    said = capsys.readouterr()
    assert "last.pt, which cannot be read" in said.out.replace("\n" + " " * 14, " ")
    assert said.err.startswith(f"error: {out / 'last.pt'} ")
    assert info("--json", out) == 2
    said = capsys.readouterr()
    assert said.err == f"error: {json.loads(said.out)['damage']}\n"
    (out / "ckpt.pt").write_bytes((out / "ckpt.pt").read_bytes()[:-50])
    assert "is none of" in refusal(capsys, out)


def test_one_damaged_checkpoint_of_two_is_found_by_verify_alone(config: TrainConfig, capsys) -> None:
    fit(config)
    out = Path(config.out_dir)
    assert as_json(capsys, out, "--verify")["damage"] is None
    raw = bytearray((out / "last.pt").read_bytes())
    raw[len(raw) // 2] ^= 1
    (out / "last.pt").write_bytes(raw)
    assert info(out) == 0
    capsys.readouterr()
    assert info(out, "--verify") == 2
    said = capsys.readouterr()
    assert "Best          ckpt.pt, step " in said.out
    assert said.err.startswith(
        f"error: checkpoint {out / 'last.pt'} is damaged (its checksum does not match)"
    )
    assert said.err.count("\n") == 1


def test_a_data_folder_says_what_data_info_says(data_dir: Path, capsys) -> None:
    found, text = as_json(capsys, data_dir), printed(capsys, data_dir, "--verify")
    data_info(InspectConfig(data_dir=str(data_dir)))
    other = capsys.readouterr().out
    for number in (found["data"]["train_tokens"], found["data"]["val_tokens"], found["data"]["bytes"]):
        assert f"{number:,} " in other
        assert f"{number:,} " in text
    assert found["data"]["fingerprint"] in other
    raw = bytearray((data_dir / "val.pt").read_bytes())
    raw[-1] ^= 1
    (data_dir / "val.pt").write_bytes(raw)
    assert as_json(capsys, data_dir) == found
    assert "val.pt is damaged" in refusal(capsys, data_dir, "--verify")


# --- exports and other programs ---


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_is_described_as_its_checkpoint(name: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / NAMES[name]
    model = source(**QWEN3)
    export(model, name, path)
    found = as_json(capsys, path)
    if name != "onnx":
        assert found["parameters"] == model.num_weights + (2 * model.config.n_embd if name == "gguf" else 0)
    files = [file for file in (path, *path.rglob("*")) if file.is_file()]
    assert found["bytes"] == sum(file.stat().st_size for file in files)
    if name in ("gguf", "onnx"):
        assert found["tokenizer"]["vocab_size"] == LETTERS.vocab_size + 1  # the end of a text
    else:
        theirs, ours = GPTConfig(**found["config"]), model.config
        assert replace(theirs, n_kv_head=theirs.n_kv_head or theirs.n_head, dropout=0.0) == ours
    assert all(len(line) <= 80 for line in printed(capsys, path).replace(str(path), "m").splitlines())
    assert "has no checksums" in refusal(capsys, path, "--verify")


def test_an_export_differs_in_no_name_that_it_leaves_out(tmp_path: Path, capsys) -> None:
    model = source(init_from="/home/somebody/base", data_dir="/home/somebody/data")
    save_checkpoint(tmp_path / "ckpt.pt", model.saved)
    export(model, "safetensors", tmp_path / "m.safetensors")
    found = as_json(capsys, "--diff", tmp_path / "ckpt.pt", tmp_path / "m.safetensors")
    assert found["settings"]["training"] == {}


@pytest.mark.parametrize(("name", "dtype"), [("hf", "f32"), ("safetensors", "f32"), ("safetensors", "bf16")])
def test_the_weights_of_an_export_are_compared_with_the_checkpoint(
    name: str, dtype: str, tmp_path: Path, capsys
) -> None:
    path, model = tmp_path / NAMES[name], source()
    save_checkpoint(tmp_path / "ckpt.pt", model.saved)
    export(model, name, path, dtype=dtype)
    found = as_json(capsys, "--diff", tmp_path / "ckpt.pt", path)
    assert {one["name"] for one in found["weights"]} == set(model.weights)
    for one in found["weights"]:
        weight = model.weights[one["name"]]
        rounded = weight.to({"f32": torch.float32, "bf16": torch.bfloat16}[dtype]).float()
        assert one["largest"] == pytest.approx((weight - rounded).abs().max().item())
    text = printed(capsys, "--diff", tmp_path / "ckpt.pt", path)
    assert ("all equal" in text) is (dtype == "f32")


def test_the_header_of_gguf_is_as_the_library_reads_it(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    export(source(**QWEN3), "gguf", path, dtype="q8_0")
    header, reader = read_header(path), gguf.GGUFReader(path)
    for name, value in header.settings.items():
        if value is not None:
            read = reader.fields[name].contents()
            assert read == (pytest.approx(value) if isinstance(value, float) else value)
    tensors = {
        one.name: (one.tensor_type.name.lower(), tuple(map(int, one.shape[::-1]))) for one in reader.tensors
    }
    assert tensors == {name: tuple(one) for name, one in header.tensors.items()}


def test_a_gguf_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path, cut = tmp_path / "m.gguf", tmp_path / "cut.gguf"
    export(source(), "gguf", path)
    raw = path.read_bytes()
    end = raw.index(b"blk.1.ffn_down.bias")
    for length in range(4, end, max(1, end // 60)):
        cut.write_bytes(raw[:length])
        with pytest.raises(Exception, match="no GGUF file that can be read"):
            read_header(cut)


@given(st.integers(4, 400), st.binary(min_size=1, max_size=8))
def test_a_gguf_with_any_bytes_changed_is_read_or_refused(
    gguf_bytes: tuple[bytes, Path], at: int, change: bytes
) -> None:
    raw, path = gguf_bytes
    path.write_bytes(raw[:at] + change + raw[at + len(change) :])
    try:
        text = list(lines(describe(path)))
    except Exception as error:
        assert type(error).__name__ == "UserError"  # noqa: PT017 - either end is right
    else:
        assert text


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    """The bytes of a GGUF file, and a path to write others to."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    export(source(), "gguf", path)
    return path.read_bytes(), path


def test_a_checkpoint_of_nanogpt(tmp_path: Path, capsys) -> None:
    """Its own file or its folder; its characters are known only where its meta.pkl is."""
    weights = nanogpt_weights(7, bias=True)
    folder = save_nanogpt(tmp_path / "theirs", weights, 7, bias=True, compiled=True)
    assert "meta.pkl, which says which, is missing" in refusal(capsys, folder)
    meta = {
        "vocab_size": 7,
        "itos": dict(enumerate("abcdefg")),
        "stoi": {c: i for i, c in enumerate("abcdefg")},
    }
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    for path in (folder, folder / "ckpt.pt"):
        found = as_json(capsys, path)
        assert found["progress"] == {"step": 10, "best_val_loss": 1.5}
        assert found["config"]["n_embd"] == 32
    text = printed(capsys, folder)
    assert "a checkpoint of nanoGPT" in text
    assert "'abcdefg'" in text
    again = as_json(capsys, "--diff", folder, folder / "ckpt.pt")
    assert {one["status"] for one in again["weights"]} == {"equal"}


def test_a_folder_of_litgpt(tmp_path: Path, capsys) -> None:
    """The file of weights is not opened, and need not be one."""
    settings = (
        "{name: small, block_size: 64, vocab_size: 65, padded_vocab_size: 70, n_layer: 2, n_embd: 32, "
        "n_head: 4, norm_class_name: RMSNorm, norm_eps: 1.0e-6, parallel_residual: false, bias: false, "
        "rotary_percentage: 1.0}"
    )
    (tmp_path / "model_config.yaml").write_text(settings)
    (tmp_path / "lit_model.pth").write_bytes(b"weights")
    found = as_json(capsys, tmp_path)
    assert found["kind"] == "a folder of litgpt"
    assert (found["config"]["positions"], found["config"]["n_layer"]) == ("rope", 2)
    assert found["sizes"]["lit_model.pth"] == 7
    assert "no tokenizer.json" in found["notes"]["Tokenizer"]


def test_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("nanogpt.initialize.hf.download", lambda name: pytest.fail("a download"))
    monkeypatch.setattr(
        "nanogpt.initialize.original.existing_tokenizer", lambda name: pytest.fail("a download")
    )
    assert "does not exist" in refusal(capsys, "gpt2")
    folder = save_nanogpt(
        tmp_path / "large", nanogpt_weights(50304, bias=False), 50304, bias=False, compiled=False
    )
    assert "gpt2, 50,257 tokens" in printed(capsys, folder)


# --- refused ---


class Evil:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("__import__('pathlib').Path('ran').touch()",)


def hostile_files() -> dict[str, Any]:
    """Name -> what makes the file or folder of that name."""
    return {
        "empty.pt": lambda path: path.write_bytes(b""),
        "text.txt": lambda path: path.write_text("To be, or not to be\n"),
        "zeros.pt": lambda path: path.write_bytes(bytes(5000)),
        "pickle.pt": lambda path: path.write_bytes(pickle.dumps(Evil())),
        "code.pt": lambda path: torch.save({"model": Evil(), "model_args": {}}, path),
        "sealed.pt": lambda path: sealed(path, Evil()),
        "other.zip": lambda path: zipfile.ZipFile(path, "w").close(),
        "other.html": lambda path: path.write_text("<html><script id='model'>{}</script></html>"),
        "bad.gguf": lambda path: path.write_bytes(b"GGUF" + b"\xff" * 100),
        "huge.gguf": lambda path: path.write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 16),
        "other.safetensors": lambda path: path.write_bytes((2).to_bytes(8, "little") + b"{}"),
        "bad.safetensors": lambda path: path.write_bytes(b"\xff" * 30),
        "folder": lambda path: (path.mkdir(), (path / "notes.txt").write_text("x")),
        "run": lambda path: (path.mkdir(), (path / "ckpt.pt").write_bytes(pickle.dumps(Evil()))),
        "llama": lambda path: (path.mkdir(), (path / "config.json").write_text('{"model_type": "llama"}')),
        "broken": lambda path: (path.mkdir(), (path / "config.json").write_text("{")),
        "chat": lambda path: (
            path.mkdir(), (path / "meta_1.json").write_text("{}"), torch.save({}, path / "model_1.pt")
        ),
        "data": lambda path: (path.mkdir(), torch.save({"format": 2, "x": Evil()}, path / "vocab.pt")),
        "pipe": lambda path: os.mkfifo(path, 0o600),  # Windows has none, and collects this file too
    }  # fmt: skip


def sealed(path: Path, content: object) -> None:
    """A file with a valid seal, whatever its content."""
    from nanogpt.checkpoint.format import write_sealed

    write_sealed(path, content)


@pytest.mark.parametrize("name", hostile_files())
def test_what_is_none_of_ours_or_hostile_is_one_line_and_runs_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile_files()[name](Path(name))
    line = refusal(capsys, name)
    assert name in line
    assert refusal(capsys, "--diff", name, name) == line
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_cut_anywhere_is_refused(tmp_path: Path, capsys) -> None:
    raw = saved(tmp_path / "ckpt.pt", n_layer=1, n_embd=8).read_bytes()
    for length in {0, 1, 100, *range(len(raw) - 41, len(raw), 8), *range(0, len(raw), len(raw) // 40)}:
        (tmp_path / "cut.pt").write_bytes(raw[:length])
        refusal(capsys, tmp_path / "cut.pt")


def test_a_part_of_a_data_folder_names_the_folder(data_dir: Path, capsys) -> None:
    assert f"give the folder, {data_dir}" in refusal(capsys, data_dir / "train.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"n_layer": 10**12, "n_head": 2, "n_embd": 8, "vocab_size": 3}}, None),
        ({"config": {"n_layer": 1, "n_head": 2, "n_embd": 2**40, "vocab_size": 2**40}}, "too large"),
        ({"config": {"n_expert": 8}}, "update NanoGPT"),
        ({"step": "x", "val_loss": "x", "training": 3, "data_fingerprint": 7}, None),
        ({"version": 2}, "update NanoGPT"),
    ],
    ids=["layers", "width", "unknown", "types", "version"],
)
def test_safetensors_with_odd_metadata(
    change: dict[str, Any], message: str | None, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "m.safetensors"
    described = {
        "version": 1,
        "config": {"vocab_size": 3},
        "tokenizer": CharTokenizer("abc").to_dict(),
        **change,
    }
    header = json.dumps({"__metadata__": {"nanogpt": json.dumps(described)}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    if message is None:
        assert "parameters" in printed(capsys, path)
    else:
        assert message in refusal(capsys, path)


@pytest.mark.parametrize(("name", "dtype"), [("gguf", "q8_0"), ("gguf", "bf16"), ("safetensors", "f16")])
def test_an_export_cut_short_is_damaged(name: str, dtype: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / NAMES[name]
    export(source(n_embd=48), name, path, dtype=dtype)
    raw = path.read_bytes()
    assert "parameters" in printed(capsys, path)
    for length in (len(raw) - 1, len(raw) - 40, len(raw) // 2):
        path.write_bytes(raw[:length])
        assert "cut short" in refusal(capsys, path)


def adapter(folder: Path, **settings: Any) -> Path:
    """A folder of adapters, of which peft_type and r are as peft writes them."""
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    folder.mkdir()
    content = {"peft_type": "LORA", "r": 4, "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    tensors = {"layer.lora_A.weight": torch.ones(4, 6), "layer.lora_B.weight": torch.ones(8, 4)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_adapters_say_what_they_are_for(tmp_path: Path, capsys) -> None:
    targets = ["attn.c_attn", "mlp.c_fc"]
    mine = adapter(tmp_path / "mine", base_model_name_or_path="gpt2", target_modules=targets)
    text = printed(capsys, mine)
    assert re.search(r"^Model +56 parameters: LORA, rank 4$", text, re.MULTILINE)
    assert re.search(r"^Weights +56 in f32$", text, re.MULTILINE)
    assert re.search(r"^Base model +gpt2$", text, re.MULTILINE)
    assert re.search(r"^Targets +attn.c_attn, mlp.c_fc$", text, re.MULTILINE)
    assert re.search(
        r"^Sizes +adapter_config.json \d+ bytes, adapter_model.safetensors \d+", text, re.MULTILINE
    )
    assert "bias" not in text  # that of adapters, which is not the setting of ours
    other = adapter(tmp_path / "other", target_modules="all-linear", r=8)
    difference = printed(capsys, "--diff", mine, other)
    assert "r: 4 in A, 8 in B" in difference
    assert "2 tensors, all equal" in difference


@pytest.mark.parametrize("content", ["{", "[]", '{"r": {}, "target_modules": {}}', "{}"])
def test_odd_adapters_are_described_or_refused(content: str, tmp_path: Path, capsys) -> None:
    folder = adapter(tmp_path / "mine")
    (folder / "adapter_config.json").write_text(content)
    assert info(folder) in (0, 2)
    assert len(capsys.readouterr().err.splitlines()) <= 1
    (folder / "adapter_model.safetensors").unlink()
    refusal(capsys, folder)


def test_verification_tells_how_far_it_is(tmp_path: Path, data_dir: Path, config: TrainConfig) -> None:
    fit(config)
    for path, files in (
        (data_dir, data_dir.glob("t*.pt")),
        (Path(config.out_dir), Path(config.out_dir).glob("*.pt")),
        (Path(config.out_dir, "ckpt.pt"), [Path(config.out_dir, "ckpt.pt")]),
    ):
        done: list[int] = []
        describe(path, verified=True, advance=done.append)
        assert sum(done) >= 0.9 * sum(
            file.stat().st_size for file in files
        )  # a seal is no part of what it seals
        describe(path, advance=lambda count: pytest.fail("nothing is to be verified"))


def test_diff_takes_two(capsys) -> None:
    assert "--diff takes two files or folders, and 1 is given" in refusal(capsys, "--diff", "a")


# --- differences ---


def test_what_differs_is_named(tmp_path: Path, capsys) -> None:
    """A setting, the tokenizer, the data, the step; a weight that has another shape, and one too many."""
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    first = checkpoint(CharTokenizer("abc"), n_layer=1)
    save_checkpoint(a, first)
    other = checkpoint(CharTokenizer("abde"), n_layer=1, qk_norm=True, learning_rate=0.5)
    weight = other.model["final_norm.weight"].clone()
    weight[3] += 0.25
    save_checkpoint(
        b,
        replace(
            other,
            model={**other.model, "final_norm.weight": weight},
            fingerprint="e" * 64,
            progress={**other.progress, "step": 20},
        ),
    )
    found = as_json(capsys, "--diff", a, b)
    settings = found["settings"]
    assert settings["architecture"] == {
        "qk_norm": {"a": False, "b": True},
        "vocab_size": {"a": 3, "b": 4},
    }
    assert settings["training"] == {"learning_rate": {"a": 3e-4, "b": 0.5}}
    assert settings["data"] == {"fingerprint": {"a": "f" * 64, "b": "e" * 64}}
    assert settings["progress"] == {"step": {"a": 12, "b": 20}}
    by_name = {one["name"]: one for one in found["weights"]}
    assert by_name["token_embedding.weight"]["status"] == "other shape"
    assert by_name["blocks.0.attn.q_norm.weight"]["status"] == "only in B"
    assert "head.weight" not in by_name
    text = printed(capsys, "--diff", a, b)
    assert re.search(r"Only in A +1 token: 'c'", text)
    assert re.search(r"Only in B +2 tokens: 'd' 'e'", text)
    assert all(len(line) <= 80 for line in text.replace(str(tmp_path), "").splitlines())


def test_the_average_is_what_is_compared(tmp_path: Path) -> None:
    """With --ema_decay, sampling uses the average; the trained weights are another matter."""
    one = checkpoint()
    moved = {name: weight + 1 for name, weight in one.model.items()}
    save_checkpoint(tmp_path / "a.pt", one)
    save_checkpoint(tmp_path / "b.pt", replace(one, model=moved, average=one.model))
    found = compare(describe(tmp_path / "a.pt"), describe(tmp_path / "b.pt"))
    assert {weight.status for weight in found.weights} == {"equal"}


def test_kinds_without_common_weights_are_compared_in_the_rest(
    tmp_path: Path, data_dir: Path, capsys
) -> None:
    path = saved(tmp_path / "ckpt.pt", ByteTokenizer())
    export(source(), "gguf", tmp_path / "m.gguf")
    found = as_json(capsys, "--diff", path, tmp_path / "m.gguf")
    assert found["not_compared"]["weights"] == "B has none that can be compared"
    assert found["not_compared"]["architecture"] == "in other words"
    found = as_json(capsys, "--diff", data_dir, path)
    assert found["settings"]["tokenizer"]["kind"] == {"a": "char", "b": "byte"}
    assert found["weights"] == []


@given(st.lists(st.floats(width=32), min_size=1, max_size=6), st.data())
def test_weights_are_compared_number_by_number(values: list[float], data: st.DataObject) -> None:
    others = [data.draw(st.one_of(st.just(value), st.floats(width=32))) for value in values]
    found = compare_tensors("w", torch.tensor(values), torch.tensor(others))
    same = [a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(values, others, strict=True)]
    assert (found.status == "equal") is all(same)
    if not all(same):
        x, y = torch.tensor(values), torch.tensor(others)
        apart = (x - y).abs()[~torch.tensor(same)]
        assert found.largest == pytest.approx(apart.max().item(), nan_ok=True)


def test_the_last_piece_of_a_weight_counts() -> None:
    a = torch.zeros(PIECE + 3)
    b = a.clone()
    b[-1] = 2.0
    assert compare_tensors("w", a, b).largest == 2.0
    found = compare_tensors("w", torch.full((4, 4), 2.0), torch.full((4, 4), 3.0, dtype=torch.bfloat16))
    assert (found.largest, found.relative) == (1.0, 0.5)


# --- on the screen ---


@pytest.mark.parametrize(
    "settings", [{}, QWEN3, {"ngram_vocab": 31, "mlp": "relu2"}], ids=["gpt2", "qwen3", "ngram"]
)
@pytest.mark.parametrize("layers", [1, 2, 7])
def test_parameters_are_those_of_the_model(settings: dict[str, Any], layers: int) -> None:
    config = GPTConfig(
        **{"n_layer": layers, "n_head": 4, "n_embd": 16, "block_size": 8, "vocab_size": 9} | settings
    )
    assert num_parameters(config) == meta_model(config).num_parameters()


def test_a_sparkline() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([2.0, 2.0], 10) == BARS[0] * 2
    assert sparkline(list(range(8)), 8) == BARS
    assert sparkline([float(i // 2) for i in range(16)], 8, ASCII_BARS) == ASCII_BARS
    curve = [Evaluation(step, 4.0 / (1 + step)) for step in range(500)]
    text = curve_text(curve, BARS)
    assert text.startswith("4.00 █")
    assert text.endswith("▁ 0.01")
    assert len(text) == 66


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30), max_size=20)
)
def test_a_wrapped_command_is_the_same_to_a_shell(words: list[str]) -> None:
    command = shlex.join(words)
    wrapped = "\n".join(wrap_command(command, 40))
    assert shlex.split(wrapped.replace("\\\n", " ")) == words


def test_a_terminal_without_colors_or_unicode(
    tmp_path: Path, config: TrainConfig, monkeypatch, capsys
) -> None:
    fit(config)
    text = printed(capsys, config.out_dir)
    assert "\x1b" not in text
    assert set(BARS) & set(text)
    monkeypatch.setattr("nanogpt.cli.info.can_show", lambda text: False)
    assert not set(BARS) & set(printed(capsys, config.out_dir))


def test_every_kind_is_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "info.md").read_text("utf-8")
    assert not [row.title for row in KINDS if row.title not in page]
