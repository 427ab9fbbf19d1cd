"""Weights become a version: held-out estimate, decision, upload."""
