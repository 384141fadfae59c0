"""CUDA graphs: record the work of a device once, and launch it again as one.

Example: replay, result = CudaGraphs().capture(work); replay()
Which kinds of device have them says device.py, what is recorded training/cuda_graph.py.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Graphs(Protocol):
    """How a kind of device records work."""

    def warm_up(self, work: Callable[[], Tensor]) -> Tensor:
        """Do work that is to be captured later, and leave nothing for a capture to stumble over."""
        ...

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record the launches of `work` without doing them. Returns what does them, and their result.

        Each call of the first launches the same kernels on the same memory, into the same result; random
        numbers follow torch.manual_seed. Raises: RuntimeError if the work waits for the device.
        """
        ...


class CudaGraphs:
    """CUDA graphs (torch.cuda.graph), on the current device."""

    def warm_up(self, work: Callable[[], Tensor]) -> Tensor:
        """Do it on a stream of its own, as PyTorch asks for."""
        stream, here = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            result = work()
        here.wait_stream(stream)
        return result

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record it in memory of its own. Other threads may use CUDA meanwhile."""
        graph = torch.cuda.CUDAGraph()
        # A capture that fails leaves its stream behind as the current one: the first context puts it right.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            result = work()
        return graph.replay, result
