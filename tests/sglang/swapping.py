"""Weights of a draft that somebody else sends to a running SGLang, by its stock endpoints."""

import base64
import pickle
from pathlib import Path

from safetensors.torch import load_file
from tests.sglang.server import Server

MAPS = ("d2t", "t2d")
"""SGLang reads them only at startup."""


def replace(server: Server, folder: Path) -> None:
    """Replace the draft's weights by those of a checkpoint."""
    named = [(name, tensor) for name, tensor in load_file(folder / "model.safetensors").items() if name not in MAPS]
    payload = base64.b64encode(pickle.dumps(named)).decode()
    server.post("/pause_generation", mode="in_place")
    try:
        server.post("/begin_weight_update", selector="draft")
        server.post(
            "/update_weights_from_tensor",
            serialized_named_tensors=[payload],
            selector="draft",
            flush_cache=False,
        )
    finally:
        server.post("/end_weight_update")
        server.post("/continue_generation")
