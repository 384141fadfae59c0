"""CUDA graph: an update is captured once, and replayed as one launch.

Example: run.graph = UpdateGraph(update, next_batch)           functions of trainer.py
The kernels of a small model take less time than the CPU needs to launch them. A graph launches all of them at
once: the same kernels on the same memory. So whatever changes from one update to the next (batch, learning
rates, decay of the EMA) is a tensor on the device, written before the launch. AdamW's step count, the guard
against NaN and the float16 scale are on the device too, dropout follows the seed that next_batch sets, and no
number decides what is launched. Knows nothing of several processes.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nanogpt.checkpoint.format import Progress
from nanogpt.machine.graphs import Graphs
from nanogpt.terminal.console import warn
from nanogpt.training.ema import ema_decay
from nanogpt.training.memory_estimate import HEADROOM, free
from nanogpt.training.run import Run

MAX_GRAPH_FLOPS = 3e12
"""FLOPs of a micro-batch above which launches are hidden behind computing: 5 ms of an H100 at 60 %."""

WARM_UP_UPDATES = 3
"""Updates before the capture, in which optimizers and libraries allocate their state."""


def pick_graph(run: Run) -> bool:
    """Whether to capture the update. "auto": if the device can, a micro-batch is small, and memory allows."""
    switch = run.config.cuda_graph
    possible = run.kind.graphs is not None and run.world.size == 1
    if switch == "on" and not possible:
        warn("--cuda_graph: only a single process on an NVIDIA GPU captures its updates: going on without")
    small = run.flops_per_update / run.num_micro_batches < MAX_GRAPH_FLOPS
    # The graph keeps the memory of an update while an evaluation needs its own.
    fits = run.memory is None or run.memory.total + run.memory.forward < HEADROOM * free(run.device)
    # Recomputing activations reads the state of the random-number generator, which a capture does not allow.
    plain = run.config.grad_checkpoint == "off"
    return possible and (switch == "on" or (switch == "auto" and small and fits and plain))


class UpdateGraph:
    """An update as a function of a run, in the place of trainer.update."""

    def __init__(
        self,
        update: Callable[[Run, Tensor | None], Tensor],
        next_batch: Callable[[Run], tuple[Tensor, Tensor]],
    ) -> None:
        self.update, self.next_batch = update, next_batch
        self.progress: Progress | None = None
        """The run's progress at the warm-up; a roll-back replaces it, and the optimizers' states with it."""
        self.warm_up_left = 0
        self.replay: Callable[[], None] | None = None

    def __call__(self, run: Run) -> Tensor:
        """Do one update. Returns loss and gradient norm, (2,), which the next update overwrites."""
        graphs = run.kind.graphs
        assert graphs is not None
        if self.progress is not run.progress:
            self.begin(run)
        for rate, group in zip(self.rates, parameter_groups(run), strict=True):
            rate.fill_(group["lr"])
        self.decay.fill_(ema_decay(run.progress.step, run.config))
        if self.warm_up_left:
            self.warm_up_left -= 1
            with self.rates_on_the_device(run):
                return graphs.warm_up(lambda: self.update(run, self.decay))
        if self.replay is None:
            try:
                self.capture(run, graphs)
            except RuntimeError as error:
                self.give_up(run, error)
                return self.update(run, None)
        for old, new in zip(self.batch, self.next_batch(run), strict=True):  # which seeds dropout, too
            old.copy_(new)
        assert self.replay is not None
        self.replay()
        return self.values

    def begin(self, run: Run) -> None:
        """Make the tensors that an update reads, and warm up."""
        self.progress, self.warm_up_left, self.replay = run.progress, WARM_UP_UPDATES, None
        self.decay = torch.zeros((), device=run.device)
        self.rates = [torch.zeros((), device=run.device) for _ in parameter_groups(run)]

    def capture(self, run: Run, graphs: Graphs) -> None:
        """Capture the update. Raises: RuntimeError if a part of it cannot be captured."""
        self.batch = self.next_batch(run)  # (B, T) each
        captured = replace(run, captured_batch=self.batch)

        def work() -> Tensor:
            """The update, reading the batch and the learning rates from the device."""
            with self.rates_on_the_device(run, capturable=True):
                return self.update(captured, self.decay)

        self.replay, self.values = graphs.capture(work)

    @contextmanager
    def rates_on_the_device(self, run: Run, *, capturable: bool = False) -> Generator[None]:
        """Let the optimizers read the learning rates of their groups from the device.

        capturable: the flag of PyTorch's AdamW, which it wants set during a capture and not otherwise.
        """
        groups, before = parameter_groups(run), [dict(group) for group in parameter_groups(run)]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = capturable
        try:
            yield
        finally:
            for group, old in zip(groups, before, strict=True):
                group.update(old)

    def give_up(self, run: Run, error: RuntimeError) -> None:
        """Go on without a graph."""
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        warn(f"the update could not be captured as a CUDA graph, going on without: {reason}")
        run.graph, self.batch = None, ()
        run.model.zero_grad()
        run.scaler._per_optimizer_states.clear()  # pyright: ignore[reportPrivateUsage] - of half an update


def parameter_groups(run: Run) -> list[dict[str, Any]]:
    """The parameter groups of all optimizers."""
    return [group for optimizer in run.optimizers for group in optimizer.param_groups]
