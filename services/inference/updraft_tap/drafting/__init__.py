"""Whether a server's next step drafts."""
