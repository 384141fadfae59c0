"""`fit` from Python: `from nanogpt.train import fit`. The code is in nanogpt/training/trainer.py."""

from nanogpt.training.trainer import Result, fit

__all__ = ["Result", "fit"]
