"""Updraft's plugin for a stock SGLang server (entry point `sglang.srt.plugins`), and its weight loader.

It runs in SGLang's processes, so it imports only torch, safetensors, SGLang and the standard library.
"""

__version__ = "0.1.0"
