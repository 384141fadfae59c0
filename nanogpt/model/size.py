"""The size and the cost of a model, without allocating it.

Example: model = meta_model(GPTConfig(vocab_size=65)); model.num_parameters(); flops_per_token(model)
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from nanogpt.config import GPTConfig
from nanogpt.model.gpt import GPT
from nanogpt.model.lora import LoRALinear


def meta_model(config: GPTConfig) -> GPT:
    """A GPT whose tensors have shapes but take no memory (PyTorch's meta device)."""
    with torch.device("meta"), SkipInitialization():
        return GPT(config)


class SkipInitialization(TorchFunctionMode):
    """A context in which torch.nn.init does nothing: a tensor on the meta device has no values to set.

    PyTorch would still run a Python reference of each initialization, and import torch._dynamo for it: 0.7 s.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of PyTorch, unless it initializes a tensor, its first argument."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def flops_per_token(model: GPT) -> int:
    """Floating-point operations of one training step, forward and backward, for each token.

    6 for each weight of a linear layer, or 4 if it is not trained, plus 12 * layers * width of all heads *
    context for attention (Chowdhery et al., PaLM, 2022, appendix B). Looking up embeddings costs nothing.
    """
    config = model.config
    layers = (module for module in model.modules() if isinstance(module, (nn.Linear, LoRALinear)))
    weights = (weight for layer in layers for weight in layer.parameters() if weight.dim() == 2)
    products = sum((6 if weight.requires_grad else 4) * weight.numel() for weight in weights)
    return products + 12 * config.n_layer * config.n_head * config.head_width * config.block_size
