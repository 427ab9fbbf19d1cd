"""Stands for the draft model in an SGLang server, for tests of what replaces its weights."""

import json
from types import SimpleNamespace

import torch
from tests.support.tiny_draft import CONFIG, TOKEN_IDS
from torch import Tensor, nn

from updraft_sglang import weights


class Served(nn.Module):
    """A draft with the names and shapes that SGLang gives its parameters."""

    load_lm_head_from_target = False

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(**json.loads(CONFIG.to_json()))
        self.hot_token_id = TOKEN_IDS.clone()
        sizes = {
            "fc": (8, 24),
            "norm": (8,),
            "embed_tokens": (24, 8),
            "layers.0.self_attn.qkv_proj": (16, 16),
            "layers.0.self_attn.o_proj": (8, 8),
            "layers.0.mlp.gate_up_proj": (24, 8),
            "layers.0.mlp.down_proj": (8, 12),
            **{f"layers.0.{n}": (8,) for n in ("hidden_norm", "input_layernorm", "post_attention_layernorm")},
        }
        self.model = nn.Module()
        for name, shape in sizes.items():
            self._add(self.model, f"{name}.weight", torch.zeros(shape))
        self._add(self, "lm_head.weight", torch.zeros(10, 8))

    def _add(self, module: nn.Module, name: str, value: Tensor) -> None:
        *path, last = name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(value))


def shared(model: Served) -> Served:
    """The same, as the plugin leaves it at the start of a server: with its map in a buffer."""
    runner = SimpleNamespace(model=model)
    weights.share_vocabulary(
        SimpleNamespace(draft_worker=SimpleNamespace(draft_runner=runner, hot_token_id=model.hot_token_id))
    )
    return model
