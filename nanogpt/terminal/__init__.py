"""Output for a person: lines, progress bars, and streams that survive."""
