"""Steps: the fastest way to compute tokens with a KV cache on the device of a model.

Example: model = fastest_steps(model); logits, _ = model(idx, cache=step)
On a CPU that is C (native/step.py), on a GPU a CUDA graph (graph_step.py), else the model itself. With
speculation, it computes a few tokens at a time (speculation.py).
"""

from typing import cast

import torch

from nanogpt.config import Dtype
from nanogpt.inference.config import Quantization
from nanogpt.inference.graph_step import GraphGPT
from nanogpt.inference.speculation import NgramGuesses, Speculator
from nanogpt.machine.device import kind_of
from nanogpt.machine.precision import pick_sampling_dtype
from nanogpt.model.gpt import GPT
from nanogpt.model.quantize import sampling_copy
from nanogpt.native.step import NativeGPT, is_watched, native_problem, with_native_steps

StepModel = GPT | NativeGPT | GraphGPT | Speculator
"""Anything that computes tokens with a cache as a GPT does, with the same result up to rounding."""


def fastest_steps(model: GPT, speculate: int = 0, guesses: NgramGuesses | None = None) -> StepModel:
    """Choose how to compute steps. Valid until the model's weights are replaced or moved.

    speculate: number of tokens to guess ahead. guesses: what guesses them; None: n-grams of the text itself.
    """
    native = with_native_steps(model)
    if speculate:
        return Speculator(native, guesses or NgramGuesses(), speculate)
    graphs = kind_of(next(model.parameters()).device).graphs
    if native is model and graphs is not None and not model.training and not is_watched(model):
        return GraphGPT(model, graphs)
    return native


def copy_for_steps(
    model: GPT, trained_in: str, dtype: Dtype, quantization: Quantization
) -> tuple[GPT, torch.dtype]:
    """Copy a model into the form that steps read fastest. Also returns the dtype of its matrix products.

    trained_in: name of the dtype of its training, which dtype "auto" uses where the device is fast at it.
    """
    device = next(model.parameters()).device
    picked = pick_sampling_dtype(dtype, device, trained_in)
    by_columns = device.type == "cpu" and bool(native_problem())
    return cast(GPT, sampling_copy(model, picked, quantization, by_columns=by_columns)), picked
