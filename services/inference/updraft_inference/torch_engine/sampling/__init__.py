"""Verification of drafts and sampling of tokens."""
