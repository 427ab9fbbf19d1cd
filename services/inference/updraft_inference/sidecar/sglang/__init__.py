"""Drafts of several ranks of SGLang: its own weight update swaps them at one step, and its checksums prove it."""
