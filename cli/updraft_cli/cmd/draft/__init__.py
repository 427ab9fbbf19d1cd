"""The draft commands and their views."""
