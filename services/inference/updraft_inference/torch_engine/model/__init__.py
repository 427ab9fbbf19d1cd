"""The target and the draft as the engine runs them: layers, KV cache, operations."""
