"""The `updraft` command: a client of the registry and the supervisor of local mode."""
