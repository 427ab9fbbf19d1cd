"""The status commands and their views."""
