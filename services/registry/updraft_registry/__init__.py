"""The registry: immutable draft versions, who serves which, and why."""
