"""One module per command: what the command line says, turned into one call."""
