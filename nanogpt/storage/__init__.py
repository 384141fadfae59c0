"""Files on disk: atomic writes, locks, checksums, the format of torch.save."""
