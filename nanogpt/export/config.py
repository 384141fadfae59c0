"""The settings of the `export` command.

This file knows nothing of torch, or of how flags are parsed.
"""

from dataclasses import dataclass
from typing import Literal

from nanogpt.settings import Settings

FormatName = Literal["hf", "gguf", "safetensors"]
ExportDtype = Literal["f32", "f16", "bf16", "q8_0"]


@dataclass(frozen=True)
class ExportConfig(Settings):
    """Write a checkpoint in a format that other programs read."""

    checkpoint: str = "out/ckpt.pt"
    """The checkpoint to export; everything needed is inside it."""
    format: FormatName = "hf"
    """hf (a folder for transformers), gguf (a file for llama.cpp) or safetensors (a file for any program)."""
    output: str = ""
    """File (gguf, safetensors) or folder (hf) to write; must be given."""
    dtype: ExportDtype = "f32"
    """Type of the weights: f32, f16, bf16, or in gguf q8_0 (8 bits)."""
    overwrite: bool = False
    """Replace an earlier export in output."""
