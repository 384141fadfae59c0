"""Export: a checkpoint in the formats that other programs read."""
