"""The formulas of gpt.py in less time or memory, with the same results up to rounding.

Attention, norms, dropout, the output layer, cross-entropy over a large vocabulary, recomputation of
activations. What is fast depends on the device: machine/device.py says what each kind prefers, and
bench/RESULTS.md has the measurements. Tests compare each function with its formula (dropout: in
distribution). Knows nothing of GPTConfig or GPT.

Shapes: B batch, T queries, S keys, H heads, D head_width; N positions (B T), C width, V vocab_size
"""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils import checkpoint as checkpointing

from nanogpt.machine.device import kind_of

IGNORED = -1
"""The target at positions that do not count for the loss."""

CHUNKED_LOSS_MIN_VOCAB = 4096
"""From this vocabulary size on, the loss is computed in chunks to save memory."""

MANY_HEADS, LONG_CONTEXT = 64, 256
"""Heads of a batch, or keys, from which plain products attend faster for one query (bench/RESULTS.md)."""

PADDED_MIN_VOCAB, PADDED_MIN_POSITIONS = 1024, 1024
"""Below these sizes the output layer is so cheap that padding its weight does not pay."""

EXPENSIVE_OPS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
"""Matrix products and attention, whose results selective recomputation keeps."""


# --- attention ---


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Attention by the fastest kernel for this device and these shapes. gpt.attention has the formula.

    q: (B, H, T, D); k, v: (B, H, S, D); mask: bool, broadcast to (B, H, T, S), True where a query attends to
    a key; None: causal, the queries being the last T of S positions. Returns (B, H, T, D).
    """
    T, S = q.shape[-2], k.shape[-2]
    if T == 1 and not dropout and one_query_is_explicit(q, S):
        return one_query_attention(q, k, v, mask)
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    if T > 1 and q.dtype == torch.bfloat16 and kind_of(q.device).explicit_attention_max_length >= S:
        return explicit_attention(q, k, v, dropout)
    if T in (S, 1):  # one query, the last, attends to all keys
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T == S)
    # Imported here, since it imports all of torch._dynamo: 0.7 s.
    from torch.nn.attention.bias import causal_lower_right  # pyright: ignore[reportUnknownVariableType]

    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(T, S), dropout_p=dropout)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal attention in two batched products, of which the first also scales and masks.

    Shapes as in `attention`. For short sequences in bfloat16, this is faster on a CPU than its fused kernel.
    """
    B, H, T, D = q.shape
    S = k.shape[-2]
    future = torch.full((T, S), float("-inf"), dtype=q.dtype, device=q.device).triu(1 + S - T)
    q, k, v = q.reshape(B * H, T, D), k.reshape(B * H, S, D), v.reshape(B * H, S, D)
    with torch.autocast(q.device.type, enabled=False):  # else float32 scores, for the same result
        scores = torch.baddbmm(future, q, k.mT, alpha=1 / math.sqrt(D))  # (B H, T, S)
        weights = F.dropout(scores.softmax(dim=-1), dropout)
        return torch.bmm(weights, v).view(B, H, T, D)


def one_query_is_explicit(q: Tensor, keys: int) -> bool:
    """Whether plain products are faster for one query: on a CPU, for many heads or in bfloat16."""
    narrow = q.dtype == torch.bfloat16 and keys >= LONG_CONTEXT
    many = q.shape[0] * q.shape[1] >= MANY_HEADS
    return (narrow or many) and kind_of(q.device).explicit_attention_max_length > 0


def one_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one query to all keys in two batched products. Shapes as in `attention`, T = 1."""
    B, H, _, D = q.shape
    S = k.shape[-2]
    scores = torch.bmm(q.reshape(B * H, 1, D), k.reshape(B * H, S, D).mT) / math.sqrt(D)
    scores = scores.view(B, H, 1, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1).to(v.dtype)  # float32 under autocast
    return torch.bmm(weights.view(B * H, 1, S), v.reshape(B * H, S, D)).view(B, H, 1, D)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products with x are computed: autocast's if it is enabled, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# --- norms and dropout ---


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm in the dtype of its weights (float32; with FSDP bfloat16). The result has that of x."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.LayerNorm's name for it
        """(..., C) -> (..., C)."""
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in the dtype of its weights (float32; with FSDP bfloat16). The result has that of x."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        wide = x.to(self.weight.dtype)
        composed = kind_of(x.device).composes_rms_norm and not torch.compiler.is_compiling()
        if composed and wide.dtype == torch.float32 and self.eps is not None:
            return cast(Tensor, ComposedRMSNorm.apply(wide, self.weight, self.eps)).to(x.dtype)
        return super().forward(wide).to(x.dtype)


class ComposedRMSNorm(torch.autograd.Function):
    """RMS norm with LayerNorm's backward kernel, for devices that have no kernel for RMS norm.

    LayerNorm of x with mean 0 is RMS norm, except that its backward subtracts the mean of the gradient: here
    that is added again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x: (..., C), weight: (C,), float32 both."""
        norm = cast(Tensor, torch.linalg.vector_norm(x, dim=-1, keepdim=True))  # (..., 1)
        inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return (x * inverse_rms).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradients of x and of the weight."""
        x, weight, inverse_rms = ctx.saved_tensors
        (grad,), width = grad_outputs, x.shape[-1]
        x_grad, weight_grad, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, [width], torch.zeros_like(inverse_rms), inverse_rms, weight, None, [True, True, False]
        )
        subtracted = (grad @ (weight / width)).unsqueeze(-1) * inverse_rms  # (..., 1)
        return x_grad.add_(subtracted), weight_grad, None


class Dropout(nn.Module):
    """nn.Dropout, with cheaper random numbers on a CPU.

    There, one draw of 64 random bits decides about four activations, with 16 bits each. So the probability is
    rounded to a multiple of 1/65536.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Zero each element with probability p and scale the others by 1 / (1 - p)."""
        if not self.training or self.p == 0:
            return x
        if not kind_of(x.device).slow_random_numbers:
            return F.dropout(x, self.p)
        words = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
        draws = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in [-32768, 32767]
        threshold = round(self.p * 65536) - 32768  # a draw is below it with probability p
        keep = (draws >= threshold).to(x.dtype)
        return x * (keep * (1 / (1 - self.p)))


# --- output layer, and cross-entropy over a large vocabulary ---


class Head(nn.Linear):
    """The output layer: nn.Linear without bias, padded to a number of outputs that the device computes fast.

    An odd size such as GPT-2's 50,257 keeps a GPU from using its fast kernels. So rows of zeros are appended
    to the weight where autocast copies it anyway. The parameter is not padded, and neither are the logits.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__(width, vocab_size, bias=False)

    def padding(self, x: Tensor) -> int:
        """Number of rows of zeros to append to the weight for a product with x, (..., C)."""
        if self.out_features < PADDED_MIN_VOCAB or x.numel() < PADDED_MIN_POSITIONS * x.shape[-1]:
            return 0
        return -self.out_features % kind_of(x.device).vocab_multiple

    def is_plain(self) -> bool:
        """Whether it has neither adapter nor hook, which would expect V logits, without padding."""
        return list(dict(self.named_parameters())) == ["weight"] and not self._forward_hooks

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name for it
        """(..., C) -> (..., V). If the weight is padded already, the result has all of its outputs."""
        padding = self.padding(input) if len(self.weight) == self.out_features else 0
        if not padding:
            return super().forward(input)
        weight = pad_rows(self.weight.to(matmul_dtype(input)), padding)
        return F.linear(input, weight)[..., : self.out_features]


def pad_rows(weight: Tensor, rows: int) -> Tensor:
    """Append this many rows of zeros to a weight."""
    return F.pad(weight, (0, 0, 0, rows)) if rows else weight


def chunked_cross_entropy(
    head: nn.Module, soft_cap: Callable[[Tensor], Tensor], x: Tensor, targets: Tensor, vocab_size: int
) -> Tensor:
    """Mean cross-entropy of soft_cap(head(x)) in nats, a float32 scalar, without ever holding all logits.

    The logits of GPT-2's 50,257 tokens take 30 times the memory of the activations they come from. So a few
    positions are processed at a time: their logits, their loss and its gradient, then the next ones.
    head: (n, C) -> (n, V). soft_cap: (n, V) -> (n, V), without weights. x: (N, C). targets: (N,) int64,
    IGNORED where they do not count.
    A Head's weight is padded once for all positions, and the padding's logits are set to -inf. Cutting them
    off would cost a copy of the gradient of the logits, which the backward product wants padded as well.
    """
    trained = {name: weight for name, weight in head.named_parameters() if weight.requires_grad}

    def output(x: Tensor, *weights: Tensor) -> Tensor:
        """(n, C) -> (n, V), with `weights` in place of the trained ones."""
        return soft_cap(functional_call(head, dict(zip(trained, weights, strict=True)), (x,)))

    chunk = max(1, kind_of(x.device).logits_per_chunk // vocab_size)  # positions
    padding = head.padding(x) if isinstance(head, Head) and head.is_plain() else 0
    context = (output, chunk, padding, torch.is_grad_enabled(), targets)
    return cast(Tensor, ChunkedCrossEntropy.apply(*context, x, *trained.values()))


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy whose forward pass computes the gradients too (as in Liger Kernel, Hsu et al., 2024)."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        output: Callable[..., Tensor],
        chunk: int,
        padding: int,
        differentiate: bool,
        targets: Tensor,
        x: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        """See chunked_cross_entropy. output: the logits of x, given weights. chunk: positions at a time.

        padding: rows of zeros to append to the weights; their logits do not count.
        """
        # Cast to autocast's dtype once, not for each chunk.
        narrow = [pad_rows(w.detach().to(matmul_dtype(x)), padding) for w in weights]
        narrow = [weight.requires_grad_(differentiate) for weight in narrow]
        total = torch.zeros((), device=x.device)
        x_grad = torch.empty_like(x) if differentiate else x
        # In float32: FSDP's weights are bfloat16, to which a sum must not be rounded after each chunk.
        grads = [torch.zeros_like(weight, dtype=torch.float32) for weight in narrow if differentiate]
        for first in range(0, len(x), chunk):
            x_chunk = x[first : first + chunk].detach().requires_grad_(differentiate)  # (n, C)
            wanted = targets[first : first + chunk]  # (n,)
            counts = (wanted != IGNORED).float()[:, None]  # (n, 1)
            with torch.set_grad_enabled(differentiate):
                # A view, since PyTorch's MemTracker (memory_estimate.py) cannot hook a leaf.
                logits = output(x_chunk.view_as(x_chunk), *narrow)  # (n, V + padding)
            exact = logits.detach().to(torch.float32, copy=padding > 0)
            if padding:
                exact[:, -padding:] = float("-inf")
            log_probs = F.log_softmax(exact, dim=-1)
            total += F.nll_loss(log_probs, wanted, ignore_index=IGNORED, reduction="sum")
            if not differentiate:
                continue
            slope = log_probs.exp_()  # the gradient of the logits is the softmax, less 1 at the target
            slope[torch.arange(len(wanted), device=x.device), wanted] -= 1
            # Cast, and set to 0 where the target is ignored, in one pass. The division by the number of
            # targets comes in the backward pass: here it would underflow in float16.
            slope = torch.mul(slope, counts, out=torch.empty_like(logits))
            chunk_grads = torch.autograd.grad(logits, (x_chunk, *narrow), slope)
            x_grad[first : first + chunk] = chunk_grads[0]
            for grad, more in zip(grads, chunk_grads[1:], strict=True):
                grad.add_(more)
        rounded = [g[: len(w)].to(w.dtype) for g, w in zip(grads, weights, strict=differentiate)]
        ctx.save_for_backward(x_grad, *rounded)
        ctx.counted = (targets != IGNORED).sum().clamp(min=1)
        return total / ctx.counted

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Scale the gradients that the forward pass computed."""
        scale = grad_outputs[0] / ctx.counted
        return None, None, None, None, None, *[grad * scale for grad in ctx.saved_tensors]


# --- recomputation ---


class Recomputed(nn.Module):
    """A module whose activations are recomputed in the backward pass instead of being kept.

    Only its input is kept (Chen et al., 2016) and, if selective, the results of EXPENSIVE_OPS. Results stay
    the same, dropout included. Parameters keep their names, since the module's children become this one's.
    """

    def __init__(self, module: nn.Module, *, selective: bool) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)
        self.compute = module.forward  # a method, not a child
        self.settings: dict[str, Any] = {"use_reentrant": False}
        if selective:
            self.settings["context_fn"] = functools.partial(
                checkpointing.create_selective_checkpoint_contexts, list(EXPENSIVE_OPS)
            )

    def forward(self, *args: object) -> Tensor:
        """Call the wrapped module."""
        return cast(Tensor, checkpointing.checkpoint(self.compute, *args, **self.settings))
