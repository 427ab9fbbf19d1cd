"""Model and draft files: digests, headers, deltas and transfer over the network. No torch."""
