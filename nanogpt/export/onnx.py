"""ONNX: a folder with a graph for onnxruntime, laid out as transformers.js reads it.

Example: write(source, Path("my_model"), "f32", advance)
         onnxruntime.InferenceSession("my_model/onnx/model.onnx")
         await pipeline("text-generation", "my_model")          // transformers.js
Every model and every tokenizer fits. The graph is in onnx_graph.py.
"""

from pathlib import Path
from typing import Any

from nanogpt.config import GPTConfig
from nanogpt.errors import require
from nanogpt.export.families import closest_family
from nanogpt.export.hf import CONFIGS, write_json
from nanogpt.export.source import Advance, TrainedModel
from nanogpt.export.tokenizer_json import tokenizer_config, tokenizer_json

FILES = (
    "onnx/model.onnx", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip

BYTES = {"f32": 4, "f16": 2, "bf16": 2, "int8": 1}
"""Of a weight, by --dtype."""

MAX_BYTES = 2_000_000_000
"""The most weights in a file, which is a message of Protocol Buffers and ends at 2^31 bytes."""


def misfits(source: TrainedModel) -> list[str]:
    """What of a model the format cannot carry: nothing."""
    del source
    return []


def write(source: TrainedModel, folder: Path, dtype: str, advance: Advance) -> None:
    """Write the folder. Raises: OSError; UserError if the weights are too large for the dtype or a file."""
    from nanogpt.export.onnx_graph import GPTGraph, cache_layers

    config, size = source.config, source.num_weights * BYTES[dtype]
    require(
        size <= MAX_BYTES,
        f"--format onnx holds {MAX_BYTES:,} bytes, and in {dtype} these weights have {size:,}: "
        "use --dtype int8 or f16, or --format safetensors",
    )
    model = GPTGraph(config, source.weights, dtype, advance).model()
    (folder / "onnx").mkdir(parents=True)
    (folder / FILES[0]).write_bytes(model.SerializeToString())
    end = source.tokenizer.end_of_text
    ends = {"bos_token_id": end, "eos_token_id": end}
    described = tokenizer_json(source.tokenizer)
    contents = {
        "config.json": {
            **model_config(config, cache_layers(config)),
            **ends,
            "transformers.js_config": {"dtype": "fp32"},
        },
        "generation_config.json": ends,
        "tokenizer.json": described,
        "tokenizer_config.json": tokenizer_config(described, source.tokenizer, config.block_size),
    }
    for name, content in contents.items():
        write_json(folder / name, content)


def model_config(config: GPTConfig, cache_layers: int) -> dict[str, Any]:
    """The settings of a model, of which transformers.js uses the architecture and the number of its layers.

    It knows GPT-2 and Qwen3. For any other model it is told Qwen3, with the shape of the cache: what is
    computed is in the graph alone.
    """
    family, vocabulary = closest_family(config), {"vocab_size": config.vocab_size}
    if not family.misfits(config):
        return {**CONFIGS[family.key](config), **vocabulary}
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "max_position_embeddings": config.block_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": cache_layers,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head or config.n_head,
        "head_dim": config.head_width,
        **vocabulary,
    }
