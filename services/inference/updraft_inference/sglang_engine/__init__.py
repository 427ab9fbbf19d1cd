"""The engine port over a stock SGLang server: HTTP to it, and a Unix socket that Updraft's plugin inside it writes to."""
