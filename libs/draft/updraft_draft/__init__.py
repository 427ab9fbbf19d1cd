"""Torch code that trainer and inference share, because they must agree on it byte for byte."""
