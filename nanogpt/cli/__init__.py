"""The command line: a parser, and a thin module for each command."""
