"""The trainer: intake, replay, learn, evaluate, publish."""
