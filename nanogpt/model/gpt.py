"""The GPT, start to end: token ids in, logits and loss out.

Use:    model = GPT(GPTConfig(vocab_size=65)); logits, loss = model(x, y)
Print:  python model.py
GPT-2's architecture: learned positions, pre-norm blocks, GELU, the token embedding tied to the
output. Knows nothing of files, training or sampling.

# B batch, T tokens (at most block_size), C n_embd, H n_head, K n_kv_head, D = C / H, V vocab_size
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.config import GPTConfig
from nanogpt.device import kind_of
from nanogpt.model.loss import chunked_cross_entropy

__all__ = ["GPT", "GPTConfig"]

PLAIN_ON_CPU = 512
"""Longest sequence for which a CPU does bfloat16 attention in plain products."""

LARGE_VOCAB = 4096
"""Vocabulary from which the loss is computed a few positions at a time."""


def norm_of(config: GPTConfig, width: int) -> nn.Module:
    """The normalisation of the last dimension that the configuration asks for."""
    if config.norm == "layernorm":
        return nn.LayerNorm(width, bias=config.bias)
    return nn.RMSNorm(width, eps=1e-6)


class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and the positions before it (Vaswani et al., 2017).

    K = n_kv_head heads of keys and values serve H query heads (Ainslie et al., GQA, 2023).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.dropout, self.flash_attn = config.attn_dropout, config.flash_attn
        width = config.n_embd // config.n_head
        self.sizes = [self.n_head * width, self.n_kv_head * width, self.n_kv_head * width]
        self.qkv = nn.Linear(config.n_embd, sum(self.sizes), bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.q_norm = norm_of(config, width) if config.qk_norm else None
        self.k_norm = norm_of(config, width) if config.qk_norm else None
        self.proj_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C). rotation: see rotate."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(self.sizes, dim=-1)
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_kv_head, -1).transpose(1, 2)  # (B, K, T, D)
        v = v.view(B, T, self.n_kv_head, -1).transpose(1, 2)  # (B, K, T, D)
        if self.q_norm is not None and self.k_norm is not None:
            wide = next(self.q_norm.parameters()).dtype  # float32, but for FSDP
            q, k = self.q_norm(q.to(wide)).to(v.dtype), self.k_norm(k.to(wide)).to(v.dtype)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if self.n_kv_head < self.n_head:
            k, v = (z.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for z in (k, v))
        attend = flash_attention if self.flash_attn else plain_attention
        y = attend(q, k, v, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.proj_dropout(self.proj(y))


def flash_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal attention in one fused kernel (Dao et al., 2022). q, k, v, result: (B, H, T, D).

    A CPU does short sequences faster in plain products (bench/RESULTS.md).
    """
    if kind_of(q.device).tailored and q.dtype == torch.bfloat16 and q.shape[-2] <= PLAIN_ON_CPU:
        return plain_attention(q, k, v, dropout)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """The same as flash_attention, written out. Keeps the (B H, T, T) weights in memory."""
    B, H, T, D = q.shape
    q, k, v = (z.reshape(B * H, T, D) for z in (q, k, v))
    future = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=1 / math.sqrt(D))  # (B H, T, T)
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return torch.bmm(weights.to(v.dtype), v).view(B, H, T, D)


def rotation_table(length: int, width: int) -> Tensor:
    """Cosines and sines of RoPE (Su et al., 2021), (2, length, width / 2)."""
    frequency = 10_000.0 ** (-torch.arange(0, width, 2) / width)  # (width / 2,)
    angle = torch.arange(length)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair (i, i + D / 2) of x (B, H, T, D) by an angle that grows with the position."""
    cos, sin = rotation.to(x.dtype)  # (T, D / 2) each
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Dropout(nn.Module):
    """nn.Dropout, with random numbers that cost less on a CPU than the products they mask.

    One draw of 64 random bits decides four activations, 16 bits each: the probability is
    rounded to 1/65536.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Zero each element with probability p and scale the others by 1 / (1 - p)."""
        if not self.training or self.p == 0:
            return x
        if not kind_of(x.device).tailored:
            return F.dropout(x, self.p)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= round(self.p * 65536) - 32768
        return x * (keep.to(x.dtype) * (1 / (1 - self.p)))


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them, applied to each position alone."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        gated = config.mlp == "swiglu"
        default = -(-config.n_embd * 8 // 3 // 64) * 64 if gated else 4 * config.n_embd
        width = config.mlp_width or default
        self.fc = nn.Linear(config.n_embd, width * (2 if gated else 1), bias=config.bias)
        self.proj = nn.Linear(width, config.n_embd, bias=config.bias)
        self.proj_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        hidden = self.fc(x)  # (B, T, width)
        if self.kind == "gelu":
            hidden = F.gelu(hidden)  # Hendrycks & Gimpel, 2016
        elif self.kind == "gelu_tanh":
            hidden = F.gelu(hidden, approximate="tanh")  # GPT-2's approximation; slower on a CPU
        elif self.kind == "relu2":
            hidden = hidden.relu().square()  # So et al., Primer, 2021
        else:
            gate, hidden = hidden.chunk(2, dim=-1)  # Shazeer, 2020
            hidden = F.silu(gate) * hidden
        return self.proj_dropout(self.proj(hidden))


class Block(nn.Module):
    """Attention, then MLP, each behind a normalisation and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = norm_of(config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = norm_of(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), rotation)
        return x + self.mlp(self.ln_2(x))


class NgramEmbedding(nn.Module):
    """Vectors for the last two and the last three tokens, from hashed tables.

    The tables hold what a model otherwise spends its first layers on: which tokens follow which.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.rows = rows
        self.pairs = nn.Embedding(rows, width)
        self.triples = nn.Embedding(rows, width)

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) -> (B, T, C). Before the first token stands a token -1."""
        before = F.pad(idx, (2, 0), value=-1) + 1  # (B, T + 2), the token at t is before[t + 2]
        pair = before[:, 1:-1] * 48_271 + before[:, 2:] * 69_621
        triple = before[:, :-2] * 39_373 + pair * 40_692
        return self.pairs(pair % self.rows) + self.triples(triple % self.rows)


class GPT(nn.Module):
    """A decoder-only transformer language model (Radford et al., 2019)."""

    rotation: Tensor | None

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        rope = config.positions == "rope"
        self.wpe = None if rope else nn.Embedding(config.block_size, config.n_embd)
        self.register_buffer("rotation", None, persistent=False)
        self.make_buffers()
        self.ngrams = NgramEmbedding(config.ngram_vocab, config.n_embd) if config.ngram_vocab else None
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = norm_of(config, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.wte.weight  # Press & Wolf, 2017
        self.initialize()

    def initialize(self) -> None:
        """GPT-2's initialisation: normal(0, 0.02), smaller where a branch joins the residual stream.

        There it shrinks with the number of branches, so that the variance does not grow with depth
        (with zero_init: to nothing, and so does an untied head).
        """
        for name, parameter in self.named_parameters():
            self.initialize_parameter(name, parameter)

    def initialize_parameter(self, name: str, parameter: Tensor) -> None:
        """Fill the parameter of this name, or a tensor like it, in place."""
        joins = name.endswith("proj.weight")
        if name.endswith("bias") or (self.config.zero_init and (joins or name == "head.weight")):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            depth = 2 * self.config.n_layer if joins else 1
            nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(depth))
        else:
            nn.init.ones_(parameter)  # the gain of a norm

    def make_buffers(self, device: torch.device | None = None) -> None:
        """Compute what is neither learned nor saved: the table of RoPE, (2, block_size, D / 2)."""
        if self.config.positions == "rope":
            with torch.device(device or torch.get_default_device()):
                self.rotation = rotation_table(
                    self.config.block_size, self.config.n_embd // self.config.n_head
                )

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits for the token after each position, and the mean loss if targets are given.

        idx, targets: (B, T) int64, T <= block_size. Returns logits (B, T, V) and the
        cross-entropy in nats per token, a scalar, or None.
        """
        x = self.hidden(idx)
        logits = cast(Tensor, self.head(x))  # (B, T, V)
        if self.config.logit_cap:
            logits = self.config.logit_cap * torch.tanh(logits.float() / self.config.logit_cap)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The loss of forward alone, with less memory where the vocabulary is large."""
        if self.config.vocab_size < LARGE_VOCAB:
            return cast(Tensor, self(idx, targets)[1])
        x = self.hidden(idx).flatten(0, 1)
        return chunked_cross_entropy(x, self.head.weight, targets.flatten(), self.config.logit_cap)

    def hidden(self, idx: Tensor) -> Tensor:
        """What the output layer reads, (B, T) -> (B, T, C)."""
        T = idx.shape[1]
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens are more than the model's block_size {self.config.block_size}")
        x = self.wte(idx)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe.weight[:T]
        if self.ngrams is not None:
            x = x + self.ngrams(idx)
        x = self.dropout(x)
        rotation = None if self.rotation is None else self.rotation[:, :T]
        for block in self.blocks:
            x = block(x, rotation)
        return cast(Tensor, self.ln_f(x))

    def num_parameters(self) -> int:
        """Number of different parameters (the tied embedding counts once)."""
        return sum(parameter.numel() for parameter in self.parameters())


def flops_per_token(config: GPTConfig, parameters: int) -> int:
    """Floating-point operations of one training step, forward and backward, for each token.

    6 for each weight in a matrix product (tables that are looked up are in none; a tied token table
    is the output layer) plus 12 * layers * width * context for the attention (Chowdhery et al., PaLM,
    2022, appendix B).
    """
    rows = config.block_size if config.positions == "learned" else 0
    rows += 2 * config.ngram_vocab
    rows += 0 if config.tied else config.vocab_size
    in_products = parameters - rows * config.n_embd
    return 6 * in_products + 12 * config.n_layer * config.n_embd * config.block_size
