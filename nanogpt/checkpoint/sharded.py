"""A checkpoint in parts: every process writes its own, while the training goes on.

Use:    writing = begin(folder, tensors); digests = writing.result(); verify(folder, digests)
        read(folder, tensors), into tensors that may be parts themselves, of any number of processes
        tensors = load_full(folder)
The engine is torch.distributed.checkpoint. What is small, and the SHA-256 of every file in the folder, is
in the sealed checkpoint beside it (checkpoint/format.py). Tensors go by names: model.*, average.*, and
optimizers.<optimizer>.<parameter>.<moment>.
"""

import functools
import io
import pickle
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt.errors import UserError, require
from nanogpt.files import fsync, sha256

if TYPE_CHECKING:  # it takes long to import, and a PyTorch without torch.distributed has none of it
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

INDEX = ".metadata"
"""Where torch.distributed.checkpoint says which tensor is in which file."""

ALLOWED_CLASSES = {
    "torch": {"Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
}
"""All that an index is made of."""


FORMAT_3_NAMES = {
    "wte": "token_embedding",
    "wpe": "position_embedding",
    "ngrams": "ngram_embedding",
    "ln_1": "norm_1",
    "ln_2": "norm_2",
    "ln_f": "final_norm",
}
"""Modules of the model as checkpoints up to format 3 called them, GPT-2's names -> their names."""


def current_name(name: str) -> str:
    """The name of a tensor, as model.blocks.0.norm_1.weight, from that of any format."""
    return ".".join(FORMAT_3_NAMES.get(part, part) for part in name.split("."))


def flatten(
    model: Mapping[str, Tensor], average: Mapping[str, Tensor], states: Iterable[Mapping[int, Any]]
) -> dict[str, Tensor]:
    """Weights, their average, and the states of the optimizers' parameters as one dictionary."""
    tensors = {f"model.{name}": tensor for name, tensor in model.items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.items()}
    for number, state in enumerate(states):
        for parameter, moments in state.items():
            for name, value in moments.items():
                tensors[f"optimizers.{number}.{parameter}.{name}"] = value
    return tensors


def unflatten(
    tensors: Mapping[str, Tensor], optimizers: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[int, Any]]]:
    """What `flat` was given."""
    weights: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}}
    states: list[dict[int, Any]] = [{} for _ in range(optimizers)]
    for key, tensor in tensors.items():
        kind, name = key.split(".", 1)
        if kind == "optimizers":
            number, parameter, moment = name.split(".")
            states[int(number)].setdefault(int(parameter), {})[moment] = tensor
        else:
            weights[kind][name] = tensor
    return weights["model"], weights["average"], states


@functools.cache
def background_group() -> "dist.ProcessGroup":
    """What the processes agree over while they write: the training uses another one at the same time."""
    return cast("dist.ProcessGroup", dist.new_group(backend="gloo"))


def begin_save(folder: Path, tensors: dict[str, Tensor]) -> "Future[dict[str, str]]":
    """Copy the tensors, then write them into the folder in the background; all processes together.

    The result is the SHA-256 of each file that this process has written, or a UserError why it has not.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save  # pyright: ignore[reportUnknownVariableType]

    digests: Future[dict[str, str]] = Future()
    rank = dist.get_rank()

    def sum_up(saved: "Future[Any]") -> None:
        """Settle `digests`."""
        try:
            saved.result()
            own = [*folder.glob(f"__{rank}_*"), *([folder / INDEX] if rank == 0 else [])]
            for path in own:
                with open(path, "r+b") as file:
                    fsync(file.fileno(), folder)
            digests.set_result({path.name: sha256(path) for path in own})
        except (Exception, CheckpointException) as error:
            digests.set_exception(UserError(f"cannot write {folder}: {cause_of(error)}"))

    writer = FileSystemWriter(folder, sync_files=False)  # see `sum_up`: not every disk can
    saving = cast("Future[Any]", async_save(tensors, storage_writer=writer, process_group=background_group()))
    saving.add_done_callback(sum_up)
    return digests


def cause_of(error: BaseException) -> str:
    """Why a part could not be written or read, in a line."""
    failures = getattr(error, "failures", None)  # of a CheckpointException, by process
    if failures:
        error = cast(BaseException, next(iter(failures.values()))[0])
    if not isinstance(error, OSError) and isinstance(error.__context__, OSError):
        error = error.__context__  # torch.save turns a full disk into a RuntimeError
    if "inline_container" in str(error):  # and loses the cause on its way from another process
        return "the disk is full, or broken"
    return (isinstance(error, OSError) and error.strerror) or (str(error).splitlines() or [repr(error)])[-1]


def verify(folder: Path, digests: Mapping[str, str]) -> None:
    """Errors: UserError if one of these files is missing or not what it was."""
    for name, digest in digests.items():
        path = folder / name
        require(path.is_file(), f"{path} is missing, a part of the checkpoint: keep the folder beside it")
        require(sha256(path) == digest, f"{path} is damaged (its checksum does not match)")


class Index(pickle.Unpickler):
    """Reads an index and nothing else: a hostile one runs nothing."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """A class by its name. Errors: pickle.UnpicklingError if an index has no use for it."""
        if global_name not in ALLOWED_CLASSES.get(module_name, ()):
            raise pickle.UnpicklingError(f"{module_name}.{global_name} has no place in a checkpoint")
        return super().find_class(module_name, global_name)


def open_reader(folder: Path) -> "FileSystemReader":
    """What reads the tensors in a folder, and nothing else.

    Errors, when it reads the index: UserError if that is none, or holds more than tensors.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    class Reader(FileSystemReader):
        """Takes no class out of an index that has no place there."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            """The index."""
            require((folder / INDEX).is_file(), f"{folder} is not a checkpoint: {INDEX} is missing")
            content = (folder / INDEX).read_bytes()
            try:
                found = Index(io.BytesIO(content)).load()
            except Exception as error:
                raise UserError(f"{folder} is not a checkpoint ({error})") from error
            require(
                isinstance(found, Metadata)
                and all(
                    isinstance(item, TensorStorageMetadata) for item in found.state_dict_metadata.values()
                ),
                f"{folder} is not a checkpoint: it holds more than tensors",
            )
            index = cast(Metadata, found)
            index.state_dict_metadata = {
                current_name(name): item for name, item in index.state_dict_metadata.items()
            }
            index.storage_data = {
                replace(place, fqn=current_name(place.fqn)): info
                for place, info in index.storage_data.items()
            }
            return index

    return Reader(folder)


def shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Names of the tensors in the folder, with what each is as a whole."""
    items = cast("dict[str, TensorStorageMetadata]", open_reader(folder).read_metadata().state_dict_metadata)
    return {name: (item.size, item.properties.dtype) for name, item in items.items()}


def load(folder: Path, tensors: dict[str, Tensor], *, alone: bool = False) -> None:
    """Fill tensors, or parts of them, with what the folder holds; all processes together, or this one alone.

    Errors: UserError if it does not hold them, or cannot be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load  # pyright: ignore[reportUnknownVariableType]

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # said when alone
            load(cast(dict[str, Any], tensors), storage_reader=open_reader(folder), no_dist=alone)
    except CheckpointException as error:
        raise UserError(f"cannot read {folder}: {cause_of(error)}") from error


def load_full(folder: Path) -> dict[str, Tensor]:
    """All tensors in the folder, whole and on the CPU, for this process alone. Errors: as `read`."""
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in shapes(folder).items()}
    load(folder, tensors, alone=True)
    return tensors


def empty_states(
    tensors: Mapping[str, tuple[torch.Size, torch.dtype]], optimizers: Iterable[torch.optim.Optimizer]
) -> list[dict[int, Any]]:
    """Empty states for the optimizers' parameters, each moment in parts if its parameter is."""
    states: list[dict[int, Any]] = []
    for number, optimizer in enumerate(optimizers):
        parameters: list[Tensor] = [p.detach() for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, Any] = {}
        for key, (size, dtype) in tensors.items():
            if not key.startswith(f"optimizers.{number}."):
                continue
            index, name = key.split(".")[2:]
            like = parameters[int(index)]
            same = size == like.shape
            empty = torch.zeros_like(like, dtype=dtype) if same else torch.zeros(size, dtype=dtype)
            state.setdefault(int(index), {})[name] = empty
        states.append(state)
    return states
