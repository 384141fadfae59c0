"""The GPT as an ONNX graph: tokens and a KV cache in, logits and the longer cache out.

Example: graph = GPTGraph(config, weights, "f32", advance); onnx.save(graph.model(), "model.onnx")
This is nanogpt/model/gpt.py in ONNX's operators (https://onnx.ai/onnx/operators). Whatever their type in the
file, weights are computed with in float32: runtimes convert them once, when they load the model. Inputs and
outputs have the names that transformers.js and Hugging Face's Optimum expect.

Shapes: B batch, T new tokens, P tokens in the cache, S = P + T, C n_embd, V vocab_size, H n_head,
K n_kv_head, G = H / K, D head_width
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from nanogpt import __version__
from nanogpt.config import GPTConfig
from nanogpt.export.source import Advance, to_dtype
from nanogpt.model.gpt import ACTIVATIONS as OUR_ACTIVATIONS
from nanogpt.model.ngram import HASH_MULTIPLIER, HASH_SHIFT, PAIR_HASH, TRIPLE_HASH
from nanogpt.model.quantize import quantize_rows

OPSET, IR_VERSION = 20, 9
"""Versions of the operators (20 is the first with GELU) and of the file format that goes with them."""

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64

TYPES = {
    torch.float32: FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int8: TensorProto.INT8,
    torch.int64: INT64,
}

LOWEST = torch.finfo(torch.float32).min
"""The score of a key that may not be seen. With -inf, a query that sees none (padding) would be NaN."""

END = torch.iinfo(torch.int64).max
"""The end of a dimension, in a slice."""


class Graph:
    """A graph to which operators are added. A value in it is known by its name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, TensorProto] = {}

    def __call__(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add an operator. Returns the name of its output."""
        name = output or f"{operator}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def split(self, x: str, sizes: Sequence[int]) -> list[str]:
        """Cut the last dimension."""
        names = [f"Split.{len(self.nodes)}.{i}" for i in range(len(sizes))]
        self.nodes.append(helper.make_node("Split", [x, self.constant([*sizes])], names, axis=-1))
        return names

    def slice(self, x: str, start: str, end: str, axis: int) -> str:
        """Cut out a part of a dimension. start, end: (1,) each."""
        return self("Slice", x, start, end, self.constant([axis]))

    def tensor(self, name: str, tensor: Tensor) -> str:
        """Add a tensor with values."""
        raw = tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        self.tensors[name] = TensorProto(
            name=name, data_type=TYPES[tensor.dtype], dims=tensor.shape, raw_data=raw
        )
        return name

    def constant(self, value: float | list[int]) -> str:
        """Add a number (float32 or int64), or a list of integers."""
        name = str(value)
        return name if name in self.tensors else self.tensor(name, torch.tensor(value))


class GPTGraph(Graph):
    """The graph of a model. Its methods are those of the classes in model/gpt.py.

    weights: by our names; no head.weight if it is tied. dtype: of matrices and tables, f32, f16, bf16 or int8
    (as in model/quantize.py); norms and biases stay f32.
    """

    def __init__(
        self, config: GPTConfig, weights: Mapping[str, Tensor], dtype: str, advance: Advance
    ) -> None:
        super().__init__()
        self.config, self.weights = config, weights
        self.n_kv_head = config.n_kv_head or config.n_head
        for name, weight in weights.items():
            self.add_weight(name, weight, dtype)
            advance(weight.numel())
        self.T = self("Shape", "input_ids", start=1, end=2)  # (1,)
        self.minus_T = self("Neg", self.T)
        self.mask = self.attention_mask()
        self.rotation = self.rotations() if config.positions == "rope" else None
        self.add_trunk()

    def add_weight(self, name: str, weight: Tensor, dtype: str) -> None:
        """Add a weight, whose value in float32 has its name."""
        if weight.dim() == 1 or dtype == "f32":
            self.tensor(name, to_dtype(name, weight, "f32"))
        elif dtype == "int8":
            integers, scale = quantize_rows(weight.float())  # (O, I), (O,)
            rounded = self("Cast", self.tensor(f"{name}.int8", integers), to=FLOAT)
            self("Mul", rounded, self.tensor(f"{name}.scale", scale.float()[:, None]), output=name)
        else:
            self("Cast", self.tensor(f"{name}.{dtype}", to_dtype(name, weight, dtype)), to=FLOAT, output=name)

    def attention_mask(self) -> str:
        """Which keys a query attends to: tokens, not after itself. (B, 1, 1, T, S) bool."""
        S = self("Shape", "attention_mask", start=1, end=2)  # (1,)
        keys = self("Range", self.constant(0), self("Squeeze", S), self.constant(1))  # (S,)
        queries = self.slice(keys, self.minus_T, self.constant([END]), 0)  # (T,)
        causal = self("LessOrEqual", keys, self("Unsqueeze", queries, self.constant([1])))  # (T, S)
        is_token = self("Cast", "attention_mask", to=TensorProto.BOOL)  # (B, S)
        return self("And", causal, self("Unsqueeze", is_token, self.constant([1, 2, 3])))

    def rotations(self) -> tuple[str, str]:
        """Cosines and sines of RoPE, (B, 1, T, D / 2) each, for any position."""
        D = self.config.head_width
        frequency = self.config.rope_base ** (-torch.arange(0, D, 2) / D)  # (D / 2,)
        positions = self("Cast", "position_ids", to=FLOAT)
        positions = self("Unsqueeze", positions, self.constant([1, 3]))  # (B, 1, T, 1)
        angle = self("Mul", positions, self.tensor("frequency", frequency))
        return self("Cos", angle), self("Sin", angle)

    def add_trunk(self) -> None:
        """Embeddings, blocks, final norm and output layer."""
        config = self.config
        x = self("Gather", "token_embedding.weight", "input_ids")  # (B, T, C)
        if config.positions == "learned":
            x = self("Add", x, self("Gather", "position_embedding.weight", "position_ids"))
        if config.ngram_vocab:
            x = self("Add", x, self.ngrams())
        for layer in range(config.n_layer):
            name = f"blocks.{layer}"
            x = self("Add", x, self.attention(self.norm(x, f"{name}.norm_1"), layer))
            x = self("Add", x, self.mlp(self.norm(x, f"{name}.norm_2"), name))
        x = self.norm(x, "final_norm")
        output = "capped" if config.logit_cap else "logits"
        self.linear(x, "token_embedding" if config.tied else "head", output=output)  # (B, T, V)
        if config.logit_cap:
            cap = self.constant(config.logit_cap)
            self("Mul", self("Tanh", self("Div", output, cap)), cap, output="logits")

    def attention(self, x: str, layer: int) -> str:
        """(B, T, C) -> (B, T, C)."""
        K, D, G = self.n_kv_head, self.config.head_width, self.config.n_head // self.n_kv_head
        name = f"blocks.{layer}.attn"
        q, k, v = self.split(self.linear(x, f"{name}.qkv"), [K * G * D, K * D, K * D])
        q, k, v = (self("Reshape", part, self.constant([0, 0, -1, D])) for part in (q, k, v))
        q, k, v = (self("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, k, v))  # (B, H or K, T, D)
        if self.config.qk_norm:
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        if self.rotation is not None:
            q, k = self.rotate(q), self.rotate(k)
        k, v = self.append(layer, k, v)  # (B, K, S, D)
        q = self("Reshape", q, self.constant([0, K, G, -1, D]))  # (B, K, G, T, D)
        k, v = (self("Unsqueeze", part, self.constant([2])) for part in (k, v))  # (B, K, 1, S, D)
        q = self("Mul", q, self.constant(1 / math.sqrt(D)))
        scores = self("MatMul", q, self("Transpose", k, perm=[0, 1, 2, 4, 3]))  # (B, K, G, T, S)
        scores = self("Where", self.mask, scores, self.constant(LOWEST))
        y = self("MatMul", self("Softmax", scores, axis=-1), v)  # (B, K, G, T, D)
        y = self("Transpose", y, perm=[0, 3, 1, 2, 4])
        return self.linear(self("Reshape", y, self.constant([0, 0, K * G * D])), f"{name}.proj")

    def append(self, layer: int, k: str, v: str) -> tuple[str, str]:
        """Add keys and values (B, K, T, D) to those of the cache. Returns all, (B, K, S, D) each."""
        keys, values = (
            self("Concat", f"past_key_values.{layer}.{kind}", x, output=f"present.{layer}.{kind}", axis=2)
            for kind, x in (("key", k), ("value", v))
        )
        return keys, values

    def rotate(self, x: str) -> str:
        """Turn each pair (i, i + D / 2) of (B, H, T, D) by its position's angle."""
        assert self.rotation is not None
        cos, sin = self.rotation
        a, b = self.split(x, [self.config.head_width // 2] * 2)  # (B, H, T, D / 2) each
        left = self("Sub", self("Mul", a, cos), self("Mul", b, sin))
        right = self("Add", self("Mul", b, cos), self("Mul", a, sin))
        return self("Concat", left, right, axis=-1)

    def mlp(self, x: str, block: str) -> str:
        """(B, T, C) -> (B, T, C)."""
        x, activation = self.linear(x, f"{block}.mlp.fc"), ACTIVATIONS[self.config.mlp]
        if OUR_ACTIVATIONS[self.config.mlp].gated:
            width = self.weights[f"{block}.mlp.proj.weight"].shape[1]
            gate, x = self.split(x, [width] * 2)
            x = self("Mul", activation(self, gate), x)
        else:
            x = activation(self, x)
        return self.linear(x, f"{block}.mlp.proj")

    def linear(self, x: str, name: str, output: str = "") -> str:
        """A linear layer: (..., I) -> (..., O)."""
        weight, bias = self("Transpose", f"{name}.weight", perm=[1, 0]), f"{name}.bias"
        if bias in self.weights:
            return self("Add", self("MatMul", x, weight), bias, output=output)
        return self("MatMul", x, weight, output=output)

    def norm(self, x: str, name: str) -> str:
        """A norm of the last dimension."""
        bias = [f"{name}.bias"] if f"{name}.bias" in self.weights else []
        return NORMS[self.config.norm](self, x, f"{name}.weight", *bias)

    def ngrams(self) -> str:
        """The vectors of pairs and triples (model/ngram.py): (B, T, C).

        They need the two tokens before the new ones. The cache has them as one more layer, whose keys and
        values are the ids of the tokens plus 1; 0 stands for what is before a text, which padding is, too.
        """
        config = self.config
        V, K, D = config.vocab_size, self.n_kv_head, config.head_width
        is_token = self.slice("attention_mask", self.minus_T, self.constant([END]), 1)  # (B, T)
        new = self("Mul", self("Add", "input_ids", self.constant(1)), is_token)
        wide = self("Unsqueeze", self("Cast", new, to=FLOAT), self.constant([1, 3]))  # (B, 1, T, 1)
        wide = self("Expand", wide, self.constant([1, K, 1, D]))  # (B, K, T, D)
        keys, _ = self.append(config.n_layer, wide, wide)
        ids = self("Gather", self("Gather", keys, self.constant(0), axis=3), self.constant(0), axis=1)
        ids = self("Pad", self("Cast", ids, to=INT64), self.constant([0, 2, 0, 0]))  # (B, 2 + S)
        before_last, last, current = (
            self.slice(ids, self("Sub", self.minus_T, self.constant([i])), end, 1)  # (B, T)
            for i, end in ((2, self.constant([-2])), (1, self.constant([-1])), (0, self.constant([END])))
        )
        if config.ngram_pairs == "exact":
            pair = self("Sub", self.times_plus(last, V, current), self.constant(1))
            triple = self.hashed(self.times_plus(before_last, (V + 1) * V, pair))
            pair = pair if config.ngram_vocab >= (V + 1) * V else self.hashed(pair)
        else:
            first, second = PAIR_HASH
            pair = self.times_plus(last, first, self("Mul", current, self.constant(second)))
            first, second = TRIPLE_HASH
            triple = self.times_plus(before_last, first, self("Mul", pair, self.constant(second)))
        return self("Add", self.looked_up("pairs", pair), self.looked_up("triples", triple))

    def times_plus(self, a: str, factor: int, b: str) -> str:
        """Add the product of an int64 tensor and a number to another tensor: a * factor + b."""
        return self("Add", self("Mul", a, self.constant(factor)), b)

    def hashed(self, key: str) -> str:
        """See model/ngram.py. The shift, which ONNX does not have for int64, is a division rounded down."""
        key, unit = self("Mul", key, self.constant(HASH_MULTIPLIER)), self.constant(2**HASH_SHIFT)
        return self("Div", self("Sub", key, self("Mod", key, unit)), unit)

    def looked_up(self, table: str, key: str) -> str:
        """Rows of an n-gram table: (B, T) int64 -> (B, T, C)."""
        name = f"ngram_embedding.{table}.weight"
        return self("Gather", name, self("Mod", key, self.constant(len(self.weights[name]))))

    def model(self) -> onnx.ModelProto:
        """The whole model."""
        config = self.config
        B, T, P, S = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
        value = helper.make_tensor_value_info
        names = [f"{layer}.{kind}" for layer in range(cache_layers(config)) for kind in ("key", "value")]
        heads, D = self.n_kv_head, config.head_width
        inputs = [
            value("input_ids", INT64, [B, T]),
            value("attention_mask", INT64, [B, S]),
            value("position_ids", INT64, [B, T]),
            *(value(f"past_key_values.{name}", FLOAT, [B, heads, P, D]) for name in names),
        ]
        outputs = [
            value("logits", FLOAT, [B, T, config.vocab_size]),
            *(value(f"present.{name}", FLOAT, [B, heads, S, D]) for name in names),
        ]
        graph = helper.make_graph(self.nodes, "gpt", inputs, outputs, [*self.tensors.values()])
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="nanogpt",
            producer_version=__version__,
        )


def cache_layers(config: GPTConfig) -> int:
    """Layers of the KV cache: with n-gram tables one more, which keeps the tokens."""
    return config.n_layer + bool(config.ngram_vocab)


def layer_norm(graph: Graph, x: str, *gain_and_bias: str) -> str:
    """See model/gpt.py."""
    return graph("LayerNormalization", x, *gain_and_bias, axis=-1, epsilon=1e-5)


def rms_norm(graph: Graph, x: str, gain: str) -> str:
    """See model/gpt.py."""
    mean = graph("ReduceMean", graph("Pow", x, graph.constant(2.0)), graph.constant([-1]), keepdims=1)
    root = graph("Sqrt", graph("Add", mean, graph.constant(1e-6)))
    return graph("Mul", graph("Div", x, root), gain)


NORMS: dict[str, Callable[..., str]] = {"layernorm": layer_norm, "rmsnorm": rms_norm}
"""Value of GPTConfig.norm -> operators."""


def gelu(graph: Graph, x: str) -> str:
    """The exact form."""
    return graph("Gelu", x)


def gelu_tanh(graph: Graph, x: str) -> str:
    """The tanh form."""
    return graph("Gelu", x, approximate="tanh")


def squared_relu(graph: Graph, x: str) -> str:
    """max(0, x)^2."""
    x = graph("Relu", x)
    return graph("Mul", x, x)


def silu(graph: Graph, x: str) -> str:
    """Multiply x by sigmoid(x)."""
    return graph("Mul", x, graph("Sigmoid", x))


ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu2": squared_relu,
    "swiglu": silu,
}
"""Value of GPTConfig.mlp -> operators; swiglu's are of its gate."""
