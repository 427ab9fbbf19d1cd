"""Who drafts, and how many tokens: chosen for each sequence at each step, from what was measured."""
