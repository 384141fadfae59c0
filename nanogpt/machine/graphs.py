"""CUDA graphs: record the work of a device once, and launch it again as one.

Example: replay, result = CudaGraphs().capture(work); replay()
device.py says which kinds of device have them; training/cuda_graph.py and inference/graph_step.py use them.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Graphs(Protocol):
    """How a kind of device records work."""

    def warm_up(self, work: Callable[[], Tensor]) -> Tensor:
        """Do work that will be captured later, so that everything it allocates once is allocated."""
        ...

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record the launches of `work` without running them. Returns `replay` and the result.

        Each call of replay() launches the same kernels on the same memory, and overwrites the result; random
        numbers follow torch.manual_seed. Raises: RuntimeError if the work waits for the device.
        """
        ...


class CudaGraphs:
    """CUDA graphs (torch.cuda.graph), on the current device."""

    def warm_up(self, work: Callable[[], Tensor]) -> Tensor:
        """Do it on a side stream, as PyTorch requires."""
        stream, here = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            result = work()
        here.wait_stream(stream)
        return result

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record it in its own memory pool. Other threads may use CUDA meanwhile."""
        graph = torch.cuda.CUDAGraph()
        # A capture that fails leaves its stream as the current one: the first context restores it.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            result = work()
        return graph.replay, result
