"""The checkpoint file format: save, load and verify a checkpoint, upgrade older formats, load a model.

Example:    save_checkpoint(path, checkpoint); checkpoint = load_checkpoint(path)
            model = load_model("out"); model, tokenizer = load_model("out/last.pt")
A checkpoint is one self-contained file of plain types and tensors, written with torch.save and followed by a
seal: the SHA-256 of all bytes before it. Loading verifies the seal first, then calls torch.load with
weights_only=True, so a malicious file cannot run code. Plain torch.load reads the file too.
With --parallel fsdp, last.pt is sharded: its tensors are in a folder of shards (checkpoint/sharded.py), whose
SHA-256 digests are in last.pt; `load_checkpoint` gathers them. Which file holds the best model and which one
is resumed is in checkpoint/run_dir.py.
"""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, cast, get_type_hints

import torch

from nanogpt import seals
from nanogpt.checkpoint import sharded, validation
from nanogpt.config import GPTConfig, TrainConfig, from_dict, model_config
from nanogpt.console import plural
from nanogpt.device import pick_device
from nanogpt.errors import UserError, require
from nanogpt.model.gpt import GPT
from nanogpt.model.lora import adapter_scale, merged
from nanogpt.tokenizer.base import Tokenizer
from nanogpt.tokenizer.registry import from_dict as tokenizer_from_dict

FORMAT_VERSION = 5
"""Version of the checkpoint format. Older formats are read too: see `upgrade`."""

NOT_A_CHECKPOINT = "is not a NanoGPT checkpoint: give the ckpt.pt or last.pt of a run"

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
    """Number of successive steps, up to now, whose loss or gradient was not finite."""
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
    """The trained weights: state_dict of the model, with adapters beside the weights they are for (LoRA)."""
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
        """The weights for inference: the EMA if there is one, else the trained ones; adapters are merged."""
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


def verify(path: Path) -> None:
    """Verify the checksum in the seal at the end of a checkpoint file.

    Raises: UserError if a single bit has changed, or if the file has no seal.
    """
    remaining = path.stat().st_size - SEAL_SIZE
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while remaining > 0 and (block := file.read(min(remaining, 1 << 20))):
            digest.update(block)
            remaining -= len(block)
        seal = file.read()
    require(seal.startswith(SEAL), f"{path} is cut short, or {NOT_A_CHECKPOINT}")
    require(seal == SEAL + digest.digest(), f"checkpoint {path} is damaged (its checksum does not match)")


class ModelAndTokenizer(NamedTuple):
    """The two parts of a TextModel."""

    model: GPT
    tokenizer: Tokenizer


class TextModel(ModelAndTokenizer):
    """A model with its tokenizer: together they continue and score texts. Unpacks into the two."""

    trained_in = "float32"
    """Name of the dtype of its products in training, which sampling takes where the device is fast at it."""

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
    """The checkpoint at a path: the file itself; in a run folder ckpt.pt (the best), else last.pt.

    flag: what gave the path, for messages. Raises: UserError if the folder has none.
    """
    if not path.is_dir():
        return path
    for name in ("ckpt.pt", "last.pt"):
        if (path / name).is_file():
            return path / name
    raise UserError(
        f"{flag} {path} is a folder without a checkpoint (ckpt.pt, last.pt): give a run's --out_dir"
    )


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

    gather: also verify the shards of a sharded checkpoint and load their tensors; else only the file itself.
    Raises: UserError if it is missing, damaged, not a checkpoint, or of a newer version.
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
    except Exception as error:  # torch.load may raise anything for a malicious file
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"checkpoint {path} is not a checkpoint ({detail})") from error
    content = cast(dict[str, Any], content) if isinstance(content, dict) else {}
    version = content.get("format")
    require(version is not None and not isinstance(version, torch.Tensor), f"{path} {NOT_A_CHECKPOINT}")
    content = upgrade(content)
    require(
        content["format"] == FORMAT_VERSION,
        f"checkpoint {path} has format {version}, this is {FORMAT_VERSION}: update NanoGPT",
    )
    names = {field.name for field in fields(Checkpoint)}
    require(set(content) == names, f"checkpoint {path} was saved by another version: update NanoGPT")
    verify_content(path, content)
    loaded = Checkpoint(**content)
    if not loaded.shards or not gather:
        return loaded
    gathered = gather_shards(path, loaded)
    verify_content(path, vars(gathered))
    return gathered


def verify_content(path: Path, content: Mapping[str, Any]) -> None:
    """Check the types and values in a checkpoint. Raises: UserError if something is missing or wrong."""
    try:
        validation.check(content, get_type_hints(Progress))
    except UserError as error:
        raise UserError(f"checkpoint {path} is malformed: {error}") from error


def gather_shards(path: Path, header: Checkpoint) -> Checkpoint:
    """Verify and gather the shards of the checkpoint at `path` into full tensors.

    header: the checkpoint as `path` holds it, without tensors.
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


def upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """Upgrade the content of a checkpoint from an older format to the current one.

    Format 1 has no EMA, only GPT-2's approximation of GELU, and in its first files one optimizer.
    Format 2 has other field names and, in its first files, no shards.
    Format 3 has GPT-2's names for the weights (wte, ln_f).
    Format 4 has hashed rows for pairs of tokens, and AdamW for the n-gram tables.
    """
    if content["format"] == 1 and isinstance(content.get("config"), dict):
        content = from_format_1(content)
    if content["format"] == 2:
        content = from_format_2(content)
    if content["format"] == 3:
        content = from_format_3(content)
    return from_format_4(content) if content["format"] == 4 else content


def from_format_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """Upgrade the content of a checkpoint from format 1 to format 2."""
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
    """Upgrade the content of a checkpoint from format 2 to format 3. Malformed values stay as they are."""
    content = {FORMAT_2_NAMES.get(name, name): value for name, value in content.items()}
    content = {"shards": {}, **content, "format": 3}
    progress, precision = content.get("progress"), content.get("precision")
    if isinstance(progress, dict):
        items = cast(dict[str, Any], progress).items()
        content["progress"] = {FORMAT_2_PROGRESS.get(name, name): value for name, value in items}
    if isinstance(precision, dict):
        renamed = dict(cast(dict[str, Any], precision))
        count = renamed.pop("pieces", "")  # format 2 saved this number as a string
        if isinstance(count, str) and count.isdecimal():
            renamed["num_micro_batches"] = int(count)
        content["precision"] = renamed
    return content


def from_format_3(content: Mapping[str, Any]) -> dict[str, Any]:
    """Upgrade the content of a checkpoint from format 3 to format 4. Malformed values stay as they are."""
    content = {**content, "format": 4}
    for key in ("model", "average"):
        weights = content.get(key)
        if isinstance(weights, dict):
            items = cast(dict[object, Any], weights).items()
            content[key] = {
                sharded.current_name(name) if isinstance(name, str) else name: weight
                for name, weight in items
            }
    return content


def from_format_4(content: Mapping[str, Any]) -> dict[str, Any]:
    """Upgrade the content of a checkpoint from format 4 to format 5. Malformed values stay as they are."""
    settings: Any = content.get("config")
    if isinstance(settings, dict):
        settings = {**cast(dict[Any, Any], settings), "ngram_pairs": "hashed"}
    return {**content, "config": settings, "format": 5}


def peek(path: Path) -> tuple[TrainConfig, int]:
    """Read the settings and the step of a checkpoint quickly: no tensor is read, nothing is verified.

    Raises: any exception if the file is missing or damaged.
    """
    if not path.is_file():  # opening a named pipe would block
        raise FileNotFoundError(path)
    try:
        content = read_plain(path, mmap=True)
    except (OSError, RuntimeError):  # this file system does not support memory maps
        content = read_plain(path)
    content = upgrade(cast(dict[str, Any], content))
    return from_dict(TrainConfig, content["config"]), int(content["progress"]["step"])


def read_plain(path: Path, *, mmap: bool = False) -> object:
    """Read tensors and plain types from a file with torch.load(weights_only=True), without warnings.

    Raises: any exception that torch.load raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unusual pickles: the caller validates the content
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
