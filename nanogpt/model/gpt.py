"""The GPT: token ids in, logits and loss out.

Example: model = GPT(GPTConfig(vocab_size=65)); logits, loss = model(x, y)
By default this is GPT-2: learned positions, pre-norm blocks, GELU, the output layer tied to the embedding.
The fields of GPTConfig (nanogpt/config.py) that change it: positions, rope_base, norm, mlp, n_kv_head,
head_dim, qk_norm, bias, tied, zero_init, logit_cap, ngram_vocab. kernels.py has nn.Dropout and the norms of
PyTorch in slightly other forms, and computes attention and a large vocabulary's loss faster than their
formulas here. Knows nothing of files, training or sampling.

Shapes: B batch, T tokens, C n_embd, V vocab_size, H n_head, K n_kv_head, D head_width, S keys
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt.config import GPTConfig
from nanogpt.model import kernels
from nanogpt.model.kernels import IGNORED, Dropout
from nanogpt.model.kv_cache import CacheStep
from nanogpt.model.ngram import NgramEmbedding


class GPT(nn.Module):
    """A decoder-only transformer language model (Radford et al., 2019)."""

    rotation: Tensor | None  # a buffer, declared for the type checker

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        learned = config.positions == "learned"
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd) if learned else None
        rotation = None if learned else rotation_table(config, self.token_embedding.weight.device)
        self.register_buffer("rotation", rotation, persistent=False)
        self.ngram_embedding = NgramEmbedding(config) if config.ngram_vocab else None
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = make_norm(config, config.n_embd)
        self.head = kernels.Head(config.n_embd, config.vocab_size)
        if config.tied:
            self.head.weight = self.token_embedding.weight  # Press & Wolf, 2017
        for name, parameter in self.named_parameters():
            self.initialize_parameter(name, parameter)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: CacheStep | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits for the token after each position, (B, T, V), and the mean loss if targets are given.

        idx, targets: (B, T) int64. The loss is the cross-entropy in nats per token, a scalar; targets of -1
        do not count (kernels.IGNORED), and if none counts, it is 0.
        positions, mask: see `trunk`. cache: where idx goes on; the logits are those after it, (B, 1, V).
        Raises: ValueError if T > block_size.
        """
        x = self.trunk(idx, positions, mask, cache)  # (B, T, C)
        logits = self.logits(cache.last(x) if cache else x)  # (B, T, V)
        if targets is None:
            return logits, None
        wanted = targets.flatten()  # (B T,)
        total = F.cross_entropy(logits.float().flatten(0, 1), wanted, ignore_index=IGNORED, reduction="sum")
        return logits, total / (wanted != IGNORED).sum().clamp(min=1)

    def trunk(
        self,
        idx: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: CacheStep | None = None,
    ) -> Tensor:
        """Embeddings, blocks and final norm: (B, T) -> (B, T, C).

        positions: (T,) or (B, T) int64, below block_size; None: 0, 1, 2, ... mask: see `attention`; None:
        causal. cache: has both, and what stands before idx; without it, idx is the beginning of a text.
        """
        T = idx.shape[1]
        if T > self.config.block_size:  # noqa: SIM300
            raise ValueError(f"{T} tokens are more than the model's block_size {self.config.block_size}")
        if cache is not None:
            positions, mask = cache.positions, cache.mask
        elif positions is None:
            positions = torch.arange(T, device=idx.device)
        x = self.token_embedding(idx)  # (B, T, C)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        if self.ngram_embedding is not None:
            x = x + self.ngram_embedding(idx, cache.before if cache else None)
        x = self.dropout(x)
        rotation = None
        if self.rotation is not None:  # in autocast's dtype: float32 would turn bfloat16 queries into float32
            rotation = self.rotation[:, positions].to(kernels.matmul_dtype(x))  # (2, T, D / 2)
            rotation = rotation.unsqueeze(2) if positions.dim() == 2 else rotation  # (2, B, 1, T, D / 2)
        context = Context(positions, rotation, mask, cache)
        for block in self.blocks:
            x = block(x, context)
        return self.final_norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """The output layer: (..., C) -> (..., V)."""
        return soft_cap(self.head(x), self.config.logit_cap)

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The loss of `forward`; if the vocabulary is large, without ever holding all logits (B, T, V)."""
        vocab_size = self.config.vocab_size
        if vocab_size >= kernels.CHUNKED_LOSS_MIN_VOCAB:
            x = self.trunk(idx).flatten(0, 1)  # (B T, C)
            capped = partial(soft_cap, cap=self.config.logit_cap)
            return kernels.chunked_cross_entropy(self.head, capped, x, targets.flatten(), vocab_size)
        _, loss = self(idx, targets)
        return loss

    def initialize_parameter(self, name: str, parameter: Tensor) -> None:
        """Fill a parameter with GPT-2's initial values: *.proj.weight ends a branch, *.bias is a bias.

        Matrices are normal(0, 0.02). The projections that end the 2 n_layer branches are smaller, so that the
        residual stream, which is their sum, does not grow with depth. zero_init sets these projections and an
        untied head to zero.
        """
        ends_branch = name.endswith("proj.weight")
        if name.endswith("bias") or (self.config.zero_init and (ends_branch or name == "head.weight")):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)  # the gain of a norm
        else:
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if ends_branch else 0.02
            nn.init.normal_(parameter, mean=0.0, std=std)

    def num_parameters(self) -> int:
        """Number of different parameters (a tied embedding counts once)."""
        return sum(parameter.numel() for parameter in self.parameters())


class Context(NamedTuple):
    """What a block is told about the tokens besides x: the same for all blocks."""

    positions: Tensor
    """Where in the text they are, (T,) or (B, T) int64."""
    rotation: Tensor | None = None
    """RoPE's cosines and sines at these positions, (2, T, D / 2), in the dtype of queries; None: no RoPE."""
    mask: Tensor | None = None
    """Which keys a query attends to: see `attention`. None: causal."""
    cache: CacheStep | None = None
    """Keeps keys and values, and has those of the tokens before."""


class Block(nn.Module):
    """Attention, then an MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.norm_1 = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.norm_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.norm_1(x), context)
        return x + self.mlp(self.norm_2(x))


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Limit logits smoothly to (-cap, cap) (Bello et al., 2016); 0: not at all."""
    return cap * torch.tanh(logits.float() / cap) if cap else logits


# --- attention ---


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention (Vaswani et al., 2017): averages of v, weighted by how q and k agree.

    q: (B, H, T, D); k, v: (B, H, S, D); mask: bool, broadcast to (B, H, T, S), True where a query attends to
    a key; None: causal, the queries being the last T of S positions. Returns (B, H, T, D).
    """
    T, S, D = q.shape[-2], k.shape[-2], q.shape[-1]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)  # no key after its query
    scores = q @ k.mT / math.sqrt(D)  # (B, H, T, S)
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1), dropout)  # (B, H, T, S), each row sums to 1
    return weights @ v  # (B, H, T, D)


class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and the positions before it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer  # the place of its keys and values in a cache
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        self.qkv_dims = [config.head_width * heads for heads in (self.n_head, self.n_kv_head, self.n_kv_head)]
        self.qkv = nn.Linear(config.n_embd, sum(self.qkv_dims), bias=config.bias)
        self.proj = nn.Linear(self.qkv_dims[0], config.n_embd, bias=config.bias)
        self.q_norm = make_norm(config, config.head_width) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, config.head_width) if config.qk_norm else nn.Identity()
        self.attend = kernels.attention if config.flash_attn else attention
        self.dropout = config.attn_dropout
        self.proj_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        q, k, v = self.queries_keys_values(x, context)
        y = self.attend(q, k, v, context.mask, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).flatten(2)  # (B, T, H D)
        return self.proj_dropout(self.proj(y))

    def queries_keys_values(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """What each head attends with: (B, T, C) -> queries (B, H, T, D), keys and values (B, H, S, D)."""
        B, T, _ = x.shape
        q, k, v = self.qkv(x).split(self.qkv_dims, dim=-1)
        q = self.q_norm(q.view(B, T, self.n_head, -1).transpose(1, 2))  # (B, H, T, D)
        k = self.k_norm(k.view(B, T, self.n_kv_head, -1).transpose(1, 2))  # (B, K, T, D)
        v = v.view(B, T, self.n_kv_head, -1).transpose(1, 2)  # (B, K, T, D)
        if context.rotation is not None:
            q, k = rotate(q, context.rotation), rotate(k, context.rotation)
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)  # (B, K, S, D): of the tokens before, too
        if self.n_kv_head < self.n_head:  # H / K query heads share one of k and v (GQA, Ainslie et al., 2023)
            k = k.repeat_interleave(self.n_head // self.n_kv_head, dim=1)  # (B, H, S, D)
            v = v.repeat_interleave(self.n_head // self.n_kv_head, dim=1)
        return q, k, v


def rotation_table(config: GPTConfig, device: torch.device) -> Tensor:
    """Cosines and sines of RoPE (Su et al., 2021) for each position, (2, block_size, D / 2)."""
    cpu, D = torch.device("cpu"), config.head_width  # on the meta device PyTorch would import sympy: 0.8 s
    frequency = config.rope_base ** (-torch.arange(0, D, 2, device=cpu) / D)  # (D / 2,)
    angle = torch.arange(config.block_size, device=cpu)[:, None] * frequency  # (block_size, D / 2)
    return torch.stack((angle.cos(), angle.sin())).to(device)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair (i, i + D / 2) of x (B, H, T, D) by its position's angle, rotation[0], rotation[1]."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)  # (B, H, T, D / 2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# --- MLP ---


class Activation(NamedTuple):
    """The nonlinearity of an MLP."""

    function: Callable[[Tensor], Tensor]
    gated: bool = False
    """Whether it is multiplied with a second projection of the same size (GLU variants, Shazeer, 2020)."""


def squared_relu(x: Tensor) -> Tensor:
    """max(0, x)^2 (Primer, So et al., 2021)."""
    return x.relu().square()


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(F.gelu),  # Hendrycks & Gimpel, 2016
    "gelu_tanh": Activation(partial(F.gelu, approximate="tanh")),  # as GPT-2 computes it; slower on a CPU
    "relu2": Activation(squared_relu),
    "swiglu": Activation(F.silu, gated=True),
}
"""Every value of GPTConfig.mlp."""


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them, applied to each position alone."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation, self.gated = ACTIVATIONS[config.mlp]
        hidden_dim = config.mlp_width or default_hidden_dim(config.n_embd, gated=self.gated)
        self.fc = nn.Linear(config.n_embd, hidden_dim * (2 if self.gated else 1), bias=config.bias)
        self.proj = nn.Linear(hidden_dim, config.n_embd, bias=config.bias)
        self.proj_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if self.gated:
            gate, hidden = self.fc(x).chunk(2, dim=-1)  # (B, T, hidden_dim) each
            hidden = self.activation(gate) * hidden
        else:
            hidden = self.activation(self.fc(x))  # (B, T, hidden_dim)
        return self.proj_dropout(self.proj(hidden))


def default_hidden_dim(n_embd: int, *, gated: bool) -> int:
    """4 C; if gated, 8/3 C, so that three matrices have as many weights as two of 4 C.

    8/3 C is rounded up to a multiple of 64.
    """
    return math.ceil(8 * n_embd / (3 * 64)) * 64 if gated else 4 * n_embd


# --- norms ---


def layer_norm(dim: int, bias: bool) -> nn.Module:
    """(x - mean(x)) / sqrt(var(x) + 1e-5) * gain + bias, over the last dimension (Ba et al., 2016)."""
    return kernels.LayerNorm(dim, eps=1e-5, bias=bias)


def rms_norm(dim: int, bias: bool) -> nn.Module:
    """X / sqrt(mean(x^2) + 1e-6) * gain, over the last dimension (Zhang & Sennrich, 2019). It has no bias."""
    return kernels.RMSNorm(dim, eps=1e-6)


NORMS: dict[str, Callable[[int, bool], nn.Module]] = {"layernorm": layer_norm, "rmsnorm": rms_norm}
"""Every value of GPTConfig.norm."""


def make_norm(config: GPTConfig, dim: int) -> nn.Module:
    """A norm of the last dimension, of the kind that the configuration names."""
    return NORMS[config.norm](dim, config.bias)
