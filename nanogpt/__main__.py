"""`python -m nanogpt COMMAND`, the same as `nanogpt COMMAND`."""

from nanogpt.cli.main import main

if __name__ == "__main__":
    main()
