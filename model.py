"""The model, as `from model import GPT, GPTConfig`; run, it prints what a model costs.

The code is in nanogpt/model/gpt.py (the model) and nanogpt/cli/model.py (the print-out).
"""

if __name__ == "__main__":
    from nanogpt.cli.main import run_script

    run_script("model")
else:
    from nanogpt.config import GPTConfig
    from nanogpt.model.gpt import GPT

    __all__ = ["GPT", "GPTConfig"]
