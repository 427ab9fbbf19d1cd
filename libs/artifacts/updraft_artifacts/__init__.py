"""Model and draft files: digests, safetensors headers, deltas, and transfer over the network. No torch."""
