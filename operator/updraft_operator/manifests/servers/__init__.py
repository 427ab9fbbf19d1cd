"""Pods of stock servers: what all have in common, and each engine's own arguments."""
