"""The model, as `from model import GPT, GPTConfig`; run, it prints what a model costs.

The code is in nanogpt/model.py (the model) and nanogpt/summary.py (the print-out).
"""

if __name__ == "__main__":
    from nanogpt.cli import script

    script("model")
else:
    from nanogpt.model import GPT, GPTConfig

    __all__ = ["GPT", "GPTConfig"]
