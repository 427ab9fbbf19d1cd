"""Checkpoints of the families that servers run, tiny and random, with config, tensor names and quantisation as published.

Sizes are changed, keys and spellings are not. Experts and other layers are nonsense: nobody here reads them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, VOCAB, LAYERS = 128, 320, 8

_FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
}
_MXFP4 = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
_INT4 = {
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"group_size": 32, "num_bits": 4, "strategy": "group", "symmetric": True, "type": "int"},
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    "quant_method": "compressed-tensors",
}
_NVFP4 = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "config_groups": {
        "group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}
    },
    "ignore": ["lm_head", "model.layers.0*"],
}
_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 163_840,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
}
_DEEPSEEK: dict[str, Any] = _SIZES | {
    "kv_lora_rank": 32,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "intermediate_size": 320,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "rope_theta": 10000,
    "rope_scaling": _YARN,
    "tie_word_embeddings": False,
}
_MOE: dict[str, Any] = _SIZES | {
    "head_dim": 64,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "rope_theta": 10_000_000,
}


def _names(prefix: str = "model.", head: str = "lm_head.weight") -> tuple[str, str, str]:
    return f"{prefix}embed_tokens.weight", head, f"{prefix}norm.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedTarget:
    """A family, and what is expected of its description. `head` of the names is empty if it is tied to the embedding."""

    config: Mapping[str, Any]
    names: tuple[str, str, str] = field(default_factory=_names)
    others: Mapping[str, Tensor] = field(default_factory=dict)
    """Further tensors of the checkpoint."""
    norm_offset: float = 0.0
    logit_scale: float = 1.0
    theta: float = 10_000.0
    scaling: str = "default"
    shape: tuple[int, int, int, int] = (4, 2, 32, 384)
    """Heads, key-value heads, head size and intermediate size of a draft."""


_EXPERT = {
    "model.layers.3.mlp.experts.0.up_proj.weight": torch.zeros(64, HIDDEN).to(torch.float8_e4m3fn),
    "model.layers.3.mlp.experts.0.up_proj.weight_scale_inv": torch.ones(1, 1),
}
_MTP = {
    "model.layers.8.embed_tokens.weight": torch.zeros(VOCAB, HIDDEN),
    "model.layers.8.shared_head.head.weight": torch.zeros(VOCAB, HIDDEN),
    "model.layers.8.shared_head.norm.weight": torch.zeros(HIDDEN),
}

TARGETS: dict[str, PublishedTarget] = {
    "llama 3, FP8": PublishedTarget(
        config={
            "model_type": "llama",
            **_SIZES,
            "intermediate_size": 448,
            "rope_theta": 500_000.0,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "quantization_config": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        },
        others=_EXPERT,
        theta=500_000.0,
        scaling="llama3",
        shape=(4, 2, 32, 448),
    ),
    "llama 4": PublishedTarget(
        config={
            "model_type": "llama4",
            "tie_word_embeddings": False,
            "text_config": {
                "model_type": "llama4_text",
                **_SIZES,
                "intermediate_size": 64,
                "intermediate_size_mlp": 256,
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "rope_theta": 500_000.0,
            },
            "vision_config": {"hidden_size": 48},
        },
        names=_names("language_model.model.", "language_model.lm_head.weight"),
        others={"vision_model.patch_embedding.norm.weight": torch.ones(48)},
        theta=500_000.0,
        shape=(4, 2, 128, 256),
    ),
    "qwen 3 MoE, NVFP4": PublishedTarget(
        config={"model_type": "qwen3_moe", **_MOE, "intermediate_size": 384, "quantization_config": _NVFP4},
        others={"model.layers.3.mlp.experts.0.up_proj.weight": torch.zeros(32, 64, dtype=torch.uint8)},
        theta=10_000_000.0,
        shape=(4, 2, 64, 384),
    ),
    "qwen 3 next, FP8": PublishedTarget(
        config={
            "model_type": "qwen3_next",
            **_MOE,
            "intermediate_size": 320,
            "partial_rotary_factor": 0.25,
            "rope_scaling": None,
            "quantization_config": _FP8,
        },
        others={
            **_EXPERT,
            "mtp.norm.weight": torch.zeros(HIDDEN),
            "mtp.embed_tokens.weight": torch.zeros(VOCAB, HIDDEN),
        },
        norm_offset=1.0,
        theta=10_000_000.0,
        shape=(4, 2, 64, 320),
    ),
    "qwen 3.5 MoE": PublishedTarget(
        config={
            "model_type": "qwen3_5_moe",
            "tie_word_embeddings": False,
            "text_config": {
                "model_type": "qwen3_5_moe_text",
                **{key: value for key, value in _MOE.items() if key != "rope_theta"},
                "rope_parameters": {
                    "mrope_interleaved": True,
                    "mrope_section": [11, 11, 10],
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 10_000_000,
                    "rope_type": "default",
                },
            },
        },
        names=_names("model.language_model."),
        others={"model.visual.merger.norm.weight": torch.ones(HIDDEN)},
        norm_offset=1.0,
        theta=10_000_000.0,
        shape=(4, 2, 64, 384),
    ),
    "gpt-oss, MXFP4": PublishedTarget(
        config={
            "model_type": "gpt_oss",
            **_SIZES,
            "head_dim": 32,
            "intermediate_size": HIDDEN,
            "num_local_experts": 4,
            "experts_per_token": 4,
            "rope_theta": 150_000,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "quantization_config": _MXFP4,
        },
        others={
            "model.layers.3.mlp.experts.down_proj_blocks": torch.zeros(4, 8, dtype=torch.uint8),
            "model.layers.3.mlp.experts.down_proj_scales": torch.zeros(4, 1, dtype=torch.uint8),
        },
        theta=150_000.0,
        scaling="yarn",
    ),
    "deepseek V3, FP8": PublishedTarget(
        config={"model_type": "deepseek_v3", **_DEEPSEEK, "quantization_config": _FP8},
        others={**_EXPERT, **_MTP},
        scaling="yarn",
        shape=(1, 1, 128, 320),
    ),
    "deepseek V3.2": PublishedTarget(
        config={"model_type": "deepseek_v32", **_DEEPSEEK, "index_topk": 2048, "quantization_config": _FP8},
        others={**_EXPERT, **_MTP},
        scaling="yarn",
        shape=(1, 1, 128, 320),
    ),
    "deepseek V4": PublishedTarget(
        config={
            "model_type": "deepseek_v4",
            **{key: value for key, value in _DEEPSEEK.items() if key not in {"kv_lora_rank", "intermediate_size"}},
            "head_dim": 512,
            "o_lora_rank": 64,
            "compress_rope_theta": 160_000,
        },
        names=("embed.weight", "head.weight", "norm.weight"),
        others={
            "layers.3.ffn.experts.0.w1.weight": torch.zeros(64, 64, dtype=torch.int8),
            "layers.3.ffn.experts.0.w1.scale": torch.ones(2, 2).to(torch.float8_e8m0fnu),
            "mtp.0.norm.weight": torch.zeros(HIDDEN),
            "mtp.0.head.weight": torch.zeros(VOCAB, HIDDEN),
        },
        scaling="yarn",
        shape=(1, 1, 128, 384),
    ),
    "kimi K2.5, INT4": PublishedTarget(
        config={
            "model_type": "kimi_k25",
            "tie_word_embeddings": False,
            "text_config": {"model_type": "deepseek_v3", **_DEEPSEEK, "quantization_config": _INT4},
            "vision_config": {"hidden_size": 48, "vocab_size": 7},
        },
        names=_names("language_model.model.", "language_model.lm_head.weight"),
        others={
            "language_model.model.layers.3.mlp.experts.0.up_proj.weight_packed": torch.zeros(4, 16, dtype=torch.int32),
            "vision_tower.encoder.norm.weight": torch.ones(48),
        },
        scaling="yarn",
        shape=(1, 1, 128, 320),
    ),
    "GLM 4.5": PublishedTarget(
        config={
            "model_type": "glm4_moe",
            **{key: value for key, value in _MOE.items() if key not in {"num_experts", "rope_theta"}},
            "n_routed_experts": 8,
            "intermediate_size": 352,
            "partial_rotary_factor": 0.5,
            "rope_theta": 1_000_000,
            "eos_token_id": [151329, 151336],
        },
        others=_MTP,
        theta=1_000_000.0,
        shape=(4, 2, 64, 352),
    ),
    "GLM 5, FP8": PublishedTarget(
        config={
            "model_type": "glm_moe_dsa",
            **{key: value for key, value in _DEEPSEEK.items() if key not in {"rope_theta", "rope_scaling"}},
            "rope_parameters": {"rope_theta": 1_000_000, "rope_type": "default"},
            "quantization_config": _FP8,
        },
        others={**_EXPERT, **_MTP},
        theta=1_000_000.0,
        shape=(1, 1, 128, 320),
    ),
    "MiniMax M2, FP8": PublishedTarget(
        config={
            "model_type": "minimax_m2",
            **_SIZES,
            "head_dim": 64,
            "intermediate_size": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rotary_dim": 32,
            "rope_theta": 5_000_000,
            "quantization_config": _FP8,
        },
        others=_EXPERT,
        theta=5_000_000.0,
        shape=(4, 2, 64, 384),
    ),
    "MiniMax M3": PublishedTarget(
        config={
            "model_type": "minimax_m3_vl",
            "text_config": {
                "model_type": "minimax_m3_vl_text",
                **_SIZES,
                "head_dim": 64,
                "intermediate_size": 64,
                "dense_intermediate_size": 256,
                "num_local_experts": 8,
                "rotary_dim": 32,
                "rope_theta": 5_000_000,
                "tie_word_embeddings": False,
            },
        },
        names=_names("language_model.model.", "language_model.lm_head.weight"),
        norm_offset=1.0,
        theta=5_000_000.0,
        shape=(4, 2, 64, 256),
    ),
    "gemma 3, with what its class knows left out": PublishedTarget(
        config={
            "model_type": "gemma3",
            "eos_token_id": [1, 106],
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": HIDDEN,
                "vocab_size": VOCAB,
                "intermediate_size": 512,
                "num_hidden_layers": LAYERS,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        },
        names=_names("language_model.model.", ""),
        others={"multi_modal_projector.mm_soft_emb_norm.weight": torch.ones(48)},
        norm_offset=1.0,
        theta=1_000_000.0,
        scaling="linear",
        shape=(8, 4, 256, 512),
    ),
    "gemma 4": PublishedTarget(
        config={
            "model_type": "gemma4",
            "tie_word_embeddings": True,
            "text_config": {
                "model_type": "gemma4_text",
                **_SIZES,
                "head_dim": 64,
                "intermediate_size": 512,
                "final_logit_softcapping": 30.0,
                "num_experts": None,
                "tie_word_embeddings": True,
                "rope_parameters": {
                    "full_attention": {
                        "partial_rotary_factor": 0.25,
                        "rope_theta": 1_000_000.0,
                        "rope_type": "proportional",
                    },
                    "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
                },
            },
        },
        names=_names("model.language_model.", ""),
        others={
            "model.language_model.embed_tokens_per_layer.weight": torch.zeros(VOCAB, 64),
            "model.vision_tower.encoder.norm.weight": torch.ones(48),
        },
        theta=1_000_000.0,
        shape=(4, 2, 64, 512),
    ),
    "nemotron-H": PublishedTarget(
        config={
            "model_type": "nemotron_h",
            **{key: value for key, value in _SIZES.items() if key != "rms_norm_eps"},
            "layer_norm_epsilon": 1e-5,
            "attention_head_dim": 32,
            "intermediate_size": 512,
            "hybrid_override_pattern": "M-M*M-M*",
        },
        names=("backbone.embeddings.weight", "lm_head.weight", "backbone.norm_f.weight"),
        shape=(4, 2, 32, 512),
    ),
    "inkling": PublishedTarget(
        config={
            "model_type": "inkling_mm_model",
            "text_config": {
                "model_type": "inkling_text",
                **_SIZES,
                "head_dim": 32,
                "intermediate_size": 512,
                "moe_intermediate_size": 64,
                "n_routed_experts": 8,
                "logits_mup_width_multiplier": 4.0,
            },
        },
        names=("model.llm.embed.weight", "model.llm.unembed.weight", "model.llm.norm.weight"),
        others={"model.llm.embed_norm.weight": torch.ones(HIDDEN)},
        logit_scale=0.25,
        shape=(4, 2, 32, 512),
    ),
    "mistral small 3": PublishedTarget(
        config={
            "model_type": "mistral3",
            "multimodal_projector_bias": False,
            "text_config": {
                "model_type": "mistral",
                **_SIZES,
                "head_dim": 64,
                "intermediate_size": 512,
                "rope_theta": 1_000_000_000.0,
                "tie_word_embeddings": False,
            },
            "vision_config": {"model_type": "pixtral", "hidden_size": 48},
        },
        names=_names("language_model.model.", "language_model.lm_head.weight"),
        others={
            "multi_modal_projector.norm.weight": torch.ones(48),
            "multi_modal_projector.patch_merger.merging_layer.weight": torch.zeros(48, 192),
            "vision_tower.ln_pre.weight": torch.ones(48),
        },
        theta=1_000_000_000.0,
        shape=(4, 2, 64, 512),
    ),
    "minicpm 3": PublishedTarget(
        config={
            "model_type": "minicpm3",
            **_SIZES,
            "kv_lora_rank": 32,
            "q_lora_rank": 64,
            "intermediate_size": 320,
            "dim_model_base": 32,
            "rope_theta": 10000.0,
        },
        names=_names(head=""),
        logit_scale=0.25,
        shape=(1, 1, 128, 320),
    ),
    "granite": PublishedTarget(
        config={"model_type": "granite", **_SIZES, "intermediate_size": 512, "logits_scaling": 8.0},
        logit_scale=0.125,
        shape=(4, 2, 32, 512),
    ),
    "hyperclovax": PublishedTarget(
        config={"model_type": "hyperclovax", **_SIZES, "intermediate_size": 512, "logits_scaling": 0.125},
        logit_scale=0.125,
        shape=(4, 2, 32, 512),
    ),
    "a family that nobody has heard of": PublishedTarget(
        config={"model_type": "novel_moe", **_SIZES, "intermediate_size": 512},
        names=("transformer.wte.weight", "output.weight", "transformer.ln_f.weight"),
        shape=(4, 2, 32, 512),
    ),
}


def make(name: str, folder: Path, *, seed: int = 0) -> dict[str, Tensor]:
    """Write the checkpoint in two shards with an index, and return its three tensors by name, in bfloat16."""
    target, generator = TARGETS[name], torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(target.config))
    (folder / "tokenizer.json").write_text("{}")
    embedding, head, norm = target.names
    tables = [table for table in (embedding, head) if table]
    tensors = {
        **{table: torch.randn(VOCAB, HIDDEN, generator=generator).bfloat16() for table in tables},
        norm: (1 - target.norm_offset + 0.1 * torch.randn(HIDDEN, generator=generator)).bfloat16(),
    }
    shards = {
        "model-00001-of-00002.safetensors": {embedding: tensors[embedding], **target.others},
        "model-00002-of-00002.safetensors": {key: tensors[key] for key in tensors if key != embedding},
    }
    for file, content in shards.items():
        save_file(content, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, content in shards.items() for key in content}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors
