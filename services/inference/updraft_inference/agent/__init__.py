"""The engine-independent agent of a pod: trace capture, the fleet stream, draft swaps."""
