"""Updraft's adapter for a stock vLLM server (entry point `vllm.general_plugins`).

It says which functions of vLLM to hook and which attributes to read; the rest is `updraft_tap`. It runs in vLLM's processes,
so it imports only that, torch, vLLM and the standard library.
"""

__version__ = "0.2.0"
