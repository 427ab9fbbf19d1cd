"""The engine port over a stock SGLang server: HTTP requests to it, and a Unix socket to which its Updraft plugin connects."""
