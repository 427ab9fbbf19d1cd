"""A Llama in one GGUF file, rewritten as the Hugging Face folder that every other part reads.

Weights are dequantised tensor by tensor and streamed into `model.safetensors` as bfloat16, so memory stays at
one tensor. The file is written here and not by the safetensors package, which wants all tensors at once: the
format is a length, a JSON header and the bytes. No torch: the CLI must work where torch is absent.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from updraft_chassis import layout
from updraft_chassis.errors import InvalidInput
from updraft_cli import bfloat16

_CONTROL_TOKEN = 3
"""`tokenizer.ggml.token_type` of tokens that are never produced by merging text."""

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
_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

Progress = Callable[[int, int], None]
"""Called with tensors done and tensors in all."""


def convert(source: Path, folder: Path, progress: Progress) -> None:
    """Write config, weights and tokenizer of the GGUF `source` into the existing `folder`."""
    reader = gguf.GGUFReader(source)
    config = llama_config(reader)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(config))
    (folder / "tokenizer.json").write_text(tokenizer(reader).to_str())
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(reader))
    _write_weights(folder / "model.safetensors", reader, config, progress)


def llama_config(reader: gguf.GGUFReader) -> dict[str, Any]:
    """Return `config.json` of the model, with the names that transformers gives a `LlamaForCausalLM`."""
    hidden_size = int(_field(reader, "llama.embedding_length"))
    num_heads = int(_field(reader, "llama.attention.head_count"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": int(_field(reader, "tokenizer.ggml.bos_token_id")),
        "dtype": "bfloat16",
        "eos_token_id": int(_field(reader, "tokenizer.ggml.eos_token_id")),
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": int(_field(reader, "llama.feed_forward_length")),
        "max_position_embeddings": int(_field(reader, "llama.context_length")),
        "mlp_bias": False,
        "num_attention_heads": num_heads,
        "num_hidden_layers": int(_field(reader, "llama.block_count")),
        "num_key_value_heads": int(_field(reader, "llama.attention.head_count_kv")),
        "pad_token_id": int(_field(reader, "tokenizer.ggml.padding_token_id")),
        # Stored as float32; its shortest decimal is what the author wrote: 1e-05.
        "rms_norm_eps": float(str(np.float32(_field(reader, "llama.attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(_field(reader, "llama.rope.freq_base")),
        "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in reader.tensors),
        "vocab_size": int(_field(reader, "llama.vocab_size")),
    }


def tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """Rebuild the byte-level BPE tokenizer that the file holds."""
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges: list[str] = _field(reader, "tokenizer.ggml.merges")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    built = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    # "smollm" in llama.cpp: digits one by one, then GPT-2's pattern.
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    control = (token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN)
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return built


def hugging_face_name(name: str) -> str:
    """Return a tensor's Hugging Face name: `model.layers.3.mlp.up_proj.weight` for `blk.3.ffn_up.weight`."""
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"


def weights(reader: gguf.GGUFReader, config: dict[str, Any]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield every tensor in file order, dequantised, by its Hugging Face name."""
    num_heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in num_heads:
            values = _undo_rotary_order(values, num_heads[part])
        yield hugging_face_name(tensor.name), values


def _undo_rotary_order(values: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's row order of q and k, which interleaves the halves that Hugging Face rotates."""
    rows, columns = values.shape
    pairs = values.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _write_weights(path: Path, reader: gguf.GGUFReader, config: dict[str, Any], progress: Progress) -> None:
    total = len(reader.tensors)
    with path.open("wb") as file:
        file.write(layout.header(_places(reader.tensors)))
        for done, (_, values) in enumerate(weights(reader, config), start=1):
            file.write(bfloat16.bits(values).data)
            progress(done, total)


def _places(tensors: Iterable[gguf.ReaderTensor]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for tensor in tensors:
        # GGUF states the fastest dimension first.
        yield hugging_face_name(tensor.name), "BF16", tuple(int(size) for size in reversed(tensor.shape))


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _tokenizer_config(reader: gguf.GGUFReader) -> dict[str, Any]:
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")

    def token(role: str) -> str:
        return tokens[int(_field(reader, f"tokenizer.ggml.{role}_token_id"))]

    return {
        # Not GPT2Tokenizer: that class would replace the digits rule with its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": token("bos"),
        "chat_template": _field(reader, "tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": token("eos"),
        "model_max_length": int(_field(reader, "llama.context_length")),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
    }


def _field(reader: gguf.GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise InvalidInput(f"the GGUF file has no {name}: only Llamas with a BPE tokenizer are read")
    return field.contents()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
