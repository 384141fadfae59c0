"""Validation of a checkpoint's content: types, values, and shapes of the model and the optimizers.

Example: check(content, progress={"step": int, ...})     # before making a Checkpoint from it
         check_states(optimizers, states)                # before loading optimizer states
         require_plain(content)                          # before saving
The seal proves that a file has not changed since it was written; validation finds content that NanoGPT does
not write. The check functions raise UserError with what is wrong, which the caller reports as "checkpoint ...
is malformed: ...".
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, cast

import torch
from torch import Tensor, nn

from nanogpt.config import TrainConfig, from_dict, model_config
from nanogpt.distributed.dtensor import parameters_of
from nanogpt.errors import UserError, require
from nanogpt.model.lora import add_adapters
from nanogpt.model.size import meta_model
from nanogpt.settings import show_value
from nanogpt.tokenizer.registry import from_dict as tokenizer_from_dict

DTYPES = ("float32", "bfloat16", "float16")

PLAIN_TYPES = (str, int, float, bool, type(None), bytes)
"""Types that weights_only=True reads, besides tensors, lists, tuples and dictionaries."""


def check(content: Mapping[str, Any], progress: Mapping[str, type]) -> None:
    """Check all fields of a checkpoint. Raises: UserError if one is malformed.

    progress: name -> type of each field of Progress.
    """
    for name in ("config", "progress", "model", "average", "scaler", "precision", "tokenizer", "shards"):
        require(has_string_keys(content[name]), f"{name} is not a dictionary with string keys")
    require(isinstance(content["fingerprint"], str), "the fingerprint is not a string")
    config = from_dict(TrainConfig, content["config"])
    check_progress(content["progress"], progress)
    check_numbers(content["scaler"], "scaler")
    check_precision(content["precision"])
    check_optimizers(content["optimizers"])
    check_shards(content["shards"])
    check_vocabulary(content["tokenizer"], content["vocab_size"])
    if not content["shards"]:
        check_weights(config, content["vocab_size"], content["model"], content["average"])


def has_string_keys(value: Any) -> bool:
    """Whether a value is a dictionary whose keys are all strings."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in cast(dict[Any, Any], value))


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, but not NaN."""
    return type(value) in (int, float) and not math.isnan(value)


def check_progress(progress: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """Check the progress of a run. Raises: UserError if the step is missing or a number is unknown or wrong.

    types: as `progress` of `check`.
    """
    require("step" in progress, "progress has no step")
    for name, value in progress.items():
        require(name in types, f"progress has an unknown number {show_value(name)}")
        has_type = type(value) is int if types[name] is int else is_number(value)
        minimum = -1 if name == "furthest_bad_step" else -math.inf if types[name] is float else 0
        require(has_type and value >= minimum, f"progress: {name} is {show_value(value)}")


def check_numbers(numbers: Mapping[str, Any], name: str) -> None:
    """Check that all values in a dictionary, called `name`, are numbers. Raises: UserError if one is not."""
    for key, value in numbers.items():
        require(is_number(value) and abs(value) < 2**63, f"{name}: {show_value(key)} is {show_value(value)}")


def check_precision(precision: Mapping[str, Any]) -> None:
    """Check device, dtypes and number of micro-batches. Raises: UserError if one is missing or unknown."""
    require(isinstance(precision.get("device"), str), "precision has no device")
    for name in ("dtype", *(["muon_dtype"] if "muon_dtype" in precision else [])):
        dtype = precision.get(name)
        require(isinstance(dtype, str) and dtype in DTYPES, f"precision has the {name} {show_value(dtype)}")
    count = precision.get("num_micro_batches", 1)
    require(type(count) is int and 0 < count < 10**9, f"precision has {show_value(count)} micro-batches")
    for name, default in (("threads", 1), ("torch", "")):
        value = precision.get(name, default)
        require(type(value) is type(default), f"precision has the {name} {show_value(value)}")


def check_optimizers(optimizers: Any) -> None:
    """Check that an optimizer's state maps parameter index -> name -> tensor. Raises: UserError if not."""
    require(isinstance(optimizers, list), "optimizers is not a list")
    for saved in cast(list[Any], optimizers):
        has_state = has_string_keys(saved) and isinstance(saved.get("state"), dict)
        require(has_state, "an optimizer has no state")
        for index, moments in cast(dict[Any, Any], saved["state"]).items():
            require(
                type(index) is int and has_string_keys(moments),
                "the state of an optimizer is not a dictionary of moments by parameter",
            )
            require(all(map(is_tensor, moments.values())), "a moment of an optimizer is not a tensor")


def is_tensor(value: Any) -> bool:
    """Whether a value is a dense tensor, neither sparse nor quantized."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def check_shards(shards: Mapping[str, Any]) -> None:
    """Check that all shards are in one folder below the run folder. Raises: UserError if not."""
    for name, digest in shards.items():
        path = PurePosixPath(name)
        is_below = len(path.parts) > 1 and not path.is_absolute() and ".." not in path.parts
        require(is_below and "\0" not in name, f"a shard has the name {show_value(name)}")
        require(isinstance(digest, str), f"the shard {show_value(name)} has no checksum")
    folders = {PurePosixPath(name).parent for name in shards}
    require(len(folders) <= 1, "its shards are in several folders")


def check_vocabulary(saved: Mapping[str, Any], vocab_size: Any) -> None:
    """Check that the tokenizer works and has vocab_size tokens. Raises: UserError if not."""
    require(type(vocab_size) is int, f"vocab_size is {show_value(vocab_size)}")
    try:
        tokenizer = tokenizer_from_dict(saved)
        num_tokens = tokenizer.vocab_size
        tokenizer.decode([0, vocab_size - 1] if vocab_size == num_tokens else [])
    except Exception as error:  # tokenizers and their libraries may raise anything for a malformed vocabulary
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the tokenizer does not work ({detail:.80})") from error
    require(
        num_tokens == vocab_size,
        f"vocab_size is {vocab_size:,}, but the tokenizer has {num_tokens:,} tokens",
    )


def check_weights(config: TrainConfig, vocab_size: int, model: Any, average: Any) -> None:
    """Check names, shapes and dtypes of the weights against the model that the settings describe.

    Raises: UserError if a tensor is missing, unknown, or of another shape or dtype.
    """
    require(config.n_layer <= len(model), f"{config.n_layer:,} layers do not fit {len(model):,} tensors")
    try:
        expected_model = meta_model(model_config(config, vocab_size))
        add_adapters(expected_model, config)
    except (RuntimeError, TypeError, OverflowError) as error:
        detail = str(error).splitlines()[0]
        raise UserError(f"its settings describe a model that is too large ({detail:.80})") from error
    expected = expected_model.state_dict()
    for field, weights in (("model", model), ("average", average or expected)):
        for name in expected.keys() ^ weights.keys():
            problem = "missing" if name in expected else "unknown"
            raise UserError(f"{field}: the tensor {show_value(name)} is {problem}")
        for name, tensor in cast(Mapping[str, Any], weights).items():
            require(is_tensor(tensor), f"{field}: {name} is not a tensor")
            correct = expected[name]
            require(
                tensor.shape == correct.shape and tensor.dtype == correct.dtype,
                f"{field}: {name} is of shape {tuple(tensor.shape)}, {tensor.dtype}, "
                f"not {tuple(correct.shape)}, {correct.dtype}",
            )


def check_states(optimizers: Sequence[torch.optim.Optimizer], states: Sequence[Mapping[int, Any]]) -> None:
    """Check names, shapes and dtypes of saved optimizer states against the optimizers' parameters.

    states: for each optimizer, parameter index -> name -> tensor.
    Raises: UserError if they do not match.
    """
    require(
        len(states) == len(optimizers), f"it has {len(states)} optimizers, the run needs {len(optimizers)}"
    )
    for optimizer, state in zip(optimizers, states, strict=True):
        names = set(state_names(optimizer))
        shapes = [parameter.shape for parameter in parameters_of(optimizer)]
        require(set(state) <= set(range(len(shapes))), "an optimizer has more states than parameters")
        for index, moments in state.items():
            require(set(moments) == names, f"an optimizer has the moments {show_value(', '.join(moments))}")
            for name, value in moments.items():
                shape = torch.Size() if name == "step" else shapes[index]
                require(
                    value.shape == shape and value.dtype == torch.float32,
                    f"{name} of parameter {index} is of shape {tuple(value.shape)}, {value.dtype}, "
                    f"not {tuple(shape)}",
                )


def state_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of the tensors that an optimizer keeps for a parameter: its own `state_names`, or AdamW's."""
    return getattr(optimizer, "state_names", ("step", "exp_avg", "exp_avg_sq"))


def require_plain(value: Any, where: str = "checkpoint") -> None:
    """Check that torch.load(weights_only=True) can read a value, nested in containers or not.

    where: name of the value in the error. Raises: TypeError if it could not be read again.
    """
    kind = cast(type[Any], type(value))
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = cast(dict[Any, Any], value).items()
        for key, item in items:
            require_plain(key, f"a key of {where}")
            require_plain(item, f"{where}[{show_value(key)}]")
    elif kind in (list, tuple):
        for index, item in enumerate(value):
            require_plain(item, f"{where}[{index}]")
    elif kind is int:
        if abs(value) >= 2**2000:  # torch.load reads integers of at most 255 bytes
            raise TypeError(f"{where} is too large a number to be read again")
    elif not isinstance(value, Tensor | nn.Parameter) and kind not in (*PLAIN_TYPES, torch.Size):
        raise TypeError(f"{where} is of type {kind.__name__}, which could not be read again")
