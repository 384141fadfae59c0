"""Generate text: `python sample.py --help`. The code is in nanogpt/sample.py."""

from nanogpt.cli import script

if __name__ == "__main__":
    script("sample")
