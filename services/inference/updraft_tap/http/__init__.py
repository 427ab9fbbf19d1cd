"""Code in an engine's own HTTP process: the terms of a sender, and who is let in."""
