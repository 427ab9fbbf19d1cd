"""The part of each tensor of a draft that a tensor-parallel rank holds, as SGLang splits it. Pure."""

from collections.abc import Mapping

from torch import Tensor

from updraft_tap.weights import VOCABULARY

_ROWS = ("q_proj", "gate_proj", "up_proj")
_COLUMNS = ("o_proj", "down_proj")
_KEY_VALUE = ("k_proj", "v_proj")


def part(
    tensors: Mapping[str, Tensor], *, num_kv_heads: int, head_rows: int, rank: int, size: int
) -> dict[str, Tensor]:
    """Views of a checkpoint's weights, without its vocabulary, for rank `rank` of `size`; `head_rows` are those of its head."""
    parts = {}
    for name, tensor in tensors.items():
        if name in VOCABULARY:
            continue
        layer = name.removesuffix(".weight").rpartition(".")[2]
        if layer in _ROWS:
            parts[name] = tensor.chunk(size, 0)[rank]
        elif layer in _COLUMNS:
            parts[name] = tensor.chunk(size, 1)[rank]
        elif layer in _KEY_VALUE:  # several ranks share a head if there are fewer heads than ranks
            groups = min(size, num_kv_heads)
            parts[name] = tensor.chunk(groups, 0)[rank * groups // size]
        elif layer == "lm_head":  # its padding may begin within a rank, or be all that a rank has
            parts[name] = tensor[rank * head_rows : (rank + 1) * head_rows]
        else:
            parts[name] = tensor
    return parts
