"""Target models and draft checkpoints: where they come from, and how they are converted."""
