"""The export formats: a row for each, and `export`, which refuses what a format cannot carry.

Example: export(source, "gguf", Path("model.gguf"), dtype="q8_0")
To add a format, write a file with `misfits` and `write`, a row in FORMATS, and its name in FormatName
(config.py). A writer makes what it is told, a file or a folder of files; that it is whole is seen to here.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanogpt.errors import UserError, require
from nanogpt.export import gguf, hf, html, onnx, safetensors
from nanogpt.export.source import Advance, TrainedModel
from nanogpt.native.step import is_changed
from nanogpt.settings import join_choices
from nanogpt.storage.files import atomic_output


@dataclass(frozen=True)
class Format:
    """An export format."""

    write: Callable[[TrainedModel, Path, str, Advance], None]
    misfits: Callable[[TrainedModel], list[str]]
    """What of a model's settings the format cannot carry, in words or flags."""
    dtypes: tuple[str, ...]
    """Values of --dtype; the first is its default."""
    packages: tuple[str, ...]
    """Packages of the extra that it needs."""
    suffix: str = ""
    """How the name of its file ends. Formats without one are folders."""
    files: tuple[str, ...] = ()
    """The files in its folder, of which the first tells its exports from other folders."""
    mark: tuple[int, bytes] = (0, b"")
    """Bytes that every file of it has, and where they begin."""
    weights_alone: bool = False
    """Whether it says nothing of what is computed with the weights."""

    def cannot_carry(self, source: TrainedModel) -> list[str]:
        """What of a model the format cannot carry, in words or flags."""
        changed = not self.weights_alone and is_changed(source.config)
        return self.misfits(source) + ["the changed code of nanogpt/model"] * changed

    @property
    def folders(self) -> set[str]:
        """The folders in its folder."""
        return {folder for folder, slash, _ in (name.rpartition("/") for name in self.files) if slash}


FORMATS = {
    "hf": Format(hf.write, hf.misfits, ("f32", "f16", "bf16"), ("safetensors",), files=hf.FILES),
    "gguf": Format(
        gguf.write, gguf.misfits, ("f32", "f16", "bf16", "q8_0"), ("gguf",), ".gguf", mark=(0, b"GGUF")
    ),
    "onnx": Format(onnx.write, onnx.misfits, ("f32", "f16", "bf16", "int8"), ("onnx",), files=onnx.FILES),
    "safetensors": Format(
        safetensors.write,
        safetensors.misfits,
        ("f32", "f16", "bf16"),
        ("safetensors",),
        ".safetensors",
        mark=safetensors.MARK,
        weights_alone=True,
    ),
    "html": Format(html.write, html.misfits, ("int8",), (), ".html", mark=html.MARK),
}
"""Every value of --format."""


def export(
    source: TrainedModel,
    name: str,
    output: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    advance: Advance = lambda count: None,
) -> None:
    """Write a model in the format of this name to a file or folder.

    dtype: None: the first of the format. overwrite: replace an earlier export.
    advance: called with the number of weights done since the last call.
    Raises: UserError if the format cannot carry the model, or the output exists or cannot be written.
    """
    check_request(name, output, dtype=dtype, overwrite=overwrite)
    check_fits(source, name)
    with atomic_output(output, FORMATS[name].folders) as temporary:
        FORMATS[name].write(source, temporary, dtype or default_dtype(name), advance)


def default_dtype(name: str) -> str:
    """The value of --dtype where none is given."""
    return FORMATS[name].dtypes[0]


def check_request(name: str, output: Path, *, dtype: str | None, overwrite: bool) -> None:
    """Check what can be checked before the model is loaded. Raises: UserError."""
    chosen = FORMATS[name]
    require(
        dtype is None or dtype in chosen.dtypes,
        f"--format {name} has no --dtype {dtype}: use {join_choices([*chosen.dtypes])}",
    )
    for package in chosen.packages:
        require(
            importlib.util.find_spec(package) is not None,
            f"--format {name} needs the package {package}, which is not installed: "
            "pip install nanogpt[export]",
        )
    for other, row in FORMATS.items():
        require(
            row.suffix in ("", chosen.suffix) or output.suffix != row.suffix,
            f"--output {output} is named as a file of another format: give --format {other}",
        )
    check_output(chosen, output, overwrite=overwrite)


def check_output(chosen: Format, output: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, or that is anything but an earlier export. Raises: UserError."""
    require(bool(output.name), f"--output {output} has no name: give that of a new file or folder")
    if not output.exists() and not output.is_symlink():
        return
    require(overwrite, f"--output {output} exists already: give another name, or --overwrite to replace it")
    if chosen.files:
        require(output.is_dir(), f"--output {output} is not a folder: give another name")
        found = [*output.glob("*"), *output.glob("*/*")]
        names = {path.relative_to(output).as_posix() + "/" * path.is_dir() for path in found}
        foreign = sorted(names - {*chosen.files} - {f"{folder}/" for folder in chosen.folders})
        require(
            not foreign,
            f"--output {output} has files that are not of an export ({', '.join(foreign[:3])}): "
            "give another name",
        )
        require(
            not names or chosen.files[0] in names,
            f"--output {output} is not an earlier export in this format: give another name",
        )
    else:
        require(output.is_file(), f"--output {output} is not a file: give another name")
        start, mark = chosen.mark
        with open(output, "rb") as file:
            beginning = file.read(start + len(mark))
        require(
            beginning[start:] == mark,
            f"--output {output} is not an earlier export in this format: give another name",
        )


def check_fits(source: TrainedModel, name: str) -> None:
    """Raise UserError, naming the formats that can, if a format cannot carry a model."""
    if misfits := FORMATS[name].cannot_carry(source):
        able = [other for other, row in FORMATS.items() if not row.cannot_carry(source)]
        raise UserError(
            f"--format {name} cannot carry {', '.join(misfits)}: use --format {join_choices(able)}"
        )
