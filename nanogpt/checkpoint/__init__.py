"""Runs on disk: the file format, its validation, sharded checkpoints, the run folder."""
