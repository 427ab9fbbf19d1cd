"""Answers requests without a server, and records them: what `updraft draft train` learns from."""
