"""The commands, a folder or module per noun; those with a backend serve `updraft` and `kubectl updraft`."""
