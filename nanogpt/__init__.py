"""NanoGPT: train a GPT on your own text, on the machine you have.

Example: from nanogpt import TrainConfig, fit, generate, load_model, prepare, score
         prepare("my.txt", "data")
         fit(TrainConfig(data_dir="data", out_dir="out", minutes=2))
         print(generate(load_model("out"), "ROMEO:"))
Each name is imported when it is first used (PEP 562), so `import nanogpt` alone does not import PyTorch.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if sys.version_info < (3, 10):  # noqa: UP036 - an older Python gets this message, not a traceback
    sys.stderr.write("error: NanoGPT needs Python 3.10 or newer, and this is %d.%d\n" % sys.version_info[:2])  # noqa: UP031
    raise SystemExit(2)

if TYPE_CHECKING:
    from nanogpt.api import generate, inspect_text, load_metrics, prepare, score
    from nanogpt.checkpoint.format import TextModel, load_model
    from nanogpt.config import GPTConfig, TrainConfig
    from nanogpt.errors import UserError
    from nanogpt.model.gpt import GPT
    from nanogpt.training.fit import fit

__all__ = [
    "GPT",
    "GPTConfig",
    "TextModel",
    "TrainConfig",
    "UserError",
    "fit",
    "generate",
    "inspect_text",
    "load_metrics",
    "load_model",
    "prepare",
    "score",
]

LAZY_IMPORTS = {
    "GPT": "nanogpt.model.gpt",
    "GPTConfig": "nanogpt.config",
    "TextModel": "nanogpt.checkpoint.format",
    "TrainConfig": "nanogpt.config",
    "UserError": "nanogpt.errors",
    "fit": "nanogpt.training.fit",
    "generate": "nanogpt.api",
    "inspect_text": "nanogpt.api",
    "load_metrics": "nanogpt.api",
    "load_model": "nanogpt.checkpoint.format",
    "prepare": "nanogpt.api",
    "score": "nanogpt.api",
}
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    """Import a name of LAZY_IMPORTS when it is first used."""
    if name not in LAZY_IMPORTS:
        raise AttributeError(f"module 'nanogpt' has no attribute {name!r}")
    return getattr(importlib.import_module(LAZY_IMPORTS[name]), name)
