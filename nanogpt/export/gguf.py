"""GGUF: one file for llama.cpp, as GPT-2 or Qwen3.

Example: write(source, Path("model.gguf"), "q8_0", advance)
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The tokenizer is in
gguf_vocabulary.py. Norms, biases and positions stay f32, as llama.cpp's own converter leaves them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanogpt import __version__
from nanogpt.config import GPTConfig
from nanogpt.export import gguf_vocabulary
from nanogpt.export.families import closest_family, pieces
from nanogpt.export.source import Advance, TrainedModel, to_dtype
from nanogpt.model.gpt import default_hidden_dim

if TYPE_CHECKING:
    from gguf import GGUFWriter

BLOCK = 32
"""Weights of a row that share a scale in q8_0. A matrix whose rows are no multiple of it stays f16."""

QUANTIZATION_VERSION = 2
"""Version of the layout of quantized weights."""

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
"""Value of --dtype -> name of the type of a tensor."""

FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
"""Value of --dtype -> general.file_type."""


def misfits(source: TrainedModel) -> list[str]:
    """What of a model llama.cpp cannot express."""
    flags = closest_family(source.config).misfits(source.config)
    return flags + gguf_vocabulary.misfits(source.tokenizer)


def write(source: TrainedModel, path: Path, dtype: str, advance: Advance) -> None:
    """Write the file. Raises: OSError; UserError if the weights are too large for the dtype."""
    import gguf

    family = closest_family(source.config)
    vocabulary = gguf_vocabulary.vocabulary(source.tokenizer)
    weights = source.weights
    if vocabulary.added_end:
        for name in {"token_embedding.weight", "head.weight"} & set(weights):
            weights[name] = with_mean_row(weights[name])
    writer = gguf.GGUFWriter(path, family.key)
    write_header(writer, source, dtype)
    HEADERS[family.key](writer, source.config)
    gguf_vocabulary.write(writer, vocabulary)
    for _, name, tensor in pieces(family, source.config, weights):
        kept = type_of(name, tensor, dtype)
        # Quantization begins with f32; the largest value of f16 is checked.
        exact = to_dtype(name, tensor, kept if kept == "f16" else "f32").float().numpy()
        number = gguf.GGMLQuantizationType[TYPES[kept]]
        writer.add_tensor(name, gguf.quantize(exact, number), raw_dtype=number)
        advance(tensor.numel())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def with_mean_row(weight: Tensor) -> Tensor:
    """A table (V, C) with one row more, for a token that the model does not have: their mean, (V + 1, C).

    Its logit is the mean of the logits, so that it is never the largest, whatever the model computes.
    """
    return torch.cat((weight, weight.mean(dim=0, keepdim=True)))


def type_of(name: str, tensor: Tensor, dtype: str) -> str:
    """The type of one tensor in a file of `dtype`."""
    if tensor.dim() == 1 or name == "position_embd.weight":
        return "f32"
    return "f16" if dtype == "q8_0" and tensor.shape[-1] % BLOCK else dtype


def write_header(writer: "GGUFWriter", source: TrainedModel, dtype: str) -> None:
    """What the file says of every model."""
    config = source.config
    writer.add_name(source.name)
    writer.add_description(describe(source))
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(QUANTIZATION_VERSION)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head or config.n_head)


def describe(source: TrainedModel) -> str:
    """The model in a line or two."""
    loss = "" if source.val_loss is None else f", best validation loss {source.val_loss:.4f} nats a token"
    gelu = (
        " llama.cpp computes its tanh form of GELU, the training the exact one."
        if source.config.mlp == "gelu"
        else ""
    )
    return (
        f"A GPT with {source.num_weights:,} parameters, trained with NanoGPT {__version__}: "
        f"{source.step:,} updates{loss}. It continues text.{gelu}"
    )


def gpt2_header(writer: "GGUFWriter", config: GPTConfig) -> None:
    """What llama.cpp asks of a GPT-2."""
    writer.add_feed_forward_length(config.mlp_width or default_hidden_dim(config.n_embd, gated=False))
    writer.add_layer_norm_eps(1e-5)


def qwen3_header(writer: "GGUFWriter", config: GPTConfig) -> None:
    """What llama.cpp asks of a Qwen3."""
    writer.add_feed_forward_length(config.mlp_width or default_hidden_dim(config.n_embd, gated=True))
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)


HEADERS: dict[str, Callable[[Any, GPTConfig], None]] = {"gpt2": gpt2_header, "qwen3": qwen3_header}
"""Key of a family -> what it adds to the header."""
