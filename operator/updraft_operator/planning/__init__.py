"""What to do about one speculator, as pure functions of what was observed."""
