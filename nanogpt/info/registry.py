"""What `nanogpt info` can describe: a row for each kind of file or folder, and `describe`, which finds it.

Example: describe(Path("out")).progress["step"]
To add a kind, write a function that returns its Description, and give it a row in KINDS.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nanogpt.data.swap import VOCAB_FILE
from nanogpt.errors import UserError, require
from nanogpt.info import adapters, exports, foreign, ours
from nanogpt.info.description import Description, VerifyProgress
from nanogpt.info.gguf_header import is_gguf
from nanogpt.initialize.ours import is_checkpoint, is_safetensors


class Kind(NamedTuple):
    """A kind of file or folder."""

    title: str
    matches: Callable[[Path], bool]
    describe: Callable[[Path, VerifyProgress | None], Description]
    """Describes a path, and verifies its checksums unless `advance` is None. Raises: UserError if damaged."""
    has_checksum: bool = False


def without_checksum(
    read: Callable[[Path], Description],
) -> Callable[[Path, VerifyProgress | None], Description]:
    """A reader of a format that has no checksums, as a row has it."""
    return lambda path, advance: read(path)


KINDS = (
    Kind("a run folder", ours.is_run, ours.describe_run, has_checksum=True),
    Kind("a checkpoint", is_checkpoint, ours.describe_checkpoint, has_checksum=True),
    Kind("a data folder", ours.is_data, ours.describe_data, has_checksum=True),
    Kind("an exported safetensors file", is_safetensors, without_checksum(exports.describe_safetensors)),
    Kind("adapters of peft", adapters.is_adapter, without_checksum(adapters.describe_adapter)),
    Kind("a GGUF file", is_gguf, without_checksum(exports.describe_gguf)),
    Kind("an exported ONNX folder", exports.is_onnx, without_checksum(exports.describe_onnx)),
    Kind("an exported page", exports.is_page, without_checksum(exports.describe_page)),
    Kind(
        "a model of nanoGPT, litgpt or transformers",
        foreign.is_foreign,
        without_checksum(foreign.describe_foreign),
    ),
)
"""Every kind, in the order in which they are tried."""


def describe(path: Path, *, verified: bool = False, advance: VerifyProgress = int) -> Description:
    """Describe a file or folder without reading weights.

    verified: compare all of it with its checksums.
    advance: called with the number of bytes compared since the last call.
    Raises: UserError if it is missing, damaged, or of no kind that is known.
    """
    try:
        require(path.exists(), f"{path} does not exist: check the path")
        require(path.is_file() or path.is_dir(), f"{path} is neither a file nor a folder")
        require(path.is_dir() or path.stat().st_size > 0, f"{path} is empty")
        row = next((row for row in KINDS if row.matches(path)), None)
        if row is None:
            raise UserError(refusal(path))
        require(
            row.has_checksum or not verified,
            f"{path} is {row.title}, which has no checksums: leave --verify out",
        )
        return row.describe(path, advance if verified else None)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UserError as error:  # readers of --init_from begin with it
        raise UserError(str(error).removeprefix("--init_from ")) from error


def refusal(path: Path) -> str:
    """Why there is nothing to say of a path."""
    if path.is_file() and (path.parent / VOCAB_FILE).is_file():
        return f"{path} is a part of a data folder: give the folder, {path.parent}"
    if path.suffix == ".safetensors":
        return f"{path} does not say what model it is of: give the folder with its config.json"
    return f"{path} is none of {', '.join(row.title for row in KINDS)} (or it is damaged)"
