"""Whether what a checkpoint holds makes sense: each part of its type, and together a model.

Use:    check(content, progress={"step": int, ...})        before a Checkpoint is made of it
        check_states(optimizers, saved)                    before they are loaded
        require_plain(content)                             before it is written
The seal says that a file is as it was written, this says that a NanoGPT can have written it. Errors are
UserErrors that name what is wrong, for "checkpoint ... is malformed: ...".
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, cast

import torch
from torch import Tensor, nn

from nanogpt.config import TrainConfig, from_dict, model_config
from nanogpt.errors import require
from nanogpt.model.gpt import meta_model
from nanogpt.settings import show_value
from nanogpt.tokenizer.registry import from_dict as tokenizer_from_dict

DTYPES = ("float32", "bfloat16", "float16")

PLAIN = (str, int, float, bool, type(None), bytes)
"""With lists, tuples and dictionaries, all that weights_only=True reads beside tensors."""


def check(content: Mapping[str, Any], progress: Mapping[str, type]) -> None:
    """Errors: UserError if a part of a checkpoint is not what it must be.

    progress: the numbers in it, with their types.
    """
    for name in ("config", "progress", "model", "average", "scaler", "precision", "tokenizer", "shards"):
        require(is_named(content[name]), f"{name} is not a dictionary with names")
    require(isinstance(content["fingerprint"], str), "the fingerprint is not a text")
    config = from_dict(TrainConfig, content["config"])
    check_progress(content["progress"], progress)
    check_numbers(content["scaler"], "scaler")
    check_precision(content["precision"])
    check_optimizers(content["optimizers"])
    check_shards(content["shards"])
    check_vocabulary(content["tokenizer"], content["vocab_size"])
    if not content["shards"]:
        check_weights(config, content["vocab_size"], content["model"], content["average"])


def is_named(part: Any) -> bool:
    """Whether a part is a dictionary whose keys are texts."""
    return isinstance(part, dict) and all(isinstance(key, str) for key in cast(dict[Any, Any], part))


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float that is a number."""
    return type(value) in (int, float) and not math.isnan(value)


def check_progress(progress: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """Errors: UserError if a number is missing that all have had, unknown, or of another type."""
    require("step" in progress, "progress has no step")
    for name, value in progress.items():
        require(name in kinds, f"progress has an unknown number {show_value(name)}")
        fits = type(value) is int if kinds[name] is int else is_number(value)
        least = -1 if name == "furthest_bad_step" else -math.inf if kinds[name] is float else 0
        require(fits and value >= least, f"progress: {name} is {show_value(value)}")


def check_numbers(part: Mapping[str, Any], name: str) -> None:
    """Errors: UserError if something in a part is no number."""
    for key, value in part.items():
        require(is_number(value) and abs(value) < 2**63, f"{name}: {show_value(key)} is {show_value(value)}")


def check_precision(precision: Mapping[str, Any]) -> None:
    """Errors: UserError if device and dtype are not named."""
    require(isinstance(precision.get("device"), str), "precision names no device")
    for name in ("dtype", *(["muon_dtype"] if "muon_dtype" in precision else [])):
        dtype = precision.get(name)
        require(isinstance(dtype, str) and dtype in DTYPES, f"precision has the {name} {show_value(dtype)}")
    count = precision.get("num_micro_batches", 1)
    require(type(count) is int and 0 < count < 10**9, f"precision has {show_value(count)} micro-batches")


def check_optimizers(optimizers: Any) -> None:
    """Errors: UserError if there is a state that is not made of tensors, by number and name."""
    require(isinstance(optimizers, list), "optimizers is not a list")
    for saved in cast(list[Any], optimizers):
        require(is_named(saved) and isinstance(saved.get("state"), dict), "an optimizer has no state")
        for number, moments in cast(dict[Any, Any], saved["state"]).items():
            require(type(number) is int and is_named(moments), "the state of an optimizer is none")
            require(all(map(is_tensor, moments.values())), "a moment of an optimizer is not a tensor")


def is_tensor(value: Any) -> bool:
    """Whether a value is an ordinary tensor, with all its numbers."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def check_shards(shards: Mapping[str, Any]) -> None:
    """Errors: UserError if the shards are not files of one folder beside the checkpoint."""
    for name, digest in shards.items():
        path = PurePosixPath(name)
        inside = len(path.parts) > 1 and not path.is_absolute() and ".." not in path.parts
        require(inside and "\0" not in name, f"a shard has the name {show_value(name)}")
        require(isinstance(digest, str), f"the shard {show_value(name)} has no checksum")
    folders = {PurePosixPath(name).parent for name in shards}
    require(len(folders) <= 1, "its shards are in several folders")


def check_vocabulary(tokenizer: Mapping[str, Any], size: Any) -> None:
    """Errors: UserError if there is no tokenizer, or one with another number of tokens."""
    require(type(size) is int, f"vocab_size is {show_value(size)}")
    try:
        tokens = tokenizer_from_dict(tokenizer)
        found = tokens.vocab_size
        tokens.decode([0, size - 1] if size == found else [])
    except Exception as error:  # whatever a wrong vocabulary raises, in libraries too
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        require(False, f"the tokenizer is none ({detail:.80})")
        return
    require(found == size, f"vocab_size is {size:,}, but the tokenizer has {found:,} tokens")


def check_weights(config: TrainConfig, vocab_size: int, model: Any, average: Any) -> None:
    """Errors: UserError if the weights are not those of the model that the settings describe."""
    require(config.n_layer <= len(model), f"{config.n_layer:,} layers do not fit {len(model):,} tensors")
    try:
        expected = meta_model(model_config(config, vocab_size)).state_dict()
    except (RuntimeError, TypeError, OverflowError) as error:
        require(False, f"no model is as large as the settings say ({str(error).splitlines()[0]:.80})")
        return
    for what, weights in (("model", model), ("average", average or expected)):
        for name in expected.keys() ^ weights.keys():
            lack = "missing" if name in expected else "unknown"
            require(False, f"{what}: the tensor {show_value(name)} is {lack}")
        for name, tensor in cast(Mapping[str, Any], weights).items():
            require(is_tensor(tensor), f"{what}: {name} is not a tensor")
            own = expected[name]
            require(
                tensor.shape == own.shape and tensor.dtype == own.dtype,
                f"{what}: {name} is of shape {tuple(tensor.shape)}, {tensor.dtype}, "
                f"not {tuple(own.shape)}, {own.dtype}",
            )


def check_states(optimizers: Sequence[torch.optim.Optimizer], states: Sequence[Mapping[int, Any]]) -> None:
    """Errors: UserError if saved states do not fit the parameters of the optimizers."""
    require(
        len(states) == len(optimizers), f"it has {len(states)} optimizers, the run needs {len(optimizers)}"
    )
    for optimizer, state in zip(optimizers, states, strict=True):
        names = {"step", "exp_avg", "exp_avg_sq"} if "betas" in optimizer.defaults else {"momentum"}
        shapes = [parameter.shape for parameter in parameters_of(optimizer)]
        require(set(state) <= set(range(len(shapes))), "an optimizer has more states than parameters")
        for number, moments in state.items():
            require(set(moments) == names, f"an optimizer has the moments {show_value(', '.join(moments))}")
            for name, value in moments.items():
                shape = torch.Size() if name == "step" else shapes[number]
                require(
                    value.shape == shape and value.dtype == torch.float32,
                    f"{name} of parameter {number} is of shape {tuple(value.shape)}, {value.dtype}, "
                    f"not {tuple(shape)}",
                )


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of an optimizer, in the order of its state."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def require_plain(value: Any, where: str = "checkpoint") -> None:
    """Errors: TypeError naming what weights_only=True would not read again."""
    kind = cast(type[Any], type(value))
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = cast(dict[Any, Any], value).items()
        for key, item in items:
            require_plain(key, f"a key of {where}")
            require_plain(item, f"{where}[{show_value(key)}]")
    elif kind in (list, tuple):
        for number, item in enumerate(value):
            require_plain(item, f"{where}[{number}]")
    elif kind is int:
        if abs(value) >= 2**2000:  # the reader takes 255 bytes
            raise TypeError(f"{where} is too large a number to be read again")
    elif not isinstance(value, Tensor | nn.Parameter) and kind not in (*PLAIN, torch.Size):
        raise TypeError(f"{where} is of type {kind.__name__}, which could not be read again")
