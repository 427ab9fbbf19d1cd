"""Proposers of draft tokens, and the choice between them."""
