"""The GPT, start to end: token ids in, logits and loss out.

Use:    model = GPT(GPTConfig(vocab_size=65)); logits, loss = model(x, y)
Print:  python model.py
GPT-2's architecture: learned positions, pre-norm blocks, GELU, the token embedding tied to the
output. Knows nothing of files, devices, training or sampling.

# B batch, T tokens (at most block_size), C n_embd, H n_head, D = C / H head width, V vocab_size
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.config import GPTConfig

__all__ = ["GPT", "GPTConfig"]

PLAIN_ON_CPU = 512
"""Longest sequence for which a CPU does bfloat16 attention in plain products."""


class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and the positions before it (Vaswani et al., 2017)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.dropout, self.flash_attn = config.n_head, config.dropout, config.flash_attn
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.proj_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        heads = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        attend = flash_attention if self.flash_attn else plain_attention
        y = attend(q, k, v, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.proj_dropout(self.proj(y))


def flash_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal attention in one fused kernel (Dao et al., 2022). q, k, v, result: (B, H, T, D).

    A CPU does short sequences faster in plain products (bench/RESULTS.md).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= PLAIN_ON_CPU:
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


class MLP(nn.Module):
    """Two linear layers with a GELU between them, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.proj_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        hidden = F.gelu(self.fc(x), approximate="tanh")  # (B, T, 4C); tanh as in GPT-2
        return self.proj_dropout(self.proj(hidden))


class Block(nn.Module):
    """Attention, then MLP, each behind a layer norm and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder-only transformer language model (Radford et al., 2019)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.wte.weight  # weight tying (Press & Wolf, 2017)
        self.initialize()

    def initialize(self) -> None:
        """GPT-2's initialisation: normal(0, 0.02), smaller where a branch joins the residual stream.

        There it shrinks with the number of branches, so that the variance does not grow with depth.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                depth = 2 * self.config.n_layer if name.endswith("proj.weight") else 1
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(depth))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits for the token after each position, and the mean loss if targets are given.

        idx, targets: (B, T) int64, T <= block_size. Returns logits (B, T, V) and the
        cross-entropy in nats per token, a scalar, or None.
        """
        T = idx.shape[1]
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens are more than the model's block_size {self.config.block_size}")
        x = self.wte(idx) + self.wpe.weight[:T]  # (B, T, C)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        logits = cast(Tensor, self.head(self.ln_f(x)))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def num_parameters(self) -> int:
        """Number of different parameters (the tied embedding counts once)."""
        return sum(parameter.numel() for parameter in self.parameters())


def flops_per_token(config: GPTConfig, parameters: int) -> int:
    """Floating-point operations of one training step, forward and backward, for each token.

    6 for each weight in a matrix product (the position table is in none, the token table is the
    output layer) plus 12 * layers * width * context for the attention (Chowdhery et al., PaLM,
    2022, appendix B).
    """
    in_products = parameters - config.block_size * config.n_embd
    return 6 * in_products + 12 * config.n_layer * config.n_embd * config.block_size
