"""EAGLE-3 drafts as others publish them, and what they compute, out of the parts of transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests.support import families
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

HIDDEN, VOCAB, DRAFT_VOCAB = 64, families.VOCAB, 100
LAYER: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 50_000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "max_position_embeddings": 32,
    "attention_bias": False,
    "mlp_bias": False,
}
SPECFORGE = LAYER | {
    "architectures": ["LlamaForCausalLMEagle3"],
    "draft_vocab_size": DRAFT_VOCAB,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True},
}
SPECULATORS = {
    "architectures": ["Eagle3Speculator"],
    "auto_map": {"": "eagle3.Eagle3SpeculatorConfig"},
    "speculators_model_type": "eagle3",
    "draft_vocab_size": DRAFT_VOCAB,
    "target_hidden_size": None,
    "norm_before_residual": True,
    "norm_before_fc": False,
    "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
    "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "a/model"}},
    "transformer_layer_config": LAYER,
}
TOKENS = torch.arange(DRAFT_VOCAB) * 5 + 3

Tensors = dict[str, Tensor]


class Reference(nn.Module):
    """The draft as its publishers write it down, out of the parts of transformers: first step, whole text at once."""

    def __init__(self, *, norm_before_residual: bool) -> None:
        super().__init__()
        config = LlamaConfig(**LAYER | {"attn_implementation": "eager"})
        self.norm_before_residual = norm_before_residual
        self.fc = nn.Linear(3 * HIDDEN, HIDDEN, bias=False)
        self.layer = LlamaDecoderLayer(config, 0)
        for name, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", 2)):
            setattr(self.layer.self_attn, name, nn.Linear(2 * HIDDEN, heads * 24, bias=False))
        self.hidden_norm, self.norm = LlamaRMSNorm(HIDDEN, 1e-6), LlamaRMSNorm(HIDDEN, 1e-6)
        self.lm_head = nn.Linear(HIDDEN, DRAFT_VOCAB, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)
        generator = torch.Generator().manual_seed(4)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data = parameter.data.bfloat16().float()  # what a file can hold

    def forward(self, embedded: Tensor, aux: Tensor) -> Tensor:
        x = self.fc(aux)
        normed = self.hidden_norm(x)
        residual = normed if self.norm_before_residual else x
        rows = x.shape[1]
        mask = torch.full((rows, rows), float("-inf")).triu(1)[None, None]
        attended, _ = self.layer.self_attn(
            hidden_states=torch.cat([self.layer.input_layernorm(embedded), normed], -1),
            position_embeddings=self.rotary(x, torch.arange(rows)[None]),
            attention_mask=mask,
        )
        y = residual + attended
        y = y + self.layer.mlp(self.layer.post_attention_layernorm(y))
        logits: Tensor = self.lm_head(self.norm(y))
        return logits

    def tensors(self, layer: str, dtype: torch.dtype = torch.bfloat16) -> Tensors:
        """All of them by the names of a layout, whose layer has this prefix."""
        own = {
            name.replace("layer.", layer, 1) if name.startswith("layer.") else name: t
            for name, t in self.state_dict().items()
        }
        own[f"{layer}hidden_norm.weight"] = own.pop("hidden_norm.weight")
        known = torch.zeros(VOCAB, dtype=torch.bool)
        known[TOKENS] = True
        floats = {name: tensor.to(dtype) for name, tensor in own.items() if "rotary" not in name}
        return floats | {"d2t": TOKENS - torch.arange(DRAFT_VOCAB), "t2d": known}


def write(folder: Path, config: dict[str, Any], tensors: Tensors, *, is_pickled: bool = False) -> Path:
    """Write a checkpoint as its publishers would; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if is_pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
