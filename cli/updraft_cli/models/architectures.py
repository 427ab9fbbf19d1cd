"""Names of sizes and tensors in GGUF files and in Hugging Face's layout, by family of models.

llama.cpp stores some tensors differently from the published ones: it interleaves the rows of Llama's queries and keys, adds
one to the weights of Gemma's norms, and stores Llama 3's scaled rotary embedding as a table. A Mistral is a "llama" there,
without its sliding window, which llama.cpp does not apply either.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from updraft_chassis.errors import InvalidInput

ROPE_TABLE = "rope_freqs.weight"
"""Factors by which the frequencies are divided."""

_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LLAMA3_ORIGINAL_CONTEXT = 8192
_GEMMA_27B_LAYERS = 62


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    name: str
    """Name of Hugging Face's class."""
    model_type: str
    layer_names: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields that are the same in every config.json."""
    is_interleaved: bool = False
    norm_offset: float = 0.0

    def hugging_face_name(self, name: str) -> str:
        """`model.layers.3.mlp.up_proj.weight` for `blk.3.ffn_up.weight`; InvalidInput for an unknown tensor."""
        match name.split("."):
            case ["blk", layer, part, kind] if part in self.layer_names:
                return f"model.layers.{layer}.{self.layer_names[part]}.{kind}"
            case [part, "weight"] if part in _OUTER_NAMES:
                return f"{_OUTER_NAMES[part]}.weight"
        raise InvalidInput(f"the GGUF file has a tensor {name}, which is unknown for a {self.name}")

    def published(self, name: str, values: NDArray[np.float32], config: Mapping[str, Any]) -> NDArray[np.float32]:
        """Return a tensor's values as they were before llama.cpp's conversion."""
        part = name.split(".")[-2]
        if part.endswith("_norm") and self.norm_offset:
            return values - np.float32(self.norm_offset)
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(part)
        return _undo_interleaving(values, config[heads]) if heads and self.is_interleaved else values


_BIASES = {"attention_bias": False, "mlp_bias": False}
ARCHITECTURES = {
    "llama": Architecture(
        name="LlamaForCausalLM", model_type="llama", layer_names=_LAYER_NAMES, fixed=_BIASES, is_interleaved=True
    ),
    "qwen2": Architecture(name="Qwen2ForCausalLM", model_type="qwen2", layer_names=_LAYER_NAMES),
    "qwen3": Architecture(
        name="Qwen3ForCausalLM",
        model_type="qwen3",
        layer_names=_LAYER_NAMES | _HEAD_NORMS,
        fixed={"attention_bias": False},
    ),
    "gemma3": Architecture(
        name="Gemma3ForCausalLM",
        model_type="gemma3_text",
        layer_names=_LAYER_NAMES | _HEAD_NORMS | _GEMMA_NORMS,
        fixed={
            "attention_bias": False,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
        },
        norm_offset=1.0,
    ),
}


def architecture(reader: gguf.GGUFReader) -> Architecture:
    family_name = value(reader, "general.architecture")
    if family_name not in ARCHITECTURES:
        raise InvalidInput(f"the GGUF file holds a {family_name}; supported are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[family_name]


def model_config(reader: gguf.GGUFReader) -> dict[str, Any]:
    """Return the model's `config.json`, with the names of transformers."""
    family, family_name = architecture(reader), value(reader, "general.architecture")
    hidden_size, num_heads = (
        int(value(reader, f"{family_name}.embedding_length")),
        int(value(reader, f"{family_name}.attention.head_count")),
    )
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    config: dict[str, Any] = {
        "architectures": [family.name],
        "model_type": family.model_type,
        "attention_dropout": 0.0,
        "bos_token_id": int(value(reader, "tokenizer.ggml.bos_token_id", 1)),
        "dtype": "bfloat16",
        "eos_token_id": int(value(reader, "tokenizer.ggml.eos_token_id")),
        "head_dim": int(value(reader, f"{family_name}.attention.key_length", hidden_size // num_heads)),
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": int(value(reader, f"{family_name}.feed_forward_length")),
        "max_position_embeddings": int(value(reader, f"{family_name}.context_length")),
        "num_attention_heads": num_heads,
        "num_hidden_layers": int(value(reader, f"{family_name}.block_count")),
        "num_key_value_heads": int(value(reader, f"{family_name}.attention.head_count_kv", num_heads)),
        "pad_token_id": int(value(reader, "tokenizer.ggml.padding_token_id", 0)),
        # Stored as float32; its shortest decimal is what the author wrote: 1e-05.
        "rms_norm_eps": float(str(np.float32(value(reader, f"{family_name}.attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(value(reader, f"{family_name}.rope.freq_base", 10_000.0)),
        "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in reader.tensors),
        "vocab_size": int(embedding.shape[1]),
        **family.fixed,
    }
    scaling = _rope_scaling(reader, family_name, config)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config | (_gemma(reader, config) if family_name == "gemma3" else {})


def value(reader: gguf.GGUFReader, name: str, default: Any = None) -> Any:
    """Return the value of a field; InvalidInput if it is missing and there is no default."""
    field_ = reader.get_field(name)
    if field_ is not None:
        return field_.contents()
    if default is None:
        raise InvalidInput(f"the GGUF file has no {name}")
    return default


def _gemma(reader: gguf.GGUFReader, config: Mapping[str, Any]) -> dict[str, Any]:
    # Only the largest scales its queries by another size than that of a head, and llama.cpp knows it by its depth too.
    is_largest = config["num_hidden_layers"] == _GEMMA_27B_LAYERS
    per_head = config["hidden_size"] // config["num_attention_heads"]
    return {
        "query_pre_attn_scalar": per_head if is_largest else config["head_dim"],
        "sliding_window": int(value(reader, "gemma3.attention.sliding_window")),
    }


def _rope_scaling(reader: gguf.GGUFReader, family_name: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    table = next((tensor for tensor in reader.tensors if tensor.name == ROPE_TABLE), None)
    if table is not None:
        return _llama3_scaling(gguf.dequantize(table.data, table.tensor_type).ravel(), config)
    kind = value(reader, f"{family_name}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise InvalidInput(f"the GGUF file scales its rotary embedding by {kind}; supported are linear and Llama 3's")
    return {"rope_type": "linear", "factor": float(value(reader, f"{family_name}.rope.scaling.factor"))}


def _llama3_scaling(table: NDArray[np.float32], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the published numbers behind a table. Only the factor differs between models; the table confirms the others."""
    factor, low, high = round(float(table.max()), 3), 1.0, 4.0
    frequencies = config["rope_theta"] ** (-np.arange(0, config["head_dim"], 2) / config["head_dim"])
    turns = _LLAMA3_ORIGINAL_CONTEXT * frequencies / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - share) / factor + share)
    if table.shape != expected.shape or not np.allclose(table, expected, rtol=1e-3):
        raise InvalidInput(
            f"{ROPE_TABLE} of the GGUF file is not Llama 3's, so the model's own numbers cannot be derived from it"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_CONTEXT,
    }


def _undo_interleaving(values: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's row order of q and k, which interleaves the halves that Hugging Face rotates."""
    rows, columns = values.shape
    pairs = values.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
