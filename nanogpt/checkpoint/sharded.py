"""Sharded checkpoints: every process writes the shards of its tensors in the background, during training.

Example: save = begin_save(folder, tensors); digests = save.result(); verify(folder, digests)
         load(folder, tensors)           # sharded over any number of processes, or full
         tensors = load_full(folder)     # in one process
torch.distributed.checkpoint writes and reads a folder of shards. The SHA-256 of each file in it, and all that
is not a tensor, is in the sealed checkpoint file (checkpoint/format.py). The names of the tensors are
model.*, average.* and optimizers.<optimizer>.<parameter>.<moment>.
"""

import functools
import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt.distributed.dtensor import parameters_of
from nanogpt.errors import UserError, require
from nanogpt.storage.files import fsync, sha256

if TYPE_CHECKING:  # slow to import, and missing from a PyTorch without torch.distributed
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

INDEX = ".metadata"
"""Name of torch.distributed.checkpoint's index, a pickle that says which tensor is in which file."""

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
"""Module -> its classes that an index consists of. No others are unpickled."""

FORMAT_3_NAMES = {
    "wte": "token_embedding",
    "wpe": "position_embedding",
    "ngrams": "ngram_embedding",
    "ln_1": "norm_1",
    "ln_2": "norm_2",
    "ln_f": "final_norm",
}
"""Name of a module of the model up to checkpoint format 3 (GPT-2's name) -> its current name."""


def current_name(name: str) -> str:
    """Current name of a tensor (model.blocks.0.norm_1.weight), from its name in any checkpoint format."""
    return ".".join(FORMAT_3_NAMES.get(module, module) for module in name.split("."))


def flatten(
    model: Mapping[str, Tensor], average: Mapping[str, Tensor], states: Iterable[Mapping[int, Any]]
) -> dict[str, Tensor]:
    """Flatten weights, their average and the optimizers' states into one dictionary of tensors."""
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
    """Inverse of `flatten`. optimizers: their number."""
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
    """Process group for saving in the background, since training uses the default group at the same time."""
    return cast("dist.ProcessGroup", dist.new_group(backend="gloo"))


def begin_save(folder: Path, tensors: dict[str, Tensor]) -> "Future[dict[str, str]]":
    """Copy the tensors, then write them into the folder in the background. All processes call it together.

    The future's result maps the name of each file that this process wrote to its SHA-256. If writing failed,
    the result raises UserError.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save  # pyright: ignore[reportUnknownVariableType]

    digests: Future[dict[str, str]] = Future()
    rank = dist.get_rank()

    def set_digests(saved: "Future[Any]") -> None:
        """Sync the files that this process wrote, and set the result of `digests`."""
        try:
            saved.result()
            written = [*folder.glob(f"__{rank}_*"), *([folder / INDEX] if rank == 0 else [])]
            for path in written:
                with open(path, "r+b") as file:
                    fsync(file.fileno(), folder)
            digests.set_result({path.name: sha256(path) for path in written})
        except (Exception, CheckpointException) as error:
            digests.set_exception(UserError(f"cannot write {folder}: {cause_of(error)}"))

    writer = FileSystemWriter(folder, sync_files=False)  # set_digests syncs, where the disk can
    saving = cast("Future[Any]", async_save(tensors, storage_writer=writer, process_group=background_group()))
    saving.add_done_callback(set_digests)
    return digests


def cause_of(error: BaseException) -> str:
    """Explain in one line why a shard could not be written or read."""
    failures = getattr(error, "failures", None)  # CheckpointException: rank -> (error, traceback)
    if failures:
        error = cast(BaseException, next(iter(failures.values()))[0])
    if not isinstance(error, OSError) and isinstance(error.__context__, OSError):
        error = error.__context__  # torch.save turns a full disk into a RuntimeError
    if "inline_container" in str(error):  # the same RuntimeError from another process, without its cause
        return "the disk is full, or broken"
    return (isinstance(error, OSError) and error.strerror) or (str(error).splitlines() or [repr(error)])[-1]


def verify(folder: Path, digests: Mapping[str, str], advance: Callable[[int], object] = int) -> None:
    """Verify the SHA-256 of files in a folder.

    advance: called with the number of bytes verified since the last call.
    Raises: UserError if a file is missing or damaged.
    """
    for name, digest in digests.items():
        path = folder / name
        require(path.is_file(), f"{path} is missing, a shard of the checkpoint: copy its folder with last.pt")
        require(sha256(path) == digest, f"{path} is damaged (its checksum does not match)")
        advance(path.stat().st_size)


class IndexUnpickler(pickle.Unpickler):
    """Unpickler restricted to ALLOWED_CLASSES, so that a malicious index cannot run code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Find a class by its name. Raises: pickle.UnpicklingError if it is not allowed."""
        if global_name not in ALLOWED_CLASSES.get(module_name, ()):
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not allowed in a checkpoint")
        return super().find_class(module_name, global_name)


def open_reader(folder: Path) -> "FileSystemReader":
    """Storage reader of torch.distributed.checkpoint for a folder of tensors.

    Its read_metadata raises UserError if the index is missing or malformed, or lists more than tensors.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    class Reader(FileSystemReader):
        """Reader that unpickles the index safely and renames the tensors of older formats."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            """Read the index."""
            require((folder / INDEX).is_file(), f"{folder} is not a checkpoint: {INDEX} is missing")
            content = (folder / INDEX).read_bytes()
            try:
                index = IndexUnpickler(io.BytesIO(content)).load()
            except Exception as error:
                raise UserError(f"{folder} is not a checkpoint ({error})") from error
            holds_tensors = isinstance(index, Metadata) and all(
                isinstance(item, TensorStorageMetadata) for item in index.state_dict_metadata.values()
            )
            require(holds_tensors, f"{folder} is not a checkpoint: it holds more than tensors")
            index = cast(Metadata, index)
            index.state_dict_metadata = {
                current_name(name): item for name, item in index.state_dict_metadata.items()
            }
            index.storage_data = {
                replace(key, fqn=current_name(key.fqn)): location
                for key, location in index.storage_data.items()
            }
            return index

    return Reader(folder)


def shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Full shape and dtype of each tensor in the folder, by name."""
    items = cast("dict[str, TensorStorageMetadata]", open_reader(folder).read_metadata().state_dict_metadata)
    return {name: (item.size, item.properties.dtype) for name, item in items.items()}


def load(folder: Path, tensors: dict[str, Tensor], *, one_process: bool = False) -> None:
    """Load the folder's values into full or sharded tensors, in place.

    All processes call it together; with one_process, this one loads without the others.
    Raises: UserError if a tensor is missing from the folder, or a file cannot be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load  # pyright: ignore[reportUnknownVariableType]

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # because of no_dist
            load(cast(dict[str, Any], tensors), storage_reader=open_reader(folder), no_dist=one_process)
    except CheckpointException as error:
        raise UserError(f"cannot read {folder}: {cause_of(error)}") from error


def load_full(folder: Path) -> dict[str, Tensor]:
    """Load all tensors in the folder, full and on the CPU, in one process. Raises: UserError as in `load`."""
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in shapes(folder).items()}
    load(folder, tensors, one_process=True)
    return tensors


def empty_states(
    tensors: Mapping[str, tuple[torch.Size, torch.dtype]], optimizers: Iterable[torch.optim.Optimizer]
) -> list[dict[int, Any]]:
    """Allocate zero states for the optimizers, to load into. A moment is sharded if its parameter is.

    tensors: what `shapes` returns.
    """
    states: list[dict[int, Any]] = []
    for number, optimizer in enumerate(optimizers):
        parameters = [parameter.detach() for parameter in parameters_of(optimizer)]
        state: dict[int, Any] = {}
        for key, (shape, dtype) in tensors.items():
            if not key.startswith(f"optimizers.{number}."):
                continue
            index, name = key.split(".")[2:]
            parameter = parameters[int(index)]
            is_moment = shape == parameter.shape  # the other state of a parameter is its step count, a scalar
            zeros = torch.zeros_like(parameter, dtype=dtype) if is_moment else torch.zeros(shape, dtype=dtype)
            state.setdefault(int(index), {})[name] = zeros
        states.append(state)
    return states
