"""What the tests of exports share: checkpoints of small models that are made, not trained."""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from nanogpt.checkpoint.format import Checkpoint, save_checkpoint
from nanogpt.config import SHAPE_FIELDS, TrainConfig, model_config, to_dict
from nanogpt.export.gguf_vocabulary import QWEN2_WORDS
from nanogpt.export.html import rounded
from nanogpt.export.source import TrainedModel
from nanogpt.model.gpt import GPT
from nanogpt.presets import PRESETS
from nanogpt.tokenizer.base import ByteTokenizer, CharTokenizer, Tokenizer
from nanogpt.tokenizer.bpe import CHAR_OF, BPETokenizer, ForeignTokenizer, byte_level_json, spell, train_bpe

SHAPE: dict[str, Any] = {"block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 64, "dropout": 0.0}
GPT2_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2 tanh": {"mlp": "gelu_tanh"},
    "gpt2 no bias": {"bias": False},
    "gpt2 untied": {"tied": False},
    "gpt2 narrow": {"mlp_width": 96, "n_kv_head": 4},
}
QWEN3: dict[str, Any] = {
    "norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "bias": False, "qk_norm": True, "n_kv_head": 2,
    "tied": False,
}  # fmt: skip
QWEN3_SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": QWEN3,
    "qwen3 published": QWEN3 | {"tied": True, "head_dim": 32, "rope_base": 1e6},
    "qwen3 tied": QWEN3 | {"tied": True},
    "qwen3 all heads": QWEN3 | {"n_kv_head": None, "mlp_width": 96},
}
SHAPES = GPT2_SHAPES | QWEN3_SHAPES
REFUSED: dict[str, dict[str, Any]] = {
    "--mlp relu2": {"mlp": "relu2"},
    "--qk_norm": {"qk_norm": True},
    "--logit_cap 15": {"logit_cap": 15.0},
    "--ngram_vocab 97": {"ngram_vocab": 97},
    "--n_kv_head 2": {"n_kv_head": 2},
    "--head_dim 32": {"head_dim": 32},
    "--norm rmsnorm": {"norm": "rmsnorm"},
    "--bias": QWEN3 | {"bias": True},
    "--no_qk_norm": QWEN3 | {"qk_norm": False},
    "--mlp gelu": QWEN3 | {"mlp": "gelu"},
    "--mlp relu2, --logit_cap 15, --ngram_vocab 97": QWEN3
    | {"mlp": "relu2", "logit_cap": 15.0, "ngram_vocab": 97},
}
"""What GPT-2 and Qwen3 cannot express -> settings that have it."""

SMALL: dict[str, Any] = {
    "n_layer": 2,
    "n_embd": 48,
    "n_head": 4,
    "block_size": 32,
    "mlp_width": None,
    "dropout": 0.0,
}
PRESET_SHAPES: dict[str, dict[str, Any]] = {
    f"preset {name}": {field: getattr(preset.make(), field) for field in SHAPE_FIELDS}
    | SMALL
    | {"ngram_vocab": 1000 if preset.make().ngram_vocab else 0}
    for name, preset in PRESETS.items()
}
"""The blocks of every preset, small. 1000 rows are too few for all pairs of LETTERS."""
PARTS: dict[str, dict[str, Any]] = {
    "all pairs": {"ngram_vocab": 5000},
    "hashed pairs": {"ngram_vocab": 997, "ngram_pairs": "hashed"},
    "one key-value head": QWEN3 | {"n_kv_head": 1, "bias": True, "norm": "layernorm"},
    "odd width": {"n_embd": 42, "n_head": 3, "mlp_width": 50, "positions": "rope", "block_size": 17},
}
EVERY_SHAPE = PRESET_SHAPES | PARTS | SHAPES | REFUSED

WORDS = "It's a dog's life, they'll say \u00e9 1234 times.  "
SIGNS = "\r\n\t x . y ! z 's n't \u4e2d\U0001f642"
BPE_TEXT = (WORDS * 40 + SIGNS * 20).encode()

LETTERS = CharTokenizer.train("\n !',-.:;?ABCDEFGHIabcdefghijklmnopqrstuvwxyz\u00e9\u4e2d\U0001f642")


def foreign() -> ForeignTokenizer:
    """A tokenizer.json that changes the text, and does not name the end of a text."""
    described = json.loads(train_bpe(BPE_TEXT, 300).source)
    described |= {"normalizer": {"type": "NFC"}, "added_tokens": []}
    return ForeignTokenizer(json.dumps(described))


def without_end() -> BPETokenizer:
    """A byte-level tokenizer.json that does not name the end of a text."""
    described = json.loads(train_bpe(BPE_TEXT, 300).source)
    return BPETokenizer(json.dumps(described | {"added_tokens": []}))


def qwen3(merges: Sequence[tuple[str, str]] | None = None) -> Tokenizer:
    """A tokenizer.json as that of the published Qwen3, small. merges: as they are spelled; None: learned."""
    backend = tokenizers.Tokenizer(models.BPE())
    if merges is not None:
        vocabulary = [*map(CHAR_OF.__getitem__, range(256)), *dict.fromkeys(a + b for a, b in merges)]
        backend.model = models.BPE({token: i for i, token in enumerate(vocabulary)}, [*merges])
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    backend.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    if merges is None:
        alphabet = [*CHAR_OF.values()]
        trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator([BPE_TEXT.decode()], trainer)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens(
        [tokenizers.AddedToken(name, normalized=False) for name in ("<tool_call>", "<think>", "</think>")]
    )
    return BPETokenizer(backend.to_str())


MARKED = ["<think>", "</think>", "<|im_end|>", "'RE", "'\u017f", "\u0301", "\u0338"]
"""What only Qwen3's tokenizer treats as more than characters."""
ALPHABET = "".join(
    sorted({*WORDS, *SIGNS, *map(chr, range(0x250)), *"e\u0301\u200b\u2028\ufeff▁Ġ\ue000\U0010ffff"})
)
TOKENIZERS: dict[str, Tokenizer] = {
    "char": CharTokenizer.train(ALPHABET),
    "char with end": CharTokenizer.train(ALPHABET, end_of_text=True),
    "byte": ByteTokenizer(),
    "bpe": train_bpe(BPE_TEXT, 300),
    "bpe without end": without_end(),
    "qwen3": qwen3(),
    "tokenizer.json": foreign(),
}
TEXTS = st.one_of(
    st.text(),
    st.text(ALPHABET),
    st.lists(st.sampled_from([*(WORDS + SIGNS).split(" "), *MARKED, " ", "\n"])).map("".join),
)
"""Texts of all kinds: any characters, those of ALPHABET, words that BPE has merged."""


def checkpoint(tokenizer: Tokenizer = LETTERS, **settings: Any) -> Checkpoint:
    """A checkpoint with random weights, all of which matter."""
    config = TrainConfig(**(SHAPE | settings))
    torch.manual_seed(1)
    model = GPT(model_config(config, tokenizer.vocab_size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return Checkpoint(
        config=to_dict(config),
        vocab_size=tokenizer.vocab_size,
        progress={"step": 12, "best_val_loss": 2.5, "evaluated_at": 12, "elapsed_s": 3.5},
        model={name: weight.detach() for name, weight in model.state_dict().items()},
        average={},
        optimizers=[],
        scaler={},
        precision={"device": "cpu", "dtype": "float32", "num_micro_batches": 1},
        tokenizer=tokenizer.to_dict(),
        fingerprint="f" * 64,
    )


def word_probe(kind: str = "bpe") -> tuple[Tokenizer, list[str]]:
    """A BPE that shows where a text is split into words, and texts with characters of all kinds.

    kind: bpe, with GPT-2's rule for words, or qwen3, with Qwen3's.

    It merges a letter, a digit and a sign with the first byte of any character: if they are in one word.
    The characters are those of Unicode 3.2, which every program knows.
    """
    firsts = [*range(0x20, 0x7F), *range(0xC2, 0xF5)]
    merges = [(bytes([before]), bytes([first])) for before in b"a1!" for first in firsts]
    points = (chr(point) for point in range(1, 0x110000, 7) if not 0xD800 <= point < 0xE000)
    known = [char for char in points if unicodedata.ucd_3_2_0.category(char) != "Cn"]
    texts = ["\n".join(f"{before}{char}{before}" for char in known) for before in "a1!"]
    if kind == "qwen3":
        return qwen3([(spell(before), spell(first)) for before, first in merges]), texts
    return BPETokenizer(byte_level_json(merges)), texts


def trained(text: str, **settings: Any) -> Checkpoint:
    """A checkpoint of a model that has learned a text by heart, in some seconds."""
    tokenizer = CharTokenizer.train(text)
    saved = checkpoint(tokenizer, **settings)
    torch.manual_seed(1)
    model = GPT(saved.model_config)
    ids = torch.from_numpy(tokenizer.encode(text).astype("int64"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        starts = torch.randint(len(ids) - 129, (8,)).tolist()
        batch = torch.stack([ids[start : start + 129] for start in starts])
        _, loss = model(batch[:, :-1], batch[:, 1:])
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return replace(saved, model={name: weight.detach() for name, weight in model.state_dict().items()})


def source(tokenizer: Tokenizer = LETTERS, **settings: Any) -> TrainedModel:
    """The same, to be exported."""
    return TrainedModel("small", checkpoint(tokenizer, **settings), tokenizer)


def saved(path: Path, tokenizer: Tokenizer = LETTERS, **settings: Any) -> Path:
    """The same in a file."""
    save_checkpoint(path, checkpoint(tokenizer, **settings))
    return path


def as_in_the_page(exported: TrainedModel) -> GPT:
    """The model that a page computes: its weights rounded, everything else in float32."""
    model = GPT(exported.config).eval()
    weights = {name: rounded(weight) for name, weight in exported.weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["head.weight"] if exported.config.tied else [], [])
    return model
