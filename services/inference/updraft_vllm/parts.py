"""The part of a weight that a tensor-parallel rank of vLLM holds, as vLLM's own loaders cut it. Pure.

vLLM's layers say how they are cut: a vocabulary by ranges of tokens, the projections into heads and into the inner width by
outputs, and those back by inputs. Weights that vLLM joins (q, k and v; gate and up) are cut before they are joined.
"""

from typing import Any

import torch
from torch import Tensor

from updraft_tap.weights import RefusedError


def part_of(name: str, layer: Any, value: Tensor) -> Tensor:
    """The part of the weight `value` [outputs, inputs] that this layer holds; `value` itself if it is not cut.

    Raises RefusedError if it cannot be cut like that.
    """
    if getattr(layer, "tp_size", 1) == 1 or not hasattr(layer, "input_size_per_partition"):
        return value  # each rank has all of a layer of the latter kind
    vocabulary = getattr(layer, "shard_indices", None)
    if vocabulary is not None:
        return value[vocabulary.org_vocab_start_index : vocabulary.org_vocab_end_index]
    columns, rows = int(layer.input_size_per_partition), _rows(layer, len(value))
    first = 0 if value.shape[1] == columns else int(layer.tp_rank) * columns
    part = torch.cat([value[start:end] for start, end in rows])[:, first : first + columns]
    expected = (sum(layer.output_partition_sizes), columns)
    if tuple(part.shape) != expected:
        raise RefusedError(f"the part of {name} has shape {tuple(part.shape)}, but this rank of vLLM holds {expected}")
    return part.contiguous()


def held_rows(layer: Any, vocab: int) -> int:
    """How many rows of a head of `vocab` tokens this rank holds, without padding."""
    if getattr(layer, "tp_size", 1) == 1:
        return vocab
    return int(layer.shard_indices.org_vocab_end_index - layer.shard_indices.org_vocab_start_index)


def _rows(layer: Any, num_rows: int) -> list[tuple[int, int]]:
    """Ranges of rows, one for each of the weights that are joined."""
    sizes = list(layer.output_partition_sizes)
    if sum(sizes) == num_rows:
        return [(0, num_rows)]
    replicas = int(getattr(layer, "num_kv_head_replicas", 1))  # ranks that hold the same heads of k and v
    ranges, before = [], 0
    for index, size in enumerate(sizes):
        same = replicas if index else 1
        first = before + layer.tp_rank // same * size
        ranges.append((first, first + size))
        before += layer.tp_size // same * size
    return ranges
