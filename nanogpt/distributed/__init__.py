"""Several processes: who is who, and how they share a model."""
