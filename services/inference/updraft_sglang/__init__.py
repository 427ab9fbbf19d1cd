"""What Updraft puts into a stock SGLang server: an official plugin (entry point `sglang.srt.plugins`) and a weight loader.

It runs in SGLang's processes, so it imports nothing but torch, safetensors, SGLang itself and the standard library.
"""

__version__ = "0.1.0"
