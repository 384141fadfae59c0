"""Descriptions of our own files: checkpoints, run folders, data folders.

Example: describe_checkpoint(Path("out/ckpt.pt"), None)
A checkpoint is memory-mapped, so that its size does not matter, unless it is to be verified. What the data
folder of a training and its metrics.jsonl add is read where they still are.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nanogpt.checkpoint import sharded
from nanogpt.checkpoint.format import (
    FORMAT_VERSION,
    Checkpoint,
    has_seal,
    load_checkpoint,
    open_checkpoint,
    read_mapped,
    shards_folder,
    verify,
)
from nanogpt.checkpoint.run_dir import RunFolder
from nanogpt.data.dataset import load_dataset
from nanogpt.data.inspect import summary
from nanogpt.data.swap import VOCAB_FILE
from nanogpt.errors import UserError
from nanogpt.info.curve import evaluations
from nanogpt.info.description import (
    Description,
    VerifyProgress,
    Weights,
    bytes_of,
    shape_facts,
    size_of,
    tokenizer_facts,
)
from nanogpt.initialize.ours import is_checkpoint, without_tied_head
from nanogpt.storage.seals import load_with_checksum
from nanogpt.tokenizer.registry import from_dict
from nanogpt.units import size

# --- checkpoints ---


def describe_checkpoint(path: Path, advance: VerifyProgress | None) -> Description:
    """A checkpoint.

    advance: compare all of it with its checksums, and tell how far that is; None: compare nothing.
    Raises: UserError if it is damaged.
    """
    sealed = has_seal(path) if advance is None else verify(path, advance)
    saved = open_checkpoint(path)
    if advance is not None:
        sharded.verify(path.parent, saved.shards, advance)
    version = cast(dict[str, Any], read_mapped(path))["format"]
    return Description(
        path,
        "a checkpoint",
        f"format {version}" if version == FORMAT_VERSION else f"format {version}, read as {FORMAT_VERSION}",
        sizes_of(path, saved),
        **shape_facts(saved.model_config),
        tokenizer=tokenizer_facts(from_dict(saved.tokenizer)),
        data=data_facts(saved),
        training=saved.train_config,
        progress={**saved.progress, **saved.precision},
        curve=evaluations(path.with_name("metrics.jsonl"), saved.progress),
        notes={"Checksum": checksum_note(verified=advance is not None, sealed=sealed)},
        weights=lambda: open_weights(path),
    )


def checksum_note(*, verified: bool, sealed: bool) -> str:
    """What was done about the checksum of a checkpoint, in words."""
    if not sealed:
        return "none: the first version wrote it"
    return "verified" if verified else "not verified, which needs a read of the whole file (--verify)"


def sizes_of(path: Path, saved: Checkpoint) -> dict[str, int]:
    """Bytes of each part of a checkpoint, with its shards."""
    files = size_of(path)
    if saved.shards:
        folder = shards_folder(path, saved.shards)
        files += size_of(folder)
        tensors = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (shape, dtype) in sharded.shapes(folder).items()
        }
        model, average, states = sharded.unflatten(tensors, len(saved.optimizers))
    else:
        model, average = saved.model, saved.average
        states = [cast(dict[int, Any], optimizer["state"]) for optimizer in saved.optimizers]
    moments = [moment for state in states for values in state.values() for moment in values.values()]
    parts = {"weights": model.values(), "average": average.values(), "optimizer": moments}
    sizes = {name: bytes_of(tensors) for name, tensors in parts.items()}
    return {**sizes, "rest": files - sum(sizes.values())}


def data_facts(saved: Checkpoint) -> dict[str, Any]:
    """The fingerprint of the data of a training, and whether its folder still has them (None: it is gone)."""
    path = Path(saved.train_config.data_dir) / VOCAB_FILE
    found: object = None
    try:
        if path.is_file():
            content, _ = load_with_checksum(path)
            found = cast(dict[str, Any], content)["fingerprint"]
    except Exception:  # torch.load may raise anything for another file
        found = ""
    is_same = None if found is None else found == saved.fingerprint
    return {"fingerprint": saved.fingerprint, "folder": str(path.parent), "folder_has_it": is_same}


def open_weights(path: Path) -> Weights:
    """The weights of a checkpoint, verified; those of adapters are merged. Raises: UserError."""
    verify(path)
    saved = open_checkpoint(path)
    config = saved.train_config
    if saved.shards and not config.lora_rank:
        sharded.verify(path.parent, saved.shards)
        return open_shards(shards_folder(path, saved.shards), tied=config.tied)
    if saved.shards:
        saved = load_checkpoint(path)
    weights = without_tied_head(saved.weights, saved.model_config)
    return Weights(list(weights), weights.__getitem__)


def open_shards(folder: Path, *, tied: bool) -> Weights:
    """The weights in a folder of shards, gathered one at a time."""
    shapes = sharded.shapes(folder)
    prefix = "average." if any(name.startswith("average.") for name in shapes) else "model."

    def read(name: str) -> Tensor:
        """Gather a weight."""
        shape, dtype = shapes[prefix + name]
        tensors = {prefix + name: torch.empty(shape, dtype=dtype)}
        sharded.load(folder, tensors, one_process=True)
        return tensors[prefix + name]

    names = [name.removeprefix(prefix) for name in shapes if name.startswith(prefix)]
    return Weights([name for name in names if not (tied and name == "head.weight")], read)


# --- run folders ---


def is_run(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of ours."""
    run = RunFolder(folder)
    return folder.is_dir() and (is_checkpoint(run.best) or is_checkpoint(run.last))


def describe_run(folder: Path, advance: VerifyProgress | None) -> Description:
    """A run: its best checkpoint, or the newest if there is no best one, and how far it is.

    advance: as for describe_checkpoint. One of two checkpoints may be damaged: the other is described.
    Raises: UserError if no checkpoint in it can be read.
    """
    run = RunFolder(folder)
    found: dict[Path, Description] = {}
    notes: dict[str, str] = {}
    errors: list[UserError] = []
    for label, path in {"Best": run.best, "Newest": run.last}.items():
        if not path.is_file():
            continue
        try:
            found[path] = describe_checkpoint(path, advance)
            notes[label] = f"{path.name}, {steps_of(found[path])}: {parts_of(found[path])}"
        except UserError as error:
            notes[label] = f"{path.name}, which cannot be read: {error}"
            errors.append(error)
    if not found:
        raise errors[0]
    main = found.get(run.best) or found[run.last]
    newest = max(found.values(), key=lambda one: int(one.progress["step"]))
    earlier = len(list((folder / "previous").glob("*")))
    if earlier:
        notes["Earlier runs"] = f"{earlier:,}, in {folder / 'previous'}"
    return replace(
        main,
        path=folder,
        kind=f"a run folder ({main.path.name})",
        sizes={path.name: size_of(path) for path in [*run.run_files(folder), *previous_of(folder)]},
        progress=newest.progress,
        curve=newest.curve,
        notes={**notes, **main.notes},
        damage=str(errors[0]) if errors else "",
    )


def steps_of(one: Description) -> str:
    """How far a checkpoint is, in words."""
    step, planned = int(one.progress["step"]), one.training.max_iters if one.training else 0
    return f"step {step:,}" if step >= planned else f"step {step:,} of {planned:,}"


def parts_of(one: Description) -> str:
    """The size of each part of a checkpoint, in words."""
    return ", ".join(f"{name} {size(count)}" for name, count in one.sizes.items() if count)


def previous_of(folder: Path) -> list[Path]:
    """The folder of earlier runs, if there is one."""
    path = folder / "previous"
    return [path] if path.is_dir() else []


# --- data folders ---


def is_data(folder: Path) -> bool:
    """Whether a folder holds prepared data."""
    return (folder / VOCAB_FILE).is_file()


def describe_data(folder: Path, advance: VerifyProgress | None) -> Description:
    """A data folder, in the words of `data info`.

    advance: as for describe_checkpoint.
    Raises: UserError if it is damaged.
    """
    verify_bytes = 0 if advance is None else None
    dataset = load_dataset(folder, verify_bytes=verify_bytes, advance=advance or int)
    content, _ = load_with_checksum(folder / VOCAB_FILE)
    lines: Mapping[str, str] = dict(line.split(": ", 1) for line in summary(dataset))
    lines = {label: text for label, text in lines.items() if label not in ("Tokenizer", "Fingerprint")}
    return Description(
        folder,
        "a data folder",
        f"format {cast(dict[str, Any], content)['format']}",
        {path.name: size_of(path) for path in sorted(folder.glob("*.pt"))},
        tokenizer=tokenizer_facts(dataset.tokenizer),
        data={
            "fingerprint": dataset.fingerprint,
            "train_tokens": len(dataset.train),
            "val_tokens": len(dataset.val),
            "characters": dataset.characters,
            "bytes": dataset.bytes,
        },
        notes=lines if advance is None else {**lines, "Checksum": "verified"},
    )
