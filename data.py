"""Prepare a text for training: `python data.py --help`. The code is in nanogpt/data.py."""

from nanogpt.cli import script

if __name__ == "__main__":
    script("data")
