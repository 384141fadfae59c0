"""Text to token ids and back. Needs no PyTorch."""
