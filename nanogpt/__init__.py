"""NanoGPT: train a GPT on your own text, on the machine you have.

Nothing is imported here, so that `nanogpt <command> --help` stays instant. The pieces:

    from nanogpt.config import TrainConfig
    from nanogpt.train import fit
    from nanogpt.model import GPT, GPTConfig
"""

__version__ = "0.1.0"
