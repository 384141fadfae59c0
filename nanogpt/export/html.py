"""HTML: one page that runs the model in a browser, from disk, without a network.

Example: write(source, Path("model.html"), "int8", advance)
Every model fits, with tokenizers of characters, bytes, and BPE by GPT-2's or Qwen2's rule for
words. The page computes
the model whose weights are `rounded`: each matrix, embeddings too, has 8 bits and a scale for each row, as in
model/quantize.py; norms and biases stay as they are. All other numbers are float32 or more.
The page is nanogpt/page; its backend is local.js, which has the model in a worker.
"""

import html
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanogpt.config import to_dict
from nanogpt.export import gguf_vocabulary
from nanogpt.export.source import Advance, TrainedModel
from nanogpt.model.quantize import quantize_rows
from nanogpt.page.assemble import assemble
from nanogpt.tokenizer.base import ByteTokenizer, CharTokenizer, Tokenizer
from nanogpt.tokenizer.bpe import CHAR_OF, BPETokenizer, plain_tokens
from nanogpt.units import plural

BACKEND = ("products.js", "weights.js", "tokenizer.js", "engine.js", "local.js")
"""The scripts that run a model."""

COMMENT = "A language model and all that runs it, in one file. Nothing is fetched, nothing is sent."

MARK = (0, b"<!DOCTYPE html>\n<!-- A language model")
"""How every such file begins."""

START = """
if (globalThis.document) {
  const script = document.currentScript.textContent;
  const content = (id) => document.getElementById(id).textContent;
  document.addEventListener("DOMContentLoaded", () => {
    startPage(NanoGPTLocal.backend(JSON.parse(content("model")), script, () => content("weights")));
  });
} else NanoGPTLocal.serve();
"""
"""What joins page and model. The page and its worker run the same script."""

POLICY = (
    "default-src 'none'; script-src 'sha256-{script}' 'wasm-unsafe-eval'; style-src 'sha256-{style}'; "
    "worker-src blob:; base-uri 'none'; form-action 'none'"
)
"""Nothing may be fetched or sent, and no code may run but ours (Content Security Policy)."""


def misfits(source: TrainedModel) -> list[str]:
    """What of a model the page cannot express: some tokenizers."""
    return gguf_vocabulary.misfits(source.tokenizer)


def write(source: TrainedModel, path: Path, dtype: str, advance: Advance) -> None:
    """Write the page. Raises: OSError."""
    del dtype  # 8 bits are all that there is
    weights = packed(source, advance)
    header: dict[str, Any] = {
        "name": source.name,
        "about": describe(source),
        "config": to_dict(source.config),
        "tensors": [[name, *tensor.shape, 0][:3] for name, tensor in source.weights.items()],
        "bytes": len(weights),
        "tokenizer": tokenizer_header(source.tokenizer),
    }
    model = json.dumps(header).replace("<", "\\u003c")  # no text of the model ends its element
    contents = {
        "comment": COMMENT,
        "head": '<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
        "title": html.escape(source.name),
        "about": html.escape(header["about"]),
        "promise": "The model runs in this page, on this device. Nothing is fetched and nothing is sent.",
        "data": f'<script type="application/json" id="model">{model}</script>\n'
        f'<script type="text/plain" id="weights">{as_text(weights)}</script>\n',
    }
    page, _ = assemble(
        BACKEND, START, contents, lambda script, style: POLICY.format(script=script, style=style)
    )
    path.write_bytes(page.encode())


def packed(source: TrainedModel, advance: Advance) -> bytes:
    """The weights as the page reads them (readTensors in engine.js), little-endian.

    All vectors, float32; the scales of all matrices, the upper half of a float32 each; all matrices, int8.
    """
    vectors, scales, matrices = list[bytes](), list[bytes](), list[bytes]()
    for weight in source.weights.values():
        if weight.dim() == 1:
            vectors.append(weight.float().numpy().astype("<f4").tobytes())
        else:
            integers, scale = quantize_rows(weight.float())
            scales.append(scale.view(torch.int16).numpy().astype("<i2").tobytes())
            matrices.append(integers.numpy().tobytes())
        advance(weight.numel())
    return b"".join((*vectors, *scales, *matrices))


def as_text(data: bytes) -> str:
    """Bytes in gzip, as a text of 7 bits a character, which HTML leaves as it is (`decode` in weights.js).

    The integers are noise: Huffman's code saves a little, and nothing repeats. In UTF-8 7 bits take a byte,
    unless HTML would change the character: that becomes another one, of two bytes.
    """
    gzip = zlib.compressobj(9, zlib.DEFLATED, 31, 9, zlib.Z_HUFFMAN_ONLY)
    packed = gzip.compress(data) + gzip.flush()
    chunk, chars = 7 << 17, list[bytes]()
    for start in range(0, len(packed), chunk):
        bits = np.unpackbits(np.frombuffer(packed[start : start + chunk], dtype=np.uint8))
        groups = np.pad(bits, (0, -len(bits) % 7)).reshape(-1, 7)
        chars.append((np.packbits(groups, axis=1) >> 1).tobytes())
    return b"".join(chars).decode("ascii").translate({code: code + 0xC0 for code in b"\0\r<"})


def rounded(weight: Tensor) -> Tensor:
    """A weight as the page has it, in float32."""
    if weight.dim() == 1:
        return weight.float()
    integers, scale = quantize_rows(weight.float())
    return integers.float() * scale.float()[:, None]


def describe(source: TrainedModel) -> str:
    """The model in a line or two: what the checkpoint says, and how long its text is, if that is known."""
    tokens = f"{len(source.data.train):,} " if source.data is not None else ""
    kind = {"char": "characters", "byte": "bytes", "bpe": "pieces of words (BPE)"}[source.tokenizer.kind]
    loss = "" if source.is_best else " (the lowest of its run; these weights are later ones)"
    losses = (
        "It was not evaluated."
        if source.val_loss is None
        else f"Validation loss {source.val_loss:.4f} nats per token{loss}, before the weights were rounded "
        "to 8 bits."
    )
    return (
        f"A language model of {source.num_weights:,} parameters, trained for "
        f"{plural(source.step, 'update')} on {tokens}{kind}. {losses}"
    )


def char_header(tokenizer: CharTokenizer) -> dict[str, Any]:
    """The code point of each id."""
    return {"points": [ord(char) for char in tokenizer.chars]}


def byte_header(tokenizer: ByteTokenizer) -> dict[str, Any]:
    """Nothing: an id is a byte."""
    del tokenizer
    return {}


def bpe_header(tokenizer: BPETokenizer) -> dict[str, Any]:
    """The bytes of each id, each as the character of its number; the ids of single bytes; the merges.

    A merge is three ids: left, right and both in one. Then the rule for words, the normalizer, and the added
    tokens that are found in a text.
    """
    described = json.loads(tokenizer.source)
    model = described["model"]
    ids: dict[str, int] = model["vocab"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return {
        "tokens": [token.decode("latin-1") for token in tokenizer.tokens],
        "single": [ids.get(CHAR_OF[byte], -1) for byte in range(256)],
        "merges": [ids[name] for left, right in pairs for name in (left, right, left + right)],
        "words": gguf_vocabulary.rule_for_words(described),
        "normalizer": (described.get("normalizer") or {}).get("type"),
        "added": {token["content"]: token["id"] for token in plain_tokens(described)},
    }


TOKENIZERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "char": char_header,
    "byte": byte_header,
    "bpe": bpe_header,
}
"""Kind of tokenizer -> what the page needs of it (tokenizer.js)."""


def tokenizer_header(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer as the page reads it."""
    return {"kind": tokenizer.kind, "end": tokenizer.end_of_text, **TOKENIZERS[tokenizer.kind](tokenizer)}
