"""Generate text: `python sample.py --help`. The code is in nanogpt/cli/sample.py."""

from nanogpt.cli.main import run_script

if __name__ == "__main__":
    run_script("sample")
