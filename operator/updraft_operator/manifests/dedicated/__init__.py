"""A Redis for one speculator alone."""
