"""Traces become samples: intake, durable replay, selection."""
