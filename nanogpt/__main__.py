"""`python -m nanogpt COMMAND`, the same as `nanogpt COMMAND`."""

from nanogpt.cli import main

if __name__ == "__main__":
    main()
