"""Checks that need a GPU. A package, so that its conftest.py is not taken for that of the other tests."""
