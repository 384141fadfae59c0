"""Train a GPT: `python train.py --help`. The code is in nanogpt/training/trainer.py."""

from nanogpt.cli.main import run_script

if __name__ == "__main__":
    run_script("train")
