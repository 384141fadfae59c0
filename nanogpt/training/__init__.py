"""The training run: loop, optimizer, recovery, checkpoints, metrics."""
