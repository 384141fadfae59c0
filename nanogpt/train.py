"""`fit` from Python: `from nanogpt.train import fit`. The code is in nanogpt/training/fit.py."""

from nanogpt.training.fit import Result, fit

__all__ = ["Result", "fit"]
