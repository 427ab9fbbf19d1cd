"""The part of Updraft that runs inside an unpatched engine, whichever it is: capture, its channel to the agent, and the swap.

It imports only torch and the standard library, because it is a folder on the PYTHONPATH of somebody else's server. An
adapter (`updraft_sglang`, `updraft_vllm`) binds it to one engine: which functions to hook, which attributes to read.
"""

__version__ = "0.2.0"
