"""Checks of a checkpoint before the first write to any engine, and the proof of what an engine serves. Pure.

A checkpoint of Updraft is an EAGLE-3 draft of one layer with its own head and vocabulary. Engines join some of its tensors
(q, k and v; gate and up); `joined` gives them the names and the shapes that an engine's parameters have.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from updraft_tap import checkpoint

VOCABULARY = ("d2t", "t2d")
_SHAPE_KEYS = ("vocab_size", "draft_vocab_size", "hidden_size", "target_hidden_size", "intermediate_size")
_HEAD_KEYS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "updraft")
_WIDEST = 8
"""Bytes of a number in the widest type that a file may have."""
_JOINED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}

EMBEDDING = "embed_tokens.weight"
"""The target's own parameter in the model of a draft, in each engine. It is never written."""
_NUM_WATCHED = 64
_NUM_SAMPLED = 1024
"""How many of the parameters of the target are sampled, and how many values of each at most."""


class RefusedError(Exception):
    """The draft cannot be served. The previous one stays, unless the message says otherwise.

    The refusal may be temporary, because the agent has already validated the folder.
    """


class OtherShapeError(RefusedError):
    """Its shape is another one than that of the served draft: only a server that starts with it can serve it."""


class TargetChangedError(RefusedError):
    """Loading the draft changed weights of the target."""


AS_BEFORE = "the target's weights are as before again"
NOT_AS_BEFORE = "the target's weights may not be as before, so answers may be wrong: restart the server"
"""The state after a TargetChangedError, when the previous draft has been put back."""

UNKNOWN = "unknown"
"""The digest of a draft that nothing proves."""


class ServedVersion:
    """The draft that was loaded last; version 0 and "" for the one that the server started with."""

    def __init__(self) -> None:
        self.version = 0
        self.digest = ""
        self.written = 0
        """The version of the weights that were written last, also if they were lost since. It changes between two steps, and
        on all ranks between the same two."""


def read(folder: Path, serving: Any, aux: int) -> dict[str, Tensor]:
    """The tensors of a folder with the shapes of the served draft: `serving` is its config, `aux` its input's width.

    Raises RefusedError; OtherShapeError if only the shape is wrong.
    """
    sizes = (math.prod(shape) for shape in expected_shapes(serving, aux).values())
    try:
        _check_config(
            serving, checkpoint.read_config(folder)
        )  # first: a file of another shape may be too large to be read
        _, tensors = checkpoint.read(folder, _WIDEST * sum(sizes))
    except checkpoint.UnreadableError as error:
        raise RefusedError(f"cannot read the draft in {folder}: {error}") from error
    _check_shapes(serving, aux, tensors)
    _check_values(tensors)
    token_ids = target_ids(tensors["d2t"])
    if token_ids.min() < 0 or token_ids.max() >= serving.vocab_size:  # a GPU would stop at the first such token
        raise RefusedError("d2t maps to tokens that the target does not have")
    return tensors


def target_ids(d2t: Tensor) -> Tensor:
    """The target's token of each draft token, int64 [V]."""
    return d2t + torch.arange(len(d2t))


def expected_shapes(config: Any, aux: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of Updraft, from the served draft's config and input width."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.draft_vocab_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    heads, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    layer = {
        "self_attn.q_proj": (heads, 2 * hidden),
        "self_attn.k_proj": (kv, 2 * hidden),
        "self_attn.v_proj": (kv, 2 * hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "hidden_norm": (hidden,),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    return {
        "fc.weight": (hidden, aux),
        "norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
        "d2t": (vocab,),
        "t2d": (config.vocab_size,),
        **{f"midlayer.{name}.weight": shape for name, shape in layer.items()},
    }


def served_name(name: str) -> str:
    """The parameter of an engine's draft that contains a tensor of the checkpoint."""
    parts = name.replace("midlayer.", "layers.0.").split(".")
    return ".".join(_JOINED.get(part, part) for part in parts)


def joined(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a checkpoint by `served_name`, in the engine's dtype; of joined ones q, k, v and gate, up in order."""
    parts: dict[str, list[Tensor]] = {}
    for name in expected_order(tensors):
        parts.setdefault(served_name(name), []).append(tensors[name].to(dtype))
    return {name: torch.cat(each) if len(each) > 1 else each[0] for name, each in parts.items()}


def expected_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the weights, those that are joined in the order of joining."""
    order = list(_JOINED)
    return sorted(
        tensors.keys() - set(VOCABULARY),
        key=lambda name: next((i for i, part in enumerate(order) if part in name), -1),
    )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of what an engine serves: names, dtypes, shapes and values of its weights and its map, on any device.

    Numbers below the smallest normal one count as zero, because kernels that keep weights in a layout of their own are read
    by a product with the identity, which may flush them and loses the sign of a zero.
    """
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        held = _normal(tensor.detach().cpu()).contiguous()
        hashed.update(f"{name} {held.dtype} {tuple(held.shape)}\n".encode())
        hashed.update(held.view(-1).view(torch.uint8).numpy().data)
    return f"sha256:{hashed.hexdigest()}"


def watched(target: nn.Module, draft: nn.Module) -> dict[str, Tensor]:
    """The embedding, which the draft shares, and other parameters of the target: its last one, and some evenly spread.

    No experts, because servers may rearrange them, and no tensors that are made of others, such as torchao's.
    """
    held = [(name, value) for name, value in target.named_parameters() if "expert" not in name and _is_plain(value)]
    shared = {
        f"shared {name}": value
        for name, value in draft.named_parameters()
        if name.endswith(EMBEDDING) and _is_plain(value)
    }
    return {**shared, **dict(held[:: -max(1, len(held) // _NUM_WATCHED)])}


def _is_plain(value: Tensor) -> bool:
    return value.layout == torch.strided and not hasattr(value, "__tensor_flatten__")


def sampled(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of some values of each tensor, evenly spread: cheap, however large the tensors are. One copy per device."""
    hashed, parts = hashlib.sha256(), dict[torch.device, list[Tensor]]()
    with torch.inference_mode():
        for name, tensor in sorted(tensors.items()):
            hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            most = max(1, int(_NUM_SAMPLED ** (1 / max(1, tensor.dim()))))
            values = tensor.detach()[tuple(slice(None, None, max(1, -(-size // most))) for size in tensor.shape)]
            parts.setdefault(tensor.device, []).append(values.contiguous().view(-1).view(torch.uint8))
        for part in parts.values():
            hashed.update(torch.cat(part).cpu().numpy().data)
    return f"sha256:{hashed.hexdigest()}"


def _normal(values: Tensor) -> Tensor:
    if not values.is_floating_point():
        return values
    return values.masked_fill(values.abs() < torch.finfo(values.dtype).tiny, 0.0)


def _check_config(serving: Any, config: Mapping[str, Any]) -> None:
    for key in (*_SHAPE_KEYS, *_HEAD_KEYS):
        now, then = getattr(serving, key, None), config.get(key)
        if now is not None and then is not None and now != then:
            raise OtherShapeError(f"{key} is {then} in the draft's config.json, but {now} in the served draft")


def _check_shapes(serving: Any, aux: int, tensors: Mapping[str, Tensor]) -> None:
    expected = expected_shapes(serving, aux)
    if tensors.keys() != expected.keys():
        missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise RefusedError(f"the draft lacks {missing} and has unknown {unknown}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise OtherShapeError(f"{name} has shape {tuple(tensors[name].shape)}, but the served draft needs {shape}")


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        is_map = name in VOCABULARY
        if not is_map and not tensor.is_floating_point():
            raise RefusedError(f"{name} has the type {tensor.dtype}, but must have a floating-point one")
        if name == "d2t" and tensor.dtype != torch.int64:
            raise RefusedError(f"d2t has the type {tensor.dtype}, but must be int64")
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise RefusedError(f"{name} has values that are not finite")


def _is_finite(tensor: Tensor) -> bool:
    least, most = tensor.aminmax()  # one pass, no copy; NaN propagates
    return math.isfinite(least) and math.isfinite(most)
