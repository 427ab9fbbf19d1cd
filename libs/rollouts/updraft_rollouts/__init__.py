"""Rollout terms and statistics that the trainer and the registry share."""
