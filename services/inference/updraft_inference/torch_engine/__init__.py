"""The embedded engine: torch on a CPU or one GPU, small enough to read in an evening."""
