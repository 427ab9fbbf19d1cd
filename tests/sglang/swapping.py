"""A swap of the draft in a running SGLang by its stock endpoints and the plugin's loader, as the adapter does it."""

import base64
import pickle
from pathlib import Path

import httpx
import torch
from tests.sglang.server import Server

LOADER = "updraft_sglang.weights.load"


def swap(server: Server, folder: Path, version: int) -> httpx.Response:
    """The answer to the update, after which the server goes on."""
    values = {"folder": str(folder).encode(), "digest": f"sha256:{version}".encode()}
    named = [(name, torch.tensor(list(value), dtype=torch.uint8)) for name, value in values.items()]
    payload = base64.b64encode(pickle.dumps([*named, ("version", torch.tensor([version]))])).decode()
    server.post("/pause_generation", mode="in_place")
    try:
        server.post("/begin_weight_update", selector="draft")
        return server.http.post(
            "/update_weights_from_tensor",
            json={
                "serialized_named_tensors": [payload],
                "load_format": LOADER,
                "selector": "draft",
                "flush_cache": False,
                "weight_version": f"v{version}",
            },
        )
    finally:
        server.post("/end_weight_update")
        server.post("/continue_generation")
