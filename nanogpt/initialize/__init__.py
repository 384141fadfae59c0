"""Trained models, of this program and of others, as the start of a new training."""
