"""Inference pods: whether enough of them serve, and what those of other workloads lack."""
