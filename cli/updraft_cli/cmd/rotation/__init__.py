"""New passwords on request."""
