"""A mixture of experts of 230 GB as sparse files, of which only three tensors matter."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from updraft_artifacts import safetensors_header

INDEX = "model.safetensors.index.json"
NUM_SHARDS, SHARD_BYTES = 46, 5_000_000_000
VOCAB = 200_064


def tensors_bytes(hidden: int) -> int:
    """Bytes of embedding, head and final norm."""
    return 2 * (2 * VOCAB * hidden) + 2 * hidden


def make(folder: Path, hidden: int) -> dict[str, bytes | Path]:
    """FP8, 46 shards, and an index of 20,000 tensors. The names of the files, and what is in them."""
    folder.mkdir()
    names = [f"model-{i + 1:05}-of-{NUM_SHARDS:05}.safetensors" for i in range(NUM_SHARDS)]
    places: dict[str, dict[str, tuple[int, ...]]] = {
        names[0]: {"model.embed_tokens.weight": (VOCAB, hidden)},
        names[-1]: {"lm_head.weight": (VOCAB, hidden), "model.norm.weight": (hidden,)},
    }
    for name in names:
        _shard(folder / name, places.get(name, {}))
    experts = {f"model.layers.{i // 400}.mlp.experts.{i % 400}.up_proj.weight": names[i // 500] for i in range(20_000)}
    index = experts | {tensor: name for name, tensors in places.items() for tensor in tensors}
    config = {
        "model_type": "minimax_m2",
        "hidden_size": hidden,
        "vocab_size": VOCAB,
        "num_hidden_layers": 62,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_local_experts": 256,
        "max_position_embeddings": 196_608,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    small = {
        "config.json": json.dumps(config).encode(),
        "tokenizer.json": b"{}",
        INDEX: json.dumps({"weight_map": index}).encode(),
    }
    return small | {name: folder / name for name in names}


def _shard(path: Path, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """These tensors in bfloat16, and one more up to the size of a shard."""
    sizes = [(name, "BF16", shape) for name, shape in tensors.items()]
    rest = SHARD_BYTES - sum(2 * math.prod(shape) for shape in tensors.values())
    header = safetensors_header.header([*sizes, (f"model.layers.{path.stem}.experts", "U8", (rest,))])
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + SHARD_BYTES)
