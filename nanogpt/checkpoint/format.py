"""The checkpoint file format: save, load, open and verify a checkpoint, load a model.

Example: save_checkpoint(path, checkpoint); checkpoint = load_checkpoint(path)
         open_checkpoint(path).progress      # fast, however large the file
         model = load_model("out"); model, tokenizer = load_model("out/last.pt")
A checkpoint is one self-contained file of plain types and tensors, written with torch.save and followed by a
seal: the SHA-256 of all bytes before it. Loading verifies the seal first, then calls torch.load with
weights_only=True, so a malicious file cannot run code. Plain torch.load reads the file too.
With --parallel fsdp, last.pt is sharded: its tensors are in a folder of shards (checkpoint/sharded.py), whose
SHA-256 digests are in last.pt; `load_checkpoint` gathers them. checkpoint/run_dir.py says which file of a run
is the best model, and which one is resumed.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, cast, get_type_hints

import torch

from nanogpt import __version__
from nanogpt.checkpoint import sharded, validation
from nanogpt.checkpoint.upgrade import upgrade
from nanogpt.config import GPTConfig, TrainConfig, from_dict, model_config
from nanogpt.errors import UserError, require
from nanogpt.machine.device import pick_device
from nanogpt.model.gpt import GPT
from nanogpt.model.lora import adapter_scale, merged
from nanogpt.storage import seals
from nanogpt.tokenizer.base import Tokenizer
from nanogpt.tokenizer.registry import from_dict as tokenizer_from_dict
from nanogpt.units import plural

FORMAT_VERSION = 5
"""Version of the checkpoint format. Older formats are read too (upgrade.py)."""

NOT_A_CHECKPOINT = "is not a NanoGPT checkpoint: give the ckpt.pt or last.pt of a run"

RUN_FILES = ("ckpt.pt", "last.pt")
"""Checkpoints in a run folder, the one to use first."""

ADAPTER_FILE = "adapter_config.json"
"""The file that makes a folder one of adapters, in the format of peft."""

SEAL = b"nanogpt\n"
SEAL_SIZE = len(SEAL) + hashlib.sha256().digest_size


@dataclass
class Progress:
    """Progress of a run: all of its state that is not a tensor."""

    step: int = 0
    """Number of updates done."""
    best_val_loss: float = float("inf")
    """Lowest validation loss so far, in nats per token."""
    evaluated_at: int = 0
    """Step of the last evaluation."""
    worse_evaluations: int = 0
    """Evaluations since the best one."""
    elapsed_s: float = 0.0
    """Seconds spent in training steps."""
    shuffle_id: int = 0
    """Number of the data order. Every roll-back adds one, so that the run avoids the bad batch."""
    bad_steps: int = 0
    """Number of steps in a row, up to now, whose loss or gradient was not finite."""
    rollbacks: int = 0
    """Number of roll-backs since the run last passed `furthest_bad_step`."""
    furthest_bad_step: int = -1
    """Latest step at which a roll-back became necessary; -1 if none did."""
    used_s: float = 0.0
    """Seconds of --minutes that are used up."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    It needs no states of random-number generators: all randomness of a step is a function of
    (seed, shuffle_id, step), which are in config and progress.
    """

    config: dict[str, Any]
    """The resolved TrainConfig (config.to_dict)."""
    vocab_size: int
    progress: dict[str, Any]
    """The fields of Progress."""
    model: dict[str, torch.Tensor]
    """The trained weights: state_dict of the model, which with LoRA includes the adapters."""
    average: dict[str, torch.Tensor]
    """Exponential moving average (EMA) of the weights; empty without --ema_decay."""
    optimizers: list[dict[str, Any]]
    """state_dict of each optimizer."""
    scaler: dict[str, Any]
    """state_dict of the float16 gradient scaler; empty for other dtypes."""
    precision: dict[str, str | int]
    """The choices made for "auto": device, dtype, muon_dtype, and num_micro_batches over all processes."""
    tokenizer: dict[str, Any]
    """Tokenizer.to_dict."""
    fingerprint: str
    """Fingerprint of the training data."""
    format: int = FORMAT_VERSION
    shards: dict[str, str] = field(default_factory=dict[str, str])
    """Relative path of each shard -> its SHA-256; empty if the tensors are in the checkpoint file itself."""

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The weights for inference: the EMA if there is one, else the trained ones, with adapters merged."""
        config, weights = self.train_config, self.average or self.model
        return merged(weights, adapter_scale(config)) if config.lora_rank else weights

    @property
    def train_config(self) -> TrainConfig:
        """The training settings of the run."""
        return from_dict(TrainConfig, self.config)

    @property
    def model_config(self) -> GPTConfig:
        """The architecture of the model."""
        return model_config(self.train_config, self.vocab_size)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Save a checkpoint atomically: an existing file is replaced only when the new one is complete.

    Raises: UserError if the folder cannot be written or the disk is full.
    """
    content = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    validation.require_plain(content)
    write_sealed(path, content)


def write_sealed(path: Path, content: object) -> None:
    """Write a checkpoint's content and its seal. Raises: UserError as in save_checkpoint."""
    seals.save_with_checksum(path, content, SEAL, torch.save)


def verify(path: Path, advance: Callable[[int], object] = int) -> bool:
    """Verify the checksum in the seal at the end of a checkpoint file. False: the file has no seal.

    advance: called with the number of bytes verified since the last call.
    Raises: UserError if a single bit has changed.
    """
    remaining = path.stat().st_size - SEAL_SIZE
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while remaining > 0 and (block := file.read(min(remaining, 1 << 20))):
            digest.update(block)
            remaining -= len(block)
            advance(len(block))
        seal = file.read()
    sealed = seal.startswith(SEAL)
    require(
        not sealed or seal == SEAL + digest.digest(),
        f"checkpoint {path} is damaged (its checksum does not match)",
    )
    return sealed


def has_seal(path: Path) -> bool:
    """Whether a file ends with the seal of a checkpoint, correct or not."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - SEAL_SIZE))
        return file.read(len(SEAL)) == SEAL


class ModelAndTokenizer(NamedTuple):
    """The two parts of a TextModel."""

    model: GPT
    tokenizer: Tokenizer


class TextModel(ModelAndTokenizer):
    """A model with its tokenizer, for generating and scoring texts. It unpacks into the two."""

    trained_in = "float32"
    """Name of the dtype of its training, which sampling uses where the device is fast at it."""

    def __repr__(self) -> str:
        """One line, instead of all layers."""
        shape, tokenizer = self.model.config, self.tokenizer
        return (
            f"TextModel({plural(shape.n_layer, 'layer')} of width {shape.n_embd}, "
            f"context of {plural(shape.block_size, 'token')}, {self.model.num_parameters():,} parameters, "
            f"{tokenizer.vocab_size:,} {tokenizer.unit})"
        )


def load_model(path: str | Path, device: str = "auto") -> TextModel:
    """Load the model and the tokenizer of a checkpoint file, or of a run folder's best checkpoint.

    device: auto, cpu, cuda, cuda:1 or mps.
    Raises: UserError if the checkpoint is missing or damaged, or the device does not exist.
    """
    saved = load_checkpoint(checkpoint_at(Path(path), "path"))
    loaded = TextModel(*build_model(saved, pick_device(device)))
    loaded.trained_in = str(saved.precision["dtype"])
    return loaded


def checkpoint_at(path: Path, flag: str) -> Path:
    """The checkpoint at a path: the file itself or, in a run folder, ckpt.pt (the best), else last.pt.

    flag: the flag that gave the path, for messages. Raises: UserError if the folder has no checkpoint.
    """
    if not path.is_dir():
        return path
    if (found := checkpoint_in(path)) is not None:
        return found
    refuse_adapter(flag, path)
    raise UserError(
        f"{flag} {path} is a folder without a checkpoint (ckpt.pt, last.pt): give a run's --out_dir"
    )


def checkpoint_in(folder: Path) -> Path | None:
    """The checkpoint in a run folder: ckpt.pt (the best), else last.pt; None if there is none."""
    return next((folder / name for name in RUN_FILES if (folder / name).is_file()), None)


def refuse_adapter(flag: str, folder: Path) -> None:
    """Raise UserError if a folder holds adapters alone, as peft loads them on top of a model."""
    if (folder / ADAPTER_FILE).is_file():
        run = checkpoint_in(folder.parent)
        advice = (
            f"give the checkpoint of their run, {run}" if run else "merge them into their model first (peft)"
        )
        raise UserError(f"{flag} {folder} holds adapters alone (LoRA), no whole model: {advice}")


def build_model(saved: Checkpoint, device: torch.device) -> tuple[GPT, Tokenizer]:
    """Build the model, in evaluation mode on a device, and the tokenizer of a loaded checkpoint."""
    model = GPT(saved.model_config)
    model.load_state_dict(saved.weights)
    return model.to(device).eval(), tokenizer_from_dict(saved.tokenizer)


def shards_folder(path: Path, names: Iterable[str]) -> Path:
    """The folder that holds the shards of the checkpoint at `path`. names: the keys of Checkpoint.shards."""
    return (path.parent / next(iter(names))).parent


def load_checkpoint(path: Path, *, gather: bool = True) -> Checkpoint:
    """Load a checkpoint into main memory, after verifying its checksum.

    gather: of a sharded checkpoint, also verify the shards and load their tensors, not only the file itself.
    Raises: UserError if it is missing, damaged, not a checkpoint, or of a newer version.
    """
    loaded = read_checkpoint(path, verified=True)
    if not loaded.shards or not gather:
        return loaded
    gathered = gather_shards(path, loaded)
    verify_content(path, vars(gathered))
    return gathered


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint without loading its tensors: they are memory-mapped.

    The checksum is not verified, and a sharded checkpoint has no tensors.
    Raises: UserError as in load_checkpoint.
    """
    return read_checkpoint(path, verified=False)


def read_checkpoint(path: Path, *, verified: bool) -> Checkpoint:
    """Read the file of a checkpoint, of any format, and check its content.

    verified: compare all bytes with the checksum, and load the tensors instead of mapping them.
    Raises: UserError as in load_checkpoint.
    """
    check_is_file(path)
    try:
        sealed = verify(path) if verified else has_seal(path)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    try:
        content = read_plain(path) if verified else read_mapped(path)
    except Exception as error:  # torch.load may raise anything for a malicious file
        require(sealed, f"{path} is cut short, or {NOT_A_CHECKPOINT}")
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"checkpoint {path} is not a checkpoint ({detail})") from error
    content = cast(dict[str, Any], content) if isinstance(content, dict) else {}
    version = content.get("format")
    require(version is not None and not isinstance(version, torch.Tensor), f"{path} {NOT_A_CHECKPOINT}")
    content = upgrade(content)
    require(
        content["format"] == FORMAT_VERSION,
        f"checkpoint {path} has format {version}, and this NanoGPT ({__version__}) reads 1 to "
        f"{FORMAT_VERSION}: update NanoGPT",
    )
    require(sealed or bool(version == 1), f"{path} is cut short, or {NOT_A_CHECKPOINT}")
    names = {field.name for field in fields(Checkpoint)}
    require(set(content) == names, f"checkpoint {path} was saved by another version: update NanoGPT")
    verify_content(path, content)
    return Checkpoint(**content)


def check_is_file(path: Path) -> None:
    """Raise UserError if there is no file at the path of a checkpoint."""
    try:
        if not path.exists():
            last = path.with_name("last.pt")
            require(
                path.name != "ckpt.pt" or not last.exists(),
                f"{path} does not exist yet (no evaluation so far): give --checkpoint {last}",
            )
            raise UserError(f"checkpoint {path} does not exist: train one, or check the path")
        require(path.is_file(), f"checkpoint {path} is not a file: give the ckpt.pt or last.pt of a run")
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror}") from error


def verify_content(path: Path, content: Mapping[str, Any]) -> None:
    """Check the types and values in a checkpoint. Raises: UserError if something is missing or wrong."""
    try:
        validation.check(content, get_type_hints(Progress))
    except UserError as error:
        raise UserError(f"checkpoint {path} is malformed: {error}") from error


def gather_shards(path: Path, header: Checkpoint) -> Checkpoint:
    """Verify and gather the shards of the checkpoint at `path` into full tensors.

    header: the content of `path`, without tensors.
    Raises: UserError if a shard is missing or damaged.
    """
    sharded.verify(path.parent, header.shards)
    tensors = sharded.load_full(shards_folder(path, header.shards))
    try:
        model, average, states = sharded.unflatten(tensors, len(header.optimizers))
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"checkpoint {path} is malformed: its shards have wrong names ({error})") from error
    optimizers = [saved | {"state": state} for saved, state in zip(header.optimizers, states, strict=True)]
    return replace(header, model=model, average=average, optimizers=optimizers, shards={})


def peek(path: Path) -> tuple[TrainConfig, int]:
    """Read the settings and the step of a checkpoint quickly: no tensor is read, nothing is verified.

    Raises: any exception if the file is missing or damaged.
    """
    if not path.is_file():  # opening a named pipe would block
        raise FileNotFoundError(path)
    content = upgrade(cast(dict[str, Any], read_mapped(path)))
    return from_dict(TrainConfig, content["config"]), int(content["progress"]["step"])


def read_mapped(path: Path) -> object:
    """Read a file as read_plain does, but memory-map its tensors if the file system can."""
    try:
        return read_plain(path, mmap=True)
    except (OSError, RuntimeError):  # no memory maps here, or a file from before PyTorch 1.6
        return read_plain(path)


def read_plain(path: Path, *, mmap: bool = False) -> object:
    """Read tensors and plain types from a file with torch.load(weights_only=True), without warnings.

    Raises: any exception that torch.load raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unusual pickles: the caller validates the content
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
