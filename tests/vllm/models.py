"""The cycle target and its drafts (tests.sglang.models), with heads of 32: vLLM's CPU kernels take none of 16."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tests.sglang.models import cycle_draft, write_mixing_target
from tests.support.tiny_target import save_draft
from torch import Tensor

_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
_WIDTH = 32


def write_target(folder: Path) -> Path:
    """Layers that add something: what a row says depends on all before it, and drafts are accepted."""
    write_mixing_target(folder)
    _set_heads(folder)
    return folder


def write_draft(target: Path, folder: Path, *, quality: float, token_ids: Tensor | None = None) -> Path:
    """A draft that proposes the right character after this share of all characters."""
    save_draft(cycle_draft(target, quality=quality, token_ids=token_ids), folder)
    weights = load_file(folder / "model.safetensors")
    query, output = weights["midlayer.self_attn.q_proj.weight"], weights["midlayer.self_attn.o_proj.weight"]
    sharpness = query.max()
    for weight in (query, output):
        weight.zero_()
    query[:_WIDTH, :_WIDTH] = sharpness * torch.eye(_WIDTH)
    output[:_WIDTH, :_WIDTH] = torch.eye(_WIDTH)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _set_heads(folder)
    return folder


def _set_heads(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **_HEADS}))
