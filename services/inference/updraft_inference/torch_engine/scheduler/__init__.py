"""Continuous batching: which sequences run, and what one forward pass reads."""
