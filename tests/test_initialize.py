"""A training that starts from a trained model: every format gives the source's own logits, or is refused."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import prepared
from exported import qwen3
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.checkpoint.format import load_checkpoint, load_model
from nanogpt.cli.main import run_command
from nanogpt.cli.parse import parse
from nanogpt.config import TrainConfig, model_config, to_dict
from nanogpt.data.dataset import Dataset, load_dataset
from nanogpt.errors import UserError
from nanogpt.initialize import original
from nanogpt.initialize.registry import open_source
from nanogpt.initialize.start import first_weights, is_same
from nanogpt.model.gpt import GPT
from nanogpt.tokenizer.base import CharTokenizer
from nanogpt.tokenizer.bpe import BPETokenizer, gpt2_tokenizer, train_bpe
from nanogpt.tokenizer.registry import from_file
from nanogpt.training.fit import fit

SMALL_GPT2 = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
SMALL_QWEN3 = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}  # fmt: skip
PUBLISHED_QWEN3: dict[str, Any] = {
    "head_dim": 12, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}  # fmt: skip
"""What a published Qwen3 has unlike SMALL_QWEN3."""
TOKENS = 270


def shaken(model: nn.Module) -> nn.Module:
    """The model with all weights random: biases and gains too, which would be 0 and 1."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokens_of(folder: Path, text: str) -> Dataset:
    """A BPE in folder/tokenizer.json, and data with its tokens."""
    folder.mkdir(exist_ok=True)
    tokenizer = train_bpe(text.encode(), TOKENS)
    (folder / "tokenizer.json").write_text(tokenizer.source, "utf-8")
    return prepared(folder.parent / "bpe_data", text, tokenizer=str(folder / "tokenizer.json"))


def transformers_model(kind: str, **settings: Any) -> Any:
    """A random model of transformers."""
    import transformers

    ends = {"bos_token_id": None, "eos_token_id": None, "vocab_size": TOKENS + 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(**{**SMALL_GPT2, **ends, **settings})
        return shaken(transformers.GPT2LMHeadModel(config))
    config = transformers.Qwen3Config(**{**SMALL_QWEN3, **ends, **settings})
    return shaken(transformers.Qwen3ForCausalLM(config))


def started(name: str | Path, dataset: Dataset, **settings: Any) -> GPT:
    """The model that a training begins with."""
    config = TrainConfig(**{**open_source(str(name)).settings, **settings}, init_from=str(name))
    model = GPT(model_config(replace(config, dropout=0.0), dataset.tokenizer.vocab_size))
    model.load_state_dict(first_weights(config, dataset.tokenizer))
    return model.eval()


def same_logits(model: GPT, others: Callable[[Tensor], Tensor], length: int | None = None) -> None:
    """Compare the logits of all tokens that the model has."""
    torch.manual_seed(0)
    size = model.config.vocab_size
    idx = torch.randint(size, (2, length or model.config.block_size))
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], others(idx)[..., :size], atol=2e-5, rtol=1e-4)


# --- transformers ---


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_of_transformers(activation: str, tied: bool, tmp_path: Path, text: str) -> None:
    dataset = tokens_of(tmp_path / "hf", text)
    model = transformers_model("gpt2", activation_function=activation, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "hf")
    same_logits(started(tmp_path / "hf", dataset), lambda idx: model(idx).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_qwen3_of_transformers(tied: bool, tmp_path: Path, text: str) -> None:
    dataset = tokens_of(tmp_path / "hf", text)
    model = transformers_model("qwen3", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "hf")
    same_logits(started(tmp_path / "hf", dataset), lambda idx: model(idx).logits)


def test_a_published_qwen3_in_and_out_again(
    tmp_path: Path, text: str, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wide heads, slow rotations, more rows than tokens, and settings as version 4 of transformers has."""
    import transformers

    tokenizer, folder = qwen3(), tmp_path / "hf"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.to_dict()["tokenizer.json"], "utf-8")
    dataset = prepared(tmp_path / "qwen_data", text, tokenizer=str(folder / "tokenizer.json"))
    assert dataset.tokenizer.to_dict() == tokenizer.to_dict()
    rows = tokenizer.vocab_size + 13
    original = transformers_model("qwen3", **PUBLISHED_QWEN3, vocab_size=rows)
    original.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    del settings["rope_parameters"], settings["layer_types"]
    settings |= {
        "rope_theta": 1_000_000,
        "rope_scaling": None,
        "sliding_window": None,
        "max_window_layers": 2,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    same_logits(started(folder, dataset), lambda idx: original(idx).logits)

    shape = {**open_source(str(folder)).settings, "block_size": 32}
    config = replace(
        config, **shape, init_from=str(folder), data_dir=str(tmp_path / "qwen_data"), max_iters=2
    )
    fit(config)
    again = str(tmp_path / "again")
    flags = ["--checkpoint", config.out_dir, "--format", "hf", "--output", again]
    assert run_command("export", flags, "") == 0
    tuned, _ = load_model(Path(config.out_dir) / "ckpt.pt")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(again)
    same_logits(tuned, lambda idx: theirs(idx).logits)
    assert theirs.config.vocab_size == tokenizer.vocab_size
    written = transformers.AutoTokenizer.from_pretrained(again)
    assert written("<think>Ohne e\u0301")["input_ids"] == tokenizer.encode("<think>Ohne \u00e9").tolist()
    capsys.readouterr()
    flags = f"--checkpoint {config.out_dir} --prompt cafe\u0301 --num_tokens 3 --device cpu".split()
    assert run_command("sample", flags, "sample") == 0
    assert capsys.readouterr().out.startswith("caf")


def test_gpt2_of_the_hub_has_the_tokens_that_data_is_prepared_with(tmp_path: Path) -> None:
    """Its tokenizer.json has the end of a text in the vocabulary, too, and settings that make no odds."""
    merges = json.loads(train_bpe(b"It was the best of times" * 20, TOKENS).source)["model"]["merges"]
    ours = gpt2_tokenizer("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    published = json.loads(ours.source)
    published["model"]["vocab"]["<|endoftext|>"] = ours.end_of_text
    published["added_tokens"][0]["normalized"] = True
    published["decoder"]["add_prefix_space"] = True
    published["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(published), "utf-8")
    theirs = from_file(tmp_path / "tokenizer.json")
    assert isinstance(theirs, BPETokenizer)
    assert is_same(theirs, ours)


def test_files_of_other_kinds_in_a_folder_of_transformers(tmp_path: Path, text: str) -> None:
    """Several files with an index; a pickle; names without prefix; constants of old versions; bfloat16."""
    dataset = tokens_of(tmp_path / "hf", text)
    model = transformers_model("gpt2")
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    same_logits(started(tmp_path / "hf", dataset), lambda idx: model(idx).logits)
    for path in (tmp_path / "hf").glob("*.safetensors*"):
        path.unlink()
    old = {
        name.removeprefix("transformer."): w
        for name, w in model.state_dict().items()
        if "lm_head" not in name
    }
    old["h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    torch.save(old, tmp_path / "hf" / "pytorch_model.bin")
    same_logits(started(tmp_path / "hf", dataset), lambda idx: model(idx).logits)
    model = model.bfloat16().float()
    torch.save(
        {name: w.bfloat16() for name, w in model.state_dict().items()}, tmp_path / "hf/pytorch_model.bin"
    )
    same_logits(started(tmp_path / "hf", dataset), lambda idx: model(idx).logits)


def test_a_model_of_the_hub(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    dataset = tokens_of(tmp_path / "hf", text)
    model = transformers_model("gpt2")
    model.save_pretrained(tmp_path / "hf")
    asked: list[str] = []

    def snapshot_download(repo_id: str, **settings: Any) -> str:
        asked.append(repo_id)
        if settings.get("local_files_only") or repo_id != "me/small":
            raise FileNotFoundError("no such model")
        return str(tmp_path / "hf")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    same_logits(started("me/small", dataset), lambda idx: model(idx).logits)
    with pytest.raises(UserError, match="--init_from nowhere is neither here nor can it be had from the hub"):
        open_source("nowhere")
    count = len(asked)
    monkeypatch.chdir(tmp_path / "hf")
    for path in ("out/nothing.pt", "a/b/c", "../x"):
        with pytest.raises(UserError, match="does not exist"):
            open_source(path)
    assert len(asked) == count


def test_all_that_does_not_fit_is_listed_in_one_message(tmp_path: Path, text: str) -> None:
    tokens_of(tmp_path / "hf", text)
    rope = {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 2.0}
    transformers_model("qwen3", rope_parameters=rope, rms_norm_eps=1e-5).save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError) as error:
        open_source(str(tmp_path / "hf"))
    for problem in ("rope_type is linear", "rope_parameters is ['factor']", "rms_norm_eps is 1e-05"):
        assert problem in str(error.value)
    transformers_model("gpt2").save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"n_layer": 3, "n_inner": 100}))
    dataset = load_dataset(tmp_path / "bpe_data")
    with pytest.raises(UserError) as error:
        started(tmp_path / "hf", dataset)
    assert "h.2.ln_1.weight is missing" in str(error.value)
    assert "h.0.mlp.c_fc.weight is of shape (128, 32), not (100, 32)" in str(error.value)
    small = {"model_type": "qwen3", **SMALL_QWEN3, "rope_parameters": {"full_attention": {"rope_theta": 1e6}}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(small))
    with pytest.raises(UserError, match=r"rope_parameters is \['full_attention'\]"):
        open_source(str(tmp_path / "hf"))
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="is a model of type llama: this program has gpt2 and qwen3"):
        open_source(str(tmp_path / "hf"))


# --- nanoGPT ---


def nanogpt_weights(vocab: int, bias: bool) -> dict[str, Tensor]:
    """A state_dict as nanoGPT publishes its layout."""
    torch.manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (vocab, 32), "wpe.weight": (16, 32)}
    for block in ("h.0.", "h.1."):
        layers = {
            "attn.c_attn": (96, 32),
            "attn.c_proj": (32, 32),
            "mlp.c_fc": (128, 32),
            "mlp.c_proj": (32, 128),
        }
        for name, shape in layers.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        shapes |= {f"{block}{ln}.{kind}": (32,) for ln in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    shapes |= {"ln_f.weight": (32,), "ln_f.bias": (32,)}
    weights = {
        f"transformer.{n}": 0.3 * torch.randn(s) for n, s in shapes.items() if bias or n[-4:] != "bias"
    }
    return weights | {"lm_head.weight": weights["transformer.wte.weight"]}


def nanogpt_logits(w: dict[str, Tensor], idx: Tensor) -> Tensor:
    """nanoGPT's forward pass, written out for two layers and four heads."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (32,), w[f"{name}.weight"], w.get(f"{name}.bias"), 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    B, T = idx.shape
    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:T]
    for block in ("transformer.h.0.", "transformer.h.1."):
        q, k, v = linear(norm(x, f"{block}ln_1"), f"{block}attn.c_attn").split(32, dim=2)
        q, k, v = (part.view(B, T, 4, 8).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, 32)
        x = x + linear(y, f"{block}attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}ln_2"), f"{block}mlp.c_fc")), f"{block}mlp.c_proj")
    return linear(norm(x, "transformer.ln_f"), "lm_head")


def save_nanogpt(folder: Path, weights: dict[str, Tensor], vocab: int, *, bias: bool, compiled: bool) -> Path:
    """A ckpt.pt as nanoGPT writes it, with the masks of old versions."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "_orig_mod." if compiled else ""
    content = {
        "model": {
            **{f"{prefix}{name}": weight for name, weight in weights.items()},
            f"{prefix}transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(),
        },
        "optimizer": {"state": {}, "param_groups": []},
        "model_args": {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "bias": bias,
                       "vocab_size": vocab, "dropout": 0.2},
        "iter_num": 10, "best_val_loss": torch.tensor(1.5), "config": {"dataset": "mine", "out_dir": "out"},
    }  # fmt: skip
    torch.save(content, folder / "ckpt.pt")
    return folder


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_nanogpt_of_characters(bias: bool, compiled: bool, tmp_path: Path, text: str) -> None:
    """The same characters, in another order: the rows of the embedding go with them. meta.pkl in data/."""
    dataset = prepared(tmp_path / "chars", text)
    chars = "".join(reversed(dataset.tokenizer.decode(range(dataset.tokenizer.vocab_size))))
    weights = nanogpt_weights(len(chars), bias)
    folder = save_nanogpt(tmp_path / "out", weights, len(chars), bias=bias, compiled=compiled)
    meta = tmp_path / "data" / "mine" / "meta.pkl"
    meta.parent.mkdir(parents=True)
    itos = dict(enumerate(chars))
    meta.write_bytes(
        pickle.dumps({"vocab_size": len(chars), "itos": itos, "stoi": {c: i for i, c in itos.items()}})
    )
    ids = torch.tensor([chars.index(c) for c in dataset.tokenizer.decode(range(len(chars)))])
    same_logits(started(folder, dataset), lambda idx: nanogpt_logits(weights, ids[idx])[..., ids])


def test_nanogpt_with_rows_of_padding(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a meta.pkl the tokens are GPT-2's, fewer than the rows. Here a small vocabulary is GPT-2's."""
    dataset = tokens_of(tmp_path / "hf", text)
    tokenizer = train_bpe(text.encode(), TOKENS)
    monkeypatch.setattr(original, "GPT2_TOKENS", TOKENS)
    monkeypatch.setattr(original, "GPT2_ROWS", TOKENS + 18)
    monkeypatch.setattr(original, "existing_tokenizer", lambda name: tokenizer)
    weights = nanogpt_weights(TOKENS + 18, True)
    folder = save_nanogpt(tmp_path / "out", weights, TOKENS + 18, bias=True, compiled=True)
    same_logits(started(folder, dataset), lambda idx: nanogpt_logits(weights, idx))
    with pytest.raises(UserError, match=r"prepare it with .* --tokenizer gpt2"):
        started(folder, prepared(tmp_path / "chars", text))


def test_nanogpt_without_its_vocabulary(tmp_path: Path) -> None:
    save_nanogpt(tmp_path / "out", nanogpt_weights(65, True), 65, bias=True, compiled=False)
    with pytest.raises(
        UserError, match=r"has 65 tokens, and its meta\.pkl, .* copy it from nanoGPT's data/mine"
    ):
        open_source(str(tmp_path / "out"))


class Evil:
    """An object whose pickle runs a function when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("__import__('pathlib').Path('ran').touch()",)


@pytest.mark.parametrize(
    "content", [Evil(), {"itos": {0: Evil()}}, {"itos": {0: b"a"}}, {"itos": {0}}, [1], {}]
)
def test_a_pickle_builds_plain_values_alone(
    content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"meta\.pkl is not nanoGPT's"):
        original.read_meta(tmp_path / "meta.pkl")
    assert not (tmp_path / "ran").exists()


# --- litgpt ---


@pytest.mark.parametrize("settings", [{}, PUBLISHED_QWEN3 | {"tie_word_embeddings": False}], ids=str)
def test_litgpt(settings: dict[str, Any], tmp_path: Path, text: str) -> None:
    """litgpt's Qwen3 keeps the matrices of transformers' under other names, with q, k and v in one."""
    import yaml

    dataset = tokens_of(tmp_path / "lit", text)
    model = transformers_model("qwen3", **{"tie_word_embeddings": False, **settings})
    theirs = model.state_dict()
    weights = {"transformer.wte.weight": theirs["model.embed_tokens.weight"],
               "transformer.ln_f.weight": theirs["model.norm.weight"],
               "lm_head.weight": theirs["lm_head.weight"]}  # fmt: skip
    for n in range(2):
        old, new = f"model.layers.{n}.", f"transformer.h.{n}."
        qkv = [theirs[f"{old}self_attn.{part}_proj.weight"] for part in "qkv"]
        weights[f"{new}attn.qkv.weight"] = torch.cat(qkv)
        for ours, name in {
            "norm_1": "input_layernorm", "attn.norm_q": "self_attn.q_norm", "attn.norm_k": "self_attn.k_norm",
            "attn.proj": "self_attn.o_proj", "norm_2": "post_attention_layernorm",
            "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
        }.items():  # fmt: skip
            weights[f"{new}{ours}.weight"] = theirs[f"{old}{name}.weight"]
    content = {
        "name": "small", "block_size": 64, "n_layer": 2, "n_embd": 32, "n_head": 4, "n_query_groups": 2,
        "head_size": model.config.head_dim,
        "vocab_size": TOKENS, "padded_vocab_size": TOKENS + 2, "norm_class_name": "RMSNorm", "norm_eps": 1e-6,
        "norm_qk": True, "parallel_residual": False, "bias": False, "mlp_class_name": "LLaMAMLP",
        "intermediate_size": 64, "rotary_percentage": 1.0,
        "rope_base": int(model.config.rope_parameters["rope_theta"]),
    }  # fmt: skip
    path = tmp_path / "lit" / "model_config.yaml"
    path.write_text(yaml.safe_dump(content))
    for saved in (weights, {"model": weights}):
        torch.save(saved, tmp_path / "lit" / "lit_model.pth")
        same_logits(started(tmp_path / "lit", dataset), lambda idx: model(idx).logits)
    path.write_text(yaml.safe_dump(content | {"parallel_residual": True, "norm_eps": 1e-5, "n_expert": 8}))
    with pytest.raises(UserError) as error:
        open_source(str(tmp_path / "lit"))
    for problem in ("parallel_residual is True", "norm_eps is 1e-05", "n_expert is 8"):
        assert problem in str(error.value)


# --- ours ---


@pytest.fixture
def trained(config: TrainConfig) -> TrainConfig:
    """A finished training."""
    fit(replace(config, max_iters=10))
    return config


def test_our_checkpoint_and_our_safetensors(trained: TrainConfig, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    dataset = load_dataset(Path(trained.data_dir))
    model, _ = load_model(Path(trained.out_dir) / "ckpt.pt")
    for name in (trained.out_dir, f"{trained.out_dir}/ckpt.pt"):
        same_logits(started(name, dataset), lambda idx: model(idx)[0])
    saved = load_checkpoint(Path(trained.out_dir) / "ckpt.pt")
    content = {"version": 1, "config": to_dict(saved.model_config), "tokenizer": saved.tokenizer}
    path = tmp_path / "mine.safetensors"
    tensors = {name: weight for name, weight in saved.weights.items() if name != "head.weight"}
    save_file(tensors, path, {"nanogpt": json.dumps(content)})
    same_logits(started(path, dataset), lambda idx: model(idx)[0])
    save_file(
        {"x.weight": torch.zeros(1), **dict(list(tensors.items())[1:])},
        path,
        {"nanogpt": json.dumps(content)},
    )
    with pytest.raises(UserError, match=r"token_embedding\.weight is missing; x\.weight is unknown"):
        started(path, dataset)


def test_out_and_in_again_through_transformers(trained: TrainConfig, tmp_path: Path, text: str) -> None:
    """A model of characters has no end of a text; in its tokenizer.json ours is added, with fresh weights."""
    model, tokenizer = load_model(Path(trained.out_dir) / "ckpt.pt")
    folder = tmp_path / "exported"
    flags = ["--checkpoint", trained.out_dir, "--format", "hf", "--output", str(folder)]
    assert run_command("export", flags, "") == 0
    dataset = prepared(tmp_path / "again", text, tokenizer=str(folder / "tokenizer.json"))
    assert dataset.tokenizer.vocab_size == tokenizer.vocab_size + 1
    known = tokenizer.vocab_size
    for data, rows in ((dataset, known + 1), (load_dataset(Path(trained.data_dir)), known)):
        again = started(folder, data)
        assert len(again.token_embedding.weight) == rows
        idx = torch.randint(known, (2, model.config.block_size))
        with torch.no_grad():
            torch.testing.assert_close(again(idx)[0][..., :known], model(idx)[0], rtol=0, atol=0)


def test_a_new_run_has_the_shape_of_its_source_and_resumes_without_it(
    trained: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line: the shape is the source's, the training ends as one that never stopped."""
    first = Path(trained.out_dir).rename(tmp_path / "first")
    arguments = [
        "--init_from",
        str(first),
        "--data_dir",
        trained.data_dir,
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    arguments += ["--max_iters", "4", "--eval_interval", "2", "--batch_size", "4", "--compile", "off"]
    whole = parse(TrainConfig, [*arguments, "--out_dir", str(tmp_path / "whole")], "train")
    assert (whole.n_layer, whole.n_embd, whole.block_size) == (2, 32, 16)
    assert whole.dropout == TrainConfig.dropout
    fit(whole)
    assert f"Starting from {first} (NanoGPT)" in capsys.readouterr().out
    half = replace(whole, out_dir=str(tmp_path / "half"))
    fit(half, keep_going=lambda step, loss: step < 2)
    first.rename(tmp_path / "gone")
    assert run_command("train", ["--resume", "--out_dir", str(tmp_path / "half")], "train") == 0
    ends = [load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "half")]
    for name, weight in ends[0].model.items():
        assert torch.equal(weight, ends[1].model[name])
    code = run_command(
        "train", ["--resume", "--out_dir", str(tmp_path / "half"), "--init_from", "other"], "train"
    )
    assert code == 2
    assert "--init_from other contradicts the checkpoint" in capsys.readouterr().err


def test_flags_that_contradict_the_source_are_refused(
    trained: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--init_from",
        trained.out_dir,
        "--data_dir",
        trained.data_dir,
        "--out_dir",
        str(tmp_path / "new"),
    ]
    for flags, message in {
        ("--n_layer", "6"): "--n_layer 6 contradicts",
        ("--no_tied",): "--tied False contradicts",
        ("--block_size", "17"): "--block_size 17 is more than the 16 learned positions",
        ("--minutes", "1"): "--minutes chooses a model, and --init_from has one",
    }.items():
        assert run_command("train", [*arguments, *flags], "train") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new" / "last.pt").exists()


def test_a_shorter_context_keeps_the_first_positions(trained: TrainConfig) -> None:
    dataset = load_dataset(Path(trained.data_dir))
    model, _ = load_model(Path(trained.out_dir) / "ckpt.pt")
    same_logits(started(trained.out_dir, dataset, block_size=5), lambda idx: model(idx)[0])


def test_rope_takes_a_longer_context(config: TrainConfig) -> None:
    fit(replace(config, positions="rope", max_iters=2))
    dataset = load_dataset(Path(config.data_dir))
    model, _ = load_model(Path(config.out_dir) / "ckpt.pt")
    longer = started(config.out_dir, dataset, block_size=40)
    same_logits(longer, lambda idx: model(idx)[0], length=16)


def test_new_characters_extend_the_vocabulary(
    trained: TrainConfig, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows go with their characters; the logits of known characters in a known text are as they were."""
    model, old = load_model(Path(trained.out_dir) / "ckpt.pt")
    dataset = prepared(tmp_path / "more", text.replace("F", "") + "ÄÖÜ€ßé" * 20)
    assert isinstance(old, CharTokenizer)
    capsys.readouterr()
    new = started(trained.out_dir, dataset)
    out = capsys.readouterr().out
    assert "New in the vocabulary, with fresh weights: 'Ä'" in out
    assert "does not have them: 'F'" in out
    common = [char for char in old.chars if char != "F"]
    before, after = (torch.tensor(t.encode("".join(common)).astype(int)) for t in (old, dataset.tokenizer))
    with torch.no_grad():
        expected, found = model(before[None, :16])[0], new(after[None, :16])[0]
    torch.testing.assert_close(found[..., after], expected[..., before])
    torch.testing.assert_close(
        new.token_embedding.weight, started(trained.out_dir, dataset).token_embedding.weight, rtol=0, atol=0
    )


def test_data_with_other_tokens_is_refused_with_the_way_to_prepare_it(
    trained: TrainConfig, tmp_path: Path, text: str
) -> None:
    dataset = prepared(tmp_path / "bytes", text, tokenizer="byte")
    with pytest.raises(
        UserError, match=r"has other tokens than .*: prepare it with .*data.* --tokenizer .*ckpt.pt"
    ):
        started(trained.out_dir, dataset)


def test_tables_of_ngrams_are_for_their_own_characters(
    config: TrainConfig, tmp_path: Path, text: str
) -> None:
    fit(replace(config, ngram_vocab=2000, max_iters=1))
    model, _ = load_model(Path(config.out_dir) / "last.pt")
    same = prepared(tmp_path / "same", text[:500], tokenizer=f"{config.out_dir}/last.pt")
    same_logits(started(config.out_dir, same), lambda idx: model(idx)[0])
    with pytest.raises(UserError, match="has tables of n-grams for its own characters"):
        started(config.out_dir, prepared(tmp_path / "other", text + "ß"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is none of a checkpoint"),
        ({"ckpt.pt": b"nonsense"}, "is none of a checkpoint"),
        ({"meta_000010.json": b"{}", "model_000010.pt": b""}, "is a model of nanochat"),
        ({"config.json": b"["}, "cannot be read"),
        ({"config.json": b'{"model_type": "gpt2"}'}, "has no weights"),
        ({"config.json": b'{"model_type": "qwen3", "hidden_size": "x"}'}, "hidden_size x"),
    ],
)
def test_what_is_no_model_ends_in_one_line(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_source(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_data_is_prepared_with_the_tokens_of_a_model(
    kind: str, config: TrainConfig, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From ckpt.pt and from vocab.pt alike; characters of the model stay, and new ones come to them."""
    dataset = prepared(tmp_path / "first", text, tokenizer=kind, vocab_size=TOKENS)
    config = replace(config, data_dir=str(tmp_path / "first"), max_iters=2)
    fit(config)
    files = (Path(config.out_dir) / "ckpt.pt", tmp_path / "first" / "vocab.pt")
    found = [
        prepared(tmp_path / f"new{i}", "Öde Wälder\n" * 50, tokenizer=str(file))
        for i, file in enumerate(files)
    ]
    assert found[0].fingerprint == found[1].fingerprint
    assert found[0].tokenizer.to_dict() == found[1].tokenizer.to_dict()
    assert found[0].tokenizer.decode(found[0].train.tolist()).startswith("Öde Wälder\nÖde")
    if kind == "bpe":
        assert found[0].tokenizer.to_dict() == dataset.tokenizer.to_dict()
    else:
        assert {*dataset.tokenizer.tokens} < {*found[0].tokenizer.tokens}
    capsys.readouterr()
    started(config.out_dir, found[0])
    out = capsys.readouterr().out
    assert "Left out" not in out
    assert ("New in the vocabulary, with fresh weights: 'W' 'l' 'Ö' 'ä'" in out) is (kind == "char")


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.pt", "does not exist"), ("bad.pt", "cannot be read"), ("data/train.pt", "has no")],
)
def test_a_file_without_a_tokenizer_is_refused(
    name: str, message: str, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = data_dir.parent
    (root / "bad.pt").write_bytes(b"nonsense")
    arguments = [
        "--input_file",
        str(root / "data.txt"),
        "--data_dir",
        str(root / "x"),
        "--tokenizer",
        str(root / name),
    ]
    assert run_command("data", arguments, "data") == 2
    assert message in capsys.readouterr().err
