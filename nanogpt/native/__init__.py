"""Native: C for what PyTorch is slow at, compiled on the user's machine."""
