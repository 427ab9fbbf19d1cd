"""Placeholder until packages exist."""
