"""From text to token files to batches."""
