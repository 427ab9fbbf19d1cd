"""Where the bytes of versions are kept."""
