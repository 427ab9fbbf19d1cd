"""Samples become weights: batches, losses, optimizer steps, saved state."""
