"""Cross-entropy over a large vocabulary without ever holding all logits.

Use:    loss = chunked_cross_entropy(x, head.weight, targets, logit_cap=0.0)
The logits of GPT-2's 50,257 tokens take 30 times the memory of the activations they come from. So
a few positions are taken at a time: their logits, their loss and its gradient, then the next ones.
The backward pass has nothing left to compute. The same numbers, up to rounding, as the product, the
cap and F.cross_entropy (tests/test_loss.py).

# N positions (of all sequences), C width, V vocabulary
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from nanogpt.device import kind_of


def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, logit_cap: float) -> Tensor:
    """Mean cross-entropy in nats of the logits x @ weight.T, a scalar of float32.

    x: (N, C); weight: (V, C); targets: (N,) int64. logit_cap: see Architecture; 0 is none. The products
    are in the dtype of autocast if it is on.
    """
    return cast(Tensor, ChunkedCrossEntropy.apply(x, weight, targets, logit_cap, torch.is_grad_enabled()))


class ChunkedCrossEntropy(torch.autograd.Function):
    """The loss, with the gradients computed on the way (as in Liger Kernel, Hsu et al., 2024)."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, logit_cap: float, differentiate: bool
    ) -> Tensor:
        """See chunked_cross_entropy."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        narrow, total = weight.to(dtype), torch.zeros((), device=x.device)
        x_grad = torch.empty_like(x) if differentiate else x
        # FSDP's weight is in bfloat16 here: a sum of many pieces is not to be rounded after each of them.
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if differentiate else weight
        rows = max(1, kind_of(x.device).chunk_logits // len(weight))
        with torch.autocast(kind, enabled=False):
            for first in range(0, len(x), rows):
                piece, wanted = x[first : first + rows].to(dtype), targets[first : first + rows]
                log_probabilities, cap_slope = log_softmax((piece @ narrow.T).float(), logit_cap)
                total += F.nll_loss(log_probabilities, wanted, reduction="sum")
                if not differentiate:
                    continue
                slope = log_probabilities.exp_()  # to the softmax; less 1 at the target: the gradient
                slope[torch.arange(len(wanted), device=x.device), wanted] -= 1
                slope = (slope * cap_slope).to(dtype)  # (rows, V); divided by N later: float16 would lose it
                x_grad[first : first + rows] = slope @ narrow
                weight_grad += slope.T @ piece
        ctx.save_for_backward(x_grad, weight_grad.to(weight.dtype))
        ctx.positions = len(x)
        return total / len(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Scale the gradients that are there."""
        x_grad, weight_grad = ctx.saved_tensors
        scale = grad_outputs[0] / ctx.positions
        return x_grad * scale, weight_grad * scale, None, None, None


def log_softmax(logits: Tensor, logit_cap: float) -> tuple[Tensor, Tensor | float]:
    """The log-probabilities of capped logits (N, V), and the slope of the cap there."""
    if not logit_cap:
        return F.log_softmax(logits, dim=-1), 1.0
    squashed = torch.tanh(logits / logit_cap)
    return F.log_softmax(squashed * logit_cap, dim=-1), 1 - squashed.square()
