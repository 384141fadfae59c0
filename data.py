"""Prepare a text for training: `python data.py --help`. The code is in nanogpt/data/prepare.py."""

from nanogpt.cli.main import run_script

if __name__ == "__main__":
    run_script("data")
