"""The ports of a server in which the plugin runs: certificates that are renewed, and who reaches what."""
