"""The policy commands and their views."""
