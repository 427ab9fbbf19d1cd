"""`tenant`: which versions learned from whom, and orders to forget."""
