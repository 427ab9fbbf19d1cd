"""A tiny random model of each family that the engine runs, made and saved by transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 512
WINDOW = 12
"""Of the families that slide."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
}


def llama(**more: Any) -> PreTrainedModel:
    """A Llama of these sizes, with more of its config."""
    return LlamaForCausalLM(LlamaConfig(**_SIZES, **more))


def _qwen2(**more: Any) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**_SIZES, **more))


def _qwen3(**more: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_SIZES, **more))


def _mistral(**more: Any) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**_SIZES, **more))


def gemma3(**more: Any) -> PreTrainedModel:
    """A Gemma 3 text model with two kinds of layers, and more of its config."""
    full = {"rope_type": "default", "rope_theta": 50_000.0}
    ropes = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}
    defaults: dict[str, Any] = {
        "head_dim": 24,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 40,
        "rope_parameters": ropes,
    }
    config = Gemma3TextConfig(**_SIZES, **(defaults | more))
    return Gemma3ForCausalLM(config)


# Heads of 16 and 32 attend by the engine's own kernels, those of 24 by torch's operations.
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: llama(tie_word_embeddings=True),
    "llama, untied, wide heads": lambda: llama(head_dim=24),
    "llama, biases": lambda: llama(attention_bias=True),
    "llama, llama3 rope": lambda: llama(rope_parameters=_LLAMA3),
    "llama, linear rope": lambda: llama(rope_parameters=_LINEAR),
    "llama, yarn rope": lambda: llama(rope_parameters=_YARN | {"mscale": 1.2, "mscale_all_dim": 0.3}),
    "mistral": lambda: _mistral(sliding_window=None),
    "mistral, sliding": lambda: _mistral(sliding_window=WINDOW, head_dim=32),
    "mistral, sliding, odd heads": lambda: _mistral(sliding_window=WINDOW, head_dim=24),
    "qwen2": lambda: _qwen2(tie_word_embeddings=True),
    "qwen2, late layers slide": lambda: _qwen2(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=3),
    "qwen3": lambda: _qwen3(head_dim=32),
    "qwen3, yarn rope": lambda: _qwen3(
        head_dim=24, rope_parameters=_YARN | {"attention_factor": 1.5, "truncate": False}
    ),
    "gemma3": lambda: gemma3(head_dim=32),
    "gemma3, linear rope": lambda: gemma3(
        rope_parameters={
            "full_attention": _LINEAR,
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        }
    ),
}


def make(name: str, folder: Path, *, seed: int = 0, shard_size: str = "1GB") -> PreTrainedModel:
    """Save a model of this name to `folder`, every weight of it random, and return it in float32."""
    model = randomise(FAMILIES[name](), seed=seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def randomise(model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """Make every weight of a model random, and return it in float32."""
    torch.nn.Module.eval(model)  # transformers leaves its own untyped
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases: near what they start as, and no two alike
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model
