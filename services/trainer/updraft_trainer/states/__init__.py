"""Saved states of the learner: folders that a kill cannot break, and which of them training goes on from."""
