"""Inference: an engine, and the agent that captures, swaps and reports beside it."""
