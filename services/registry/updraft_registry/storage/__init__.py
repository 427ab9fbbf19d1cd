"""Versions at rest: blobs, catalogue, documents, and their maintenance."""
