"""The plan for one speculator, as pure functions of what was observed."""
