"""The engine port."""
