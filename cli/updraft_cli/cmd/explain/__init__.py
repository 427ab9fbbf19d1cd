"""The explain commands and their views."""
