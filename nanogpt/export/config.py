"""The settings of the `export` command.

This file knows nothing of torch, or of how flags are parsed.
"""

from dataclasses import dataclass
from typing import Literal

from nanogpt.settings import Settings

FormatName = Literal["hf", "gguf", "onnx", "safetensors", "html"]
ExportDtype = Literal["f32", "f16", "bf16", "q8_0", "int8"]


@dataclass(frozen=True)
class ExportConfig(Settings):
    """Write a checkpoint in a format that other programs read."""

    checkpoint: str = "out/ckpt.pt"
    """The checkpoint to export; everything needed is inside it."""
    format: FormatName = "hf"
    """hf (for transformers), gguf (llama.cpp), onnx (onnxruntime), safetensors (any), html (a browser)."""
    output: str = ""
    """File (gguf, safetensors, html) or folder (hf, onnx) to write; must be given."""
    dtype: ExportDtype | None = None
    """Type of the weights: f32, f16, bf16, in gguf q8_0, in onnx int8. None: f32; html has int8 alone."""
    overwrite: bool = False
    """Replace an earlier export in output."""
