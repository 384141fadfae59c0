"""NanoGPT: train a GPT on your own text, on the machine you have.

Example: from nanogpt import GPT, GPTConfig, TrainConfig, fit, generate, load_model
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
    from nanogpt.checkpoint.format import load_model
    from nanogpt.config import GPTConfig, TrainConfig
    from nanogpt.inference.generate import generate
    from nanogpt.model.gpt import GPT
    from nanogpt.training.fit import fit

__all__ = ["GPT", "GPTConfig", "TrainConfig", "fit", "generate", "load_model"]

LAZY_IMPORTS = {
    "GPT": "nanogpt.model.gpt",
    "GPTConfig": "nanogpt.config",
    "TrainConfig": "nanogpt.config",
    "fit": "nanogpt.training.fit",
    "generate": "nanogpt.inference.generate",
    "load_model": "nanogpt.checkpoint.format",
}
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    """Import a name of LAZY_IMPORTS when it is first used."""
    if name not in LAZY_IMPORTS:
        raise AttributeError(f"module 'nanogpt' has no attribute {name!r}")
    return getattr(importlib.import_module(LAZY_IMPORTS[name]), name)
