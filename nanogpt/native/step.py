"""Native steps: a few tokens through a GPT in one call of C (step.c), on a CPU.

Example: logits, _ = with_native_steps(model)(idx, cache=step)
Its numbers are those of the model, up to rounding: weights as they are (float32, bfloat16 or int8), all else
float32. On a machine without a C compiler, on another device, with foreign layers, or if someone has changed
what the Python code of the model computes, the model is used as it is.

Shapes: B rows of a step, T tokens of each, V vocab_size
"""

import ctypes
import os
import time
from collections.abc import Callable
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from nanogpt.config import GPTConfig
from nanogpt.machine.precision import matmul_rates
from nanogpt.model.gpt import ACTIVATIONS as ACTIVATION_FUNCTIONS
from nanogpt.model.gpt import GPT, MLP, Block, CausalSelfAttention
from nanogpt.model.kernels import Dropout, Head, LayerNorm, RMSNorm
from nanogpt.model.kv_cache import BEFORE_TEXT, NGRAM_TOKENS, CacheStep, KVCache
from nanogpt.model.ngram import NgramEmbedding
from nanogpt.model.quantize import Int8Linear, linear_bytes
from nanogpt.native.build import BuildError, load
from nanogpt.native.threads import Threads

MAX_TOKENS = 64
"""Most tokens of a step, B times T."""

LARGE_BYTES, FEW_TOKENS = 40_000_000, 4
"""For weights of fewer than 32 bits and more bytes than that, and more tokens, PyTorch's matrix products are
faster (bench/RESULTS.md), if it multiplies bfloat16 fast at all."""

SWITCH = "NANOGPT_NATIVE"
"""Environment variable: 0 switches native steps off."""

NO_MEMORY = 1
"""What decode_step returns; other numbers: a token, or its place in the text, that does not exist."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu2": 2, "swiglu": 3}


# --- the structs of step.c, field by field ---


class CLinear(Structure):
    """A linear layer."""

    _fields_: ClassVar[Any] = [
        *((name, c_void_p) for name in ("weight", "scale", "bias")),
        *((name, c_int64) for name in ("outputs", "inputs", "dtype")),
    ]


class CNorm(Structure):
    """A norm; with a gain of None there is none."""

    _fields_: ClassVar[Any] = [
        ("gain", c_void_p), ("bias", c_void_p), ("centered", c_int64), ("eps", c_double),
    ]  # fmt: skip


class CBlock(Structure):
    """A block."""

    _fields_: ClassVar[Any] = [
        *((name, CNorm) for name in ("norm_1", "q_norm", "k_norm", "norm_2")),
        *((name, CLinear) for name in ("qkv", "attn_proj", "fc", "up", "mlp_proj")),
    ]


class CModel(Structure):
    """A GPT."""

    _fields_: ClassVar[Any] = [
        *((name, c_int64) for name in (
            "width", "vocab_size", "block_size", "heads", "kv_heads", "head_dim", "hidden", "layers",
            "activation", "pair_rows", "triple_rows", "exact_pairs", "pairs_fit", "rotation_length",
        )),
        ("logit_cap", c_double),
        *((name, c_void_p) for name in ("tokens", "positions", "pairs", "triples", "rotation")),
        ("blocks", POINTER(CBlock)), ("final_norm", CNorm), ("head", CLinear),
    ]  # fmt: skip


class CStep(Structure):
    """The tokens of a step, the cache, and where the logits go."""

    _fields_: ClassVar[Any] = [
        ("rows_of_step", c_int64), ("tokens_of_row", c_int64),
        *((name, c_void_p) for name in ("tokens", "rows", "positions", "keys", "values")),
        ("cache_rows", c_int64), ("length", c_int64), ("logits", c_void_p), ("long_waits", c_int64),
    ]  # fmt: skip


STRUCTS = (CModel, CBlock, CStep)
"""Those whose sizes step.c says, as `struct_bytes`."""


# --- the model ---


NORMS = (LayerNorm, RMSNorm)

PLAIN = (
    *(GPT, Block, CausalSelfAttention, MLP, nn.ModuleList, nn.Embedding, NgramEmbedding),
    *(nn.Linear, Head, Int8Linear, *NORMS, Dropout, nn.Identity),
)
"""Modules that step.c computes."""

TRIAL_SIZES: dict[str, Any] = {
    "block_size": 8, "n_embd": 16, "head_dim": 4, "mlp_width": 32, "vocab_size": 8, "dropout": 0.0,
}  # fmt: skip
"""Sizes of the small model on which steps are tried out."""

TRIAL_NGRAM_ROWS = 97
"""Rows of its n-gram tables: enough for all pairs of 8 tokens."""


def with_native_steps(model: GPT) -> "GPT | NativeGPT":
    """The model with native steps, if it has them here; else the model.

    For as long as nobody exchanges or moves its weights. Those of float32 may be changed in place.
    """
    usable = not model.training and is_plain(model) and not native_problem() and not is_changed(model.config)
    return NativeGPT(model) if usable else model


def native_problem() -> str:
    """Why this machine has no native steps; "" if it has them."""
    compiled = library()
    return str(compiled) if isinstance(compiled, BuildError) else ""


def switched_off() -> bool:
    """Whether the user wants no native steps."""
    return os.environ.get(SWITCH, "").lower() in {"0", "false", "off", "no"}


@cache
def library() -> ctypes.CDLL | BuildError:
    """The compiled step.c, or why there is none."""
    if switched_off():
        return BuildError(f"{SWITCH} switches native steps off")
    try:
        compiled = load("step.c")
    except BuildError as error:
        return error
    if not (hasattr(compiled, "decode_step") and hasattr(compiled, "struct_bytes")):
        return BuildError("step.c was not compiled as a whole")
    sizes = (c_int64 * len(STRUCTS)).in_dll(compiled, "struct_bytes")
    if list(sizes) != [ctypes.sizeof(struct) for struct in STRUCTS]:
        return BuildError("step.c has changed since this program began")
    return compiled


class NativeGPT:
    """A GPT of which small steps with a cache are computed by step.c, all others by the model itself."""

    def __init__(self, model: GPT) -> None:
        self.model, self.config = model, model.config
        self.kept: list[Any] = []
        """What the structs point to."""
        self.described = self.describe()
        self.no_tokens = torch.full((MAX_TOKENS, NGRAM_TOKENS), BEFORE_TEXT, device="cpu")
        self.threads: dict[tuple[int, int], Threads] = {}
        """By PyTorch's number of threads and the tokens of a step."""
        self.max_tokens = MAX_TOKENS
        narrow = self.described.head.dtype != DTYPES[torch.float32]
        if narrow and linear_bytes(model) > LARGE_BYTES:
            rates = matmul_rates(torch.device("cpu"))
            self.max_tokens = FEW_TOKENS if rates[torch.bfloat16] > rates[torch.float32] else MAX_TOKENS

    def __call__(self, idx: Tensor, *, cache: CacheStep) -> tuple[Tensor, None]:
        """What the model returns for idx (B, T): the logits after the last token of each row, (B, 1, V)."""
        if cache.ends is None and idx.numel() <= self.max_tokens:
            return self.compute(idx, cache)[:, -1:], None
        return self.model(idx, cache=cache)

    def compute(self, idx: Tensor, step: CacheStep) -> Tensor:
        """The logits after all tokens, (B, T, V), which the cache gets. Raises: MemoryError; IndexError."""
        B, T = idx.shape
        assert idx.dtype == torch.int64
        logits = torch.empty(B, T, self.config.vocab_size, dtype=torch.float32, device="cpu")
        before = self.no_tokens[:B] if step.before is None else step.before
        ids = torch.cat((before, idx), dim=1)  # (B, NGRAM_TOKENS + T)
        positions = step.positions.expand(B, T).contiguous()
        keys, values = step.cache.in_float32()  # (L, R, K, S, D) each
        described = CStep(
            B, T, ids.data_ptr(), step.index.data_ptr(), positions.data_ptr(), keys.data_ptr(),
            values.data_ptr(), keys.shape[1], keys.shape[3], logits.data_ptr(),
        )  # fmt: skip
        compiled = library()
        assert isinstance(compiled, ctypes.CDLL)
        threads = self.threads_for(B * T)
        began = time.perf_counter()
        error = compiled.decode_step(ctypes.byref(self.described), ctypes.byref(described), threads.count)
        threads.note(time.perf_counter() - began, described.long_waits)
        if error == NO_MEMORY:
            raise MemoryError("no memory for a step")
        if error:
            raise IndexError(f"a token id is not within 0 to {self.config.vocab_size - 1}, or has no place")
        return logits

    def threads_for(self, tokens: int) -> Threads:
        """The number of threads for a step of so many tokens, from the times of those before."""
        key = (torch.get_num_threads(), tokens)
        found = self.threads.get(key)
        if found is None:
            found = self.threads[key] = Threads(key[0])
        return found

    def describe(self) -> "CModel":
        """The model as step.c reads it."""
        model, config = self.model, self.config
        ngrams, rotation, places = model.ngram_embedding, model.rotation, model.position_embedding
        blocks = (CBlock * config.n_layer)(*map(self.describe_block, model.blocks))
        self.kept.append(blocks)
        first = model.blocks[0]
        assert isinstance(first, Block)
        return CModel(
            width=config.n_embd,
            vocab_size=config.vocab_size,
            block_size=config.block_size,
            heads=config.n_head,
            kv_heads=config.n_kv_head or config.n_head,
            head_dim=config.head_width,
            hidden=first.mlp.proj.in_features,
            layers=config.n_layer,
            activation=ACTIVATIONS[config.mlp],
            logit_cap=config.logit_cap,
            tokens=self.floats(model.token_embedding.weight),
            positions=self.floats(places.weight) if places else None,
            pairs=self.floats(ngrams.pairs.weight) if ngrams else None,
            triples=self.floats(ngrams.triples.weight) if ngrams else None,
            pair_rows=ngrams.pairs.num_embeddings if ngrams else 0,
            triple_rows=ngrams.triples.num_embeddings if ngrams else 0,
            exact_pairs=ngrams is not None and ngrams.exact,
            pairs_fit=ngrams is not None and ngrams.pairs_fit,
            rotation=self.floats(rotation),
            rotation_length=0 if rotation is None else rotation.shape[1],
            blocks=blocks,
            final_norm=self.describe_norm(model.final_norm),
            head=self.describe_linear(model.head),
        )

    def describe_block(self, block: nn.Module) -> "CBlock":
        """A block as step.c reads it."""
        assert isinstance(block, Block)
        attn, mlp = block.attn, block.mlp
        return CBlock(
            norm_1=self.describe_norm(block.norm_1),
            q_norm=self.describe_norm(attn.q_norm),
            k_norm=self.describe_norm(attn.k_norm),
            norm_2=self.describe_norm(block.norm_2),
            qkv=self.describe_linear(attn.qkv),
            attn_proj=self.describe_linear(attn.proj),
            fc=self.describe_linear(mlp.fc, 0, mlp.proj.in_features),
            up=self.describe_linear(mlp.fc, mlp.proj.in_features) if mlp.gated else CLinear(),
            mlp_proj=self.describe_linear(mlp.proj),
        )

    def describe_linear(self, layer: nn.Module, first: int = 0, end: int | None = None) -> "CLinear":
        """A linear layer as step.c reads it, or some of its outputs."""
        assert isinstance(layer, (nn.Linear, Int8Linear))
        weight, bias = layer.weight[first:end], cast("Tensor | None", layer.bias)
        return CLinear(
            weight=self.pointer(weight),
            scale=self.floats(layer.scale[first:end]) if isinstance(layer, Int8Linear) else None,
            bias=None if bias is None else self.floats(bias[first:end]),
            outputs=weight.shape[0],
            inputs=weight.shape[1],
            dtype=DTYPES[weight.dtype],
        )

    def describe_norm(self, norm: nn.Module) -> "CNorm":
        """A norm as step.c reads it."""
        if isinstance(norm, LayerNorm):
            return CNorm(self.floats(norm.weight), self.floats(norm.bias), True, norm.eps)
        if isinstance(norm, RMSNorm):
            return CNorm(self.floats(norm.weight), None, False, norm.eps)
        return CNorm()

    def floats(self, tensor: Tensor | None) -> int | None:
        """Where a tensor begins in memory, in float32."""
        return self.pointer(None if tensor is None else tensor.float())

    def pointer(self, tensor: Tensor | None) -> int | None:
        """Where a tensor begins in memory, with its rows one after the other."""
        if tensor is None:
            return None
        tensor = tensor if tensor.is_contiguous() else tensor.detach().contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()


def is_plain(model: GPT) -> bool:
    """Whether step.c computes what the model does: nothing foreign in it, all of it on a CPU.

    Asked before every text, so each module is looked at once: that takes 0.2 ms, PyTorch's iterators 0.7.
    """
    modules = list(model.modules())
    return all(map(is_plain_module, modules)) and has_all_parts(model, modules)


def is_plain_module(module: nn.Module) -> bool:
    """Whether a module is one of those that step.c computes, with weights on a CPU."""
    own = vars(module)
    weights = (*own["_parameters"].values(), *own["_buffers"].values())
    on_cpu = all(w is None or (type(w) in {Tensor, nn.Parameter} and w.is_cpu) for w in weights)
    return on_cpu and type(module) in PLAIN and "forward" not in own and not has_hooks(module)


def has_all_parts(model: GPT, modules: list[nn.Module]) -> bool:
    """Whether a model of these modules is built as its configuration says, with weights that step.c reads."""
    config, blocks = model.config, [block for block in model.blocks if isinstance(block, Block)]
    function, _ = ACTIVATION_FUNCTIONS[config.mlp]
    norms = [model.final_norm, *(norm for block in blocks for norm in (block.norm_1, block.norm_2))]
    layers = [module for module in modules if isinstance(module, (nn.Linear, Int8Linear))]
    return (
        len(blocks) == config.n_layer == len(model.blocks)
        and all(isinstance(norm, NORMS) for norm in norms)
        and all(getattr(block.mlp, "activation", None) is function for block in blocks)
        and len(layers) == 4 * config.n_layer + 1
        and all(layer.weight.dtype in DTYPES for layer in layers)
    )


def is_changed(config: GPTConfig) -> bool:
    """Whether someone changed what the Python code of a model computes, so that step.c no longer follows.

    False where that cannot be known, without a C compiler.
    """
    functions = ACTIVATION_FUNCTIONS[config.mlp].function, *(kind.forward for kind in PLAIN)
    return config.mlp not in ACTIVATIONS or not (native_problem() or agrees(config, functions))


@cache
def agrees(config: GPTConfig, functions: tuple[Callable[..., Any], ...]) -> bool:
    """Whether step.c and Python compute the same, tried on a small model with the layers of `config`.

    It takes some milliseconds, once for each set of functions: a notebook may replace a method.
    """
    config = replace(config, **TRIAL_SIZES, ngram_vocab=TRIAL_NGRAM_ROWS if config.ngram_vocab else 0)
    generator = torch.Generator().manual_seed(0)
    with (
        torch.random.fork_rng(devices=[]),  # a training goes on with its own random numbers
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
        torch.no_grad(),
    ):
        model = GPT(config).eval()
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
        idx = torch.randint(config.vocab_size, (1, config.block_size), generator=generator)
        found, expected = (steps_of(computed, idx) for computed in (NativeGPT(model), model))
    return torch.allclose(found, expected, rtol=0, atol=1e-4)


def steps_of(model: GPT | NativeGPT, idx: Tensor) -> Tensor:
    """The logits after all tokens but one, and after the last one, in two steps: idx (1, T) -> (2, V)."""
    cache, logits = KVCache(model.config, rows=1, length=idx.shape[1]), list[Tensor]()
    for piece in (idx[:, :-1], idx[:, -1:]):
        step = cache.step([0], piece)
        logits.append(model(piece, cache=step)[0][0, -1])
        cache.advance(step, piece)
    return torch.stack(logits)


def is_watched(model: nn.Module) -> bool:
    """Whether hooks run along with a module of the model, which only Python calls."""
    return any(map(has_hooks, model.modules()))


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run along with this module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)  # pyright: ignore[reportPrivateUsage, reportUnknownArgumentType, reportUnknownMemberType]
