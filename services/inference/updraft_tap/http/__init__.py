"""What runs in an engine's own HTTP process: what a sender says, and who is let in."""
