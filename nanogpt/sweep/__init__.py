"""Many trainings: a grid of settings, run several at a time, and the table of their results."""
