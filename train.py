"""Train a GPT: `python train.py --help`. The code is in nanogpt/train.py."""

from nanogpt.cli import script

if __name__ == "__main__":
    script("train")
