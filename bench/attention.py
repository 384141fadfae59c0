"""Attention on a CPU: PyTorch's fused kernel against explicit products.

Run:    python bench/attention.py
Forward and backward for shapes of small models, in turn, in float32 and bfloat16; medians in
milliseconds and their ratio. device.CPU.explicit_attention_max_length rests on this. A second table has one
query of each head to the keys of a cache: kernels.MANY_HEADS and LONG_CONTEXT.
"""

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from nanogpt.model.kernels import explicit_attention, one_query_attention

SHAPES = ((12, 4, 64, 32), (32, 4, 128, 32), (8, 6, 256, 64), (4, 12, 512, 64), (2, 12, 1024, 64))
"""B, H, T, D."""

CACHES = (
    (1, 6, 16, 64),
    (1, 6, 128, 64),
    (1, 6, 256, 64),
    (16, 6, 64, 64),
    (64, 6, 64, 64),
    (64, 6, 256, 64),
)
"""B, H, S, D."""

ROUNDS = 15


def fused_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """PyTorch's kernel."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def step(attend: Callable[[Tensor, Tensor, Tensor, float], Tensor], inputs: list[Tensor]) -> float:
    """Milliseconds of one forward and backward pass."""
    start = time.perf_counter()
    attend(*inputs, 0.0).sum().backward()
    return 1000 * (time.perf_counter() - start)


def one_query(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[float]:
    """Milliseconds of the fused kernel and of plain products for one query, in turn, medians."""
    B, H, _, D = shape
    q, (k, v) = torch.randn(B, H, 1, D).to(dtype), torch.randn(2, *shape).to(dtype)
    ways = (lambda: F.scaled_dot_product_attention(q, k, v), lambda: one_query_attention(q, k, v, None))
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for _ in range(10 * ROUNDS):
            for way, row in zip(ways, times, strict=True):
                start = time.perf_counter()
                way()
                row.append(1000 * (time.perf_counter() - start))
    return list(map(statistics.median, times))


def main() -> None:
    """Measure and print."""
    table = Table("B, H, S, D", "dtype", "fused ms", "plain ms", "fused / plain")
    for shape in CACHES:
        for dtype in (torch.float32, torch.bfloat16):
            fused, plain = one_query(shape, dtype)
            table.add_row(str(shape), str(dtype)[6:], f"{fused:.3f}", f"{plain:.3f}", f"{fused / plain:.2f}")
    Console().print(table)
    table = Table("B, H, T, D", "dtype", "fused ms", "explicit ms", "fused / explicit")
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
            pairs = [(step(fused_attention, inputs), step(explicit_attention, inputs)) for _ in range(ROUNDS)]
            fused, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
            row = (str(shape), str(dtype)[6:], f"{fused:.2f}", f"{plain:.2f}", f"{fused / plain:.2f}")
            table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
