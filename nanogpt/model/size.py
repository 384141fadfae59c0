"""The size and the cost of a model, without making one.

Example: network = meta_model(GPTConfig(vocab_size=65)); network.num_parameters(); flops_per_token(network)
"""

import torch
from torch import nn

from nanogpt.config import GPTConfig
from nanogpt.model import kernels
from nanogpt.model.gpt import GPT
from nanogpt.model.lora import LoRALinear


def meta_model(config: GPTConfig) -> GPT:
    """A GPT whose tensors have shapes but take no memory (PyTorch's meta device)."""
    with torch.device("meta"), kernels.SkipInitialization():
        return GPT(config)


def flops_per_token(model: GPT) -> int:
    """Floating-point operations of one training step, forward and backward, for each token.

    6 for each weight of a linear layer, or 4 if it is not trained, plus 12 * layers * width of all heads *
    context for the attention (Chowdhery et al., PaLM, 2022, appendix B). Tables that are only looked up cost
    nothing.
    """
    config = model.config
    layers = (module for module in model.modules() if isinstance(module, (nn.Linear, LoRALinear)))
    weights = (weight for layer in layers for weight in layer.parameters() if weight.dim() == 2)
    products = sum((6 if weight.requires_grad else 4) * weight.numel() for weight in weights)
    return products + 12 * config.n_layer * config.n_head * config.head_width * config.block_size
