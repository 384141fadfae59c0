"""What a run must keep, written so that it cannot be lost, read so that it cannot harm.

Use:    save_checkpoint(path, checkpoint); checkpoint = load_checkpoint(path)
        model, tokenizer = load_model("out/ckpt.pt")
A checkpoint is one self-contained file of plain types and tensors (torch.save, read back with
weights_only=True, so a hostile file runs nothing), followed by a seal: the SHA-256 of all that
stands before it. The seal is verified before anything is used. torch.load reads the file too.
The tensors of a model that several processes share (--parallel fsdp) lie beside it, in a folder that the
file vouches for (checkpoint/sharded.py); `load_checkpoint` puts them together. Which file is the best one and
which is resumed: checkpoint/run_dir.py.
"""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast, get_type_hints

import torch

from nanogpt import seals
from nanogpt.checkpoint import sharded, validation
from nanogpt.config import GPTConfig, TrainConfig, from_dict, model_config
from nanogpt.device import pick_device
from nanogpt.errors import UserError, require
from nanogpt.model.gpt import GPT
from nanogpt.tokenizer.base import Tokenizer
from nanogpt.tokenizer.registry import from_dict as tokenizer_from_dict

FORMAT_VERSION = 4
"""Version of the checkpoint format. Older ones are read too: see `upgraded`."""

FOREIGN = "is not a NanoGPT checkpoint: give the ckpt.pt or last.pt of a run"

SEAL = b"nanogpt\n"
SEAL_SIZE = len(SEAL) + hashlib.sha256().digest_size


@dataclass
class Progress:
    """How far a run is: everything that moves, apart from tensors."""

    step: int = 0
    """Updates done."""
    best_val_loss: float = float("inf")
    """Lowest validation loss so far, in nats per token."""
    evaluated_at: int = 0
    """Step of the last evaluation."""
    worse_evaluations: int = 0
    """Evaluations since the best one."""
    elapsed_s: float = 0.0
    """Seconds spent in training steps."""
    shuffle_id: int = 0
    """Number of the data order: how often the run went back to step around a bad batch."""
    bad_steps: int = 0
    """Steps in a row whose loss or gradient was not finite."""
    rollbacks: int = 0
    """Times the run went back without getting past `furthest_bad_step`."""
    furthest_bad_step: int = -1
    """Furthest step at which the training broke down."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    The randomness of a step is a function of (seed, shuffle_id, step), so config and progress hold
    the whole state of the random-number generators.
    """

    config: dict[str, Any]
    """The resolved TrainConfig (config.to_dict)."""
    vocab_size: int
    progress: dict[str, Any]
    """The fields of Progress."""
    model: dict[str, torch.Tensor]
    """The weights that are trained."""
    average: dict[str, torch.Tensor]
    """Their moving average; empty if the run keeps none."""
    optimizers: list[dict[str, Any]]
    scaler: dict[str, Any]
    """The float16 gradient scaler; empty in other dtypes."""
    precision: dict[str, str | int]
    """What "auto" stood for: device, dtype, muon_dtype, and num_micro_batches of all processes together."""
    tokenizer: dict[str, Any]
    fingerprint: str
    """Fingerprint of the training data."""
    format: int = FORMAT_VERSION
    shards: dict[str, str] = field(default_factory=dict[str, str])
    """The files beside this one that hold the tensors, with their SHA-256; empty if they are here."""

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The weights to use: the average if there is one."""
        return self.average or self.model

    @property
    def train_config(self) -> TrainConfig:
        """The settings of the run."""
        return from_dict(TrainConfig, self.config)

    @property
    def model_config(self) -> GPTConfig:
        """The settings of the model."""
        return model_config(self.train_config, self.vocab_size)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; until it is complete, the file that was there stays untouched.

    Errors: UserError if the folder cannot be written or the disk is full.
    """
    content = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    validation.require_plain(content)  # before the file that is there is touched
    write_sealed(path, content)


def write_sealed(path: Path, content: object) -> None:
    """Write anything as a sealed checkpoint. Errors: as `save_checkpoint`."""
    seals.save_with_checksum(path, content, SEAL)


def verify(path: Path) -> None:
    """Check the seal at the end of the file against all that stands before it.

    Errors: UserError if a single bit has changed, or if the file has no seal.
    """
    left = path.stat().st_size - SEAL_SIZE
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while left > 0 and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
        seal = file.read()
    require(seal.startswith(SEAL), f"{path} is cut short, or {FOREIGN}")
    require(seal == SEAL + digest.digest(), f"checkpoint {path} is damaged (its checksum does not match)")


def load_model(path: str | Path, device_name: str = "auto") -> tuple[GPT, Tokenizer]:
    """The model of a checkpoint on a device, ready to generate, and its tokenizer.

    Errors: UserError if the checkpoint is missing or damaged, or there is no such device.
    """
    return build_model(load_checkpoint(Path(path)), pick_device(device_name))


def build_model(saved: Checkpoint, device: torch.device) -> tuple[GPT, Tokenizer]:
    """The model of a checkpoint in memory on a device, ready to generate, and its tokenizer."""
    model = GPT(saved.model_config)
    model.load_state_dict(saved.weights)
    return model.to(device).eval(), tokenizer_from_dict(saved.tokenizer)


def shards_folder(path: Path, names: Iterable[str]) -> Path:
    """The folder of the shards of the checkpoint at `path`, which have these names."""
    return (path.parent / next(iter(names))).parent


def load_checkpoint(path: Path, *, gather: bool = True) -> Checkpoint:
    """Read a checkpoint onto the CPU, after verifying every bit of it.

    gather: also read the tensors of a sharded checkpoint; else they stay in their shards, unverified.
    Errors: UserError if it is missing, damaged, not a checkpoint, or of a newer version.
    """
    try:
        if not path.exists():
            last = path.with_name("last.pt")
            require(
                path.name != "ckpt.pt" or not last.exists(),
                f"{path} does not exist yet (no evaluation so far): give --checkpoint {last}",
            )
            raise UserError(f"checkpoint {path} does not exist: train one, or check the path")
        require(path.is_file(), f"checkpoint {path} is not a file: give the ckpt.pt or last.pt of a run")
        verify(path)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    try:
        content = read_plain(path)
    except Exception as error:  # sealed, but hostile: whatever the reader then raises
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"checkpoint {path} is not a checkpoint ({detail})") from error
    content = cast(dict[str, Any], content) if isinstance(content, dict) else {}
    version = content.get("format")
    require(version is not None and not isinstance(version, torch.Tensor), f"{path} {FOREIGN}")
    content = upgraded(content)
    require(
        content["format"] == FORMAT_VERSION,
        f"checkpoint {path} has format {version}, this is {FORMAT_VERSION}: update NanoGPT",
    )
    names = {field.name for field in fields(Checkpoint)}
    require(set(content) == names, f"checkpoint {path} was saved by another version: update NanoGPT")
    verify_content(path, content)
    found = Checkpoint(**content)
    if not found.shards or not gather:
        return found
    together = gather_shards(path, found)
    verify_content(path, vars(together))
    return together


def verify_content(path: Path, content: Mapping[str, Any]) -> None:
    """Errors: UserError if a part of the checkpoint is missing, or not what it must be."""
    try:
        validation.check(content, get_type_hints(Progress))
    except UserError as error:
        raise UserError(f"checkpoint {path} is malformed: {error}") from error


def gather_shards(path: Path, head: Checkpoint) -> Checkpoint:
    """The checkpoint with all its tensors, which lie in shards beside it.

    Errors: UserError if one of the files is missing or damaged.
    """
    sharded.verify(path.parent, head.shards)
    tensors = sharded.load_full(shards_folder(path, head.shards))
    try:
        model, average, states = sharded.unflatten(tensors, len(head.optimizers))
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"checkpoint {path} is malformed: its shards have wrong names ({error})") from error
    optimizers = [saved | {"state": state} for saved, state in zip(head.optimizers, states, strict=True)]
    return replace(head, model=model, average=average, optimizers=optimizers, shards={})


def upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint of an older format as the present one has it; any other is left alone.

    Format 1 had no averaged weights, at first a single optimizer, and GPT-2's approximation of GELU only.
    Format 2 had other names, and at first no shards. Up to format 3, weights had GPT-2's names.
    """
    if content["format"] == 1 and isinstance(content.get("config"), dict):
        content = from_format_1(content)
    if content["format"] == 2:
        content = from_format_2(content)
    return from_format_3(content) if content["format"] == 3 else content


def from_format_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint of format 1 as format 2 has it."""
    content = {"average": {}, **content, "format": 2}
    if "optimizer" in content:
        content["optimizers"] = [content.pop("optimizer")]
    settings: dict[str, Any] = content["config"]
    approximate = settings.get("mlp", "gelu") == "gelu"
    content["config"] = {**settings, "mlp": "gelu_tanh"} if approximate else settings
    return content


FORMAT_2_NAMES = {"arithmetic": "precision", "parts": "shards"}
FORMAT_2_PROGRESS = {"order": "shuffle_id", "broken": "bad_steps", "broken_at": "furthest_bad_step"}


def from_format_2(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint of format 2 as format 3 has it. What is malformed stays malformed."""
    content = {FORMAT_2_NAMES.get(name, name): value for name, value in content.items()}
    content = {"shards": {}, **content, "format": 3}
    progress, precision = content.get("progress"), content.get("precision")
    if isinstance(progress, dict):
        named = cast(dict[str, Any], progress)
        content["progress"] = {FORMAT_2_PROGRESS.get(name, name): value for name, value in named.items()}
    if isinstance(precision, dict):
        told = dict(cast(dict[str, Any], precision))
        count = told.pop("pieces", "")  # a text then
        if isinstance(count, str) and count.isdecimal():
            told["num_micro_batches"] = int(count)
        content["precision"] = told
    return content


def from_format_3(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint of format 3 as format 4 has it. What is malformed stays malformed."""
    content = {**content, "format": 4}
    for part in ("model", "average"):
        weights = content.get(part)
        if isinstance(weights, dict):
            named = cast(dict[object, Any], weights)
            content[part] = {sharded.current_name(str(name)): weight for name, weight in named.items()}
    return content


def peek(path: Path) -> tuple[TrainConfig, int]:
    """The settings in a checkpoint and its step, without reading its tensors or verifying anything.

    Errors: whatever a missing or damaged file raises.
    """
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(path)
    try:
        content = read_plain(path, mmap=True)
    except (OSError, RuntimeError):  # a file system that maps no files
        content = read_plain(path)
    content = upgraded(cast(dict[str, Any], content))
    return from_dict(TrainConfig, content["config"]), int(content["progress"]["step"])


def read_plain(path: Path, *, mmap: bool = False) -> object:
    """What torch.load finds in a file, on the CPU: tensors and plain types alone, without a warning.

    Errors: whatever it raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unusual pickles: what they hold is judged by whoever asks
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
