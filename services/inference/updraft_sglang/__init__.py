"""Updraft's adapter for a stock SGLang server (entry point `sglang.srt.plugins`), and its weight loader.

It says which functions of SGLang to hook and which attributes to read; the rest is `updraft_tap`. It runs in SGLang's
processes, so it imports only that, torch, SGLang and the standard library.
"""

__version__ = "0.2.0"
