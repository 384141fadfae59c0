"""Measures how fast a training would be on this device: the time of a few of its updates.

Example: cost = seconds_per_token(config, vocab_size, device, dtype, alone=True)
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from nanogpt.config import TrainConfig, model_config
from nanogpt.machine.device import autocast, kind_of, seconds_of
from nanogpt.machine.graphs import Graphs
from nanogpt.machine.precision import pick_muon_dtype
from nanogpt.model.gpt import GPT
from nanogpt.model.size import flops_per_token
from nanogpt.training.cuda_graph import MAX_GRAPH_FLOPS, WARM_UP_UPDATES
from nanogpt.training.optimizer import build_optimizers
from nanogpt.training.sparse import clip_grad_norm, use_sparse_gradients

MEASURED_UPDATES = 3
"""Updates that are measured, after a warm-up."""


def seconds_per_token(
    config: TrainConfig, vocab_size: int, device: torch.device, dtype: torch.dtype, *, alone: bool
) -> float:
    """Measure the shortest time of a few updates, divided by the tokens of a batch.

    alone: whether the training has one process, which may capture its updates as a CUDA graph.
    """
    kind = kind_of(device)
    kind.set_up(device, dtype)
    model = GPT(model_config(config, vocab_size)).to(device)
    if kind.sparse_gradients:
        use_sparse_gradients(model)
    optimizers = build_optimizers(model, config, pick_muon_dtype(config.dtype, device).dtype)
    x, y = torch.randint(vocab_size, (2, config.batch_size, config.block_size), device=device)

    def update() -> Tensor:
        """Do one update."""
        with autocast(device, dtype):
            loss = model.loss(x, y)
        loss.backward()
        clip_grad_norm(model, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        return loss.detach()

    action: Callable[[], object] = update
    small = flops_per_token(model) * x.numel() < MAX_GRAPH_FLOPS
    if kind.graphs is not None and alone and small and config.cuda_graph != "off":
        action = captured(update, optimizers, kind.graphs)
    times = [seconds_of(action, device) for _ in range(1 + MEASURED_UPDATES)]
    return min(times[1:]) / x.numel()  # the first one is a warm-up


def captured(
    update: Callable[[], Tensor], optimizers: Iterable[torch.optim.Optimizer], graphs: Graphs
) -> Callable[[], object]:
    """The update captured as a CUDA graph, as cuda_graph.py will do it; `update` itself if that fails."""
    for _ in range(WARM_UP_UPDATES):
        graphs.warm_up(update)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if "capturable" in group:
            group["capturable"] = True
    try:
        return graphs.capture(update)[0]
    except RuntimeError:
        return update
