"""Base class of optimizers that are never compiled: creating one does not import torch._dynamo.

Example: class Muon(UncompiledOptimizer): ...
"""

from collections.abc import Callable
from inspect import unwrap
from typing import Any, cast

import torch


class UncompiledOptimizer(torch.optim.Optimizer):
    """torch.optim.Optimizer without the decorators that hide its methods from torch.compile.

    They import torch._dynamo at the first call, which takes 0.7 s. We compile only the loss.
    """

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(UncompiledOptimizer, torch.optim.AdamW):
    """torch.optim.AdamW as an UncompiledOptimizer."""

    step = torch.no_grad()(unwrap(cast(Callable[..., Any], torch.optim.AdamW.step)))
