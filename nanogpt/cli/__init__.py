"""The commands: the parser, and a thin file for each command."""
