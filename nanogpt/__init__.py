"""NanoGPT: train a GPT on your own text, on the machine you have.

Use:    from nanogpt import GPT, GPTConfig, TrainConfig, fit, generate, load_model
These names are imported when they are used (PEP 562): `import nanogpt` alone imports no PyTorch.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if sys.version_info < (3, 10):  # noqa: UP036 - who has an older one shall read that, not a traceback
    sys.stderr.write("error: NanoGPT needs Python 3.10 or newer, and this is %d.%d\n" % sys.version_info[:2])  # noqa: UP031
    raise SystemExit(2)

if TYPE_CHECKING:
    from nanogpt.checkpoint.format import load_model
    from nanogpt.config import GPTConfig, TrainConfig
    from nanogpt.inference.generate import generate
    from nanogpt.model.gpt import GPT
    from nanogpt.training.fit import fit

__all__ = ["GPT", "GPTConfig", "TrainConfig", "fit", "generate", "load_model"]

HOMES = {
    "GPT": "nanogpt.model.gpt",
    "GPTConfig": "nanogpt.config",
    "TrainConfig": "nanogpt.config",
    "fit": "nanogpt.training.fit",
    "generate": "nanogpt.inference.generate",
    "load_model": "nanogpt.checkpoint.format",
}
"""Where each name is."""


def __getattr__(name: str) -> Any:
    """Import a name of HOMES when it is first used."""
    if name not in HOMES:
        raise AttributeError(f"module 'nanogpt' has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)
