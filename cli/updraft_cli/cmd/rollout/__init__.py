"""The rollout commands and their views."""
