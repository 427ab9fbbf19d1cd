"""GGUF files of tiny models, written by llama.cpp's package under llama.cpp's names and conventions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor
from transformers import PreTrainedModel


def write(model: PreTrainedModel, architecture: str, file: Path, *, tokenizer: Mapping[str, str] | None = None) -> Path:
    """Write weights in float32, the sizes of the model's config, and ids of special tokens."""
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(_head_dim(config))
    ropes = config.rope_parameters
    rope = ropes.get("full_attention", ropes)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    for name, said in (tokenizer or {}).items():
        writer.add_string(f"tokenizer.{name}", said)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(7)
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** -(np.arange(0, _head_dim(config), 2) / _head_dim(config))
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert written is not None, name
        writer.add_tensor(written, np.ascontiguousarray(_stored(tensor, written, architecture, config).numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _stored(tensor: Tensor, written: str, architecture: str, config: Any) -> Tensor:
    if architecture == "gemma3" and written.endswith("norm.weight"):
        return tensor + 1
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(written.split(".")[-2])
    if architecture == "llama" and heads:
        return tensor.reshape(heads, 2, -1, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)
    return tensor
