"""Draft checkpoints: folders that stock SGLang and vLLM can load, with their digests and strict checks on loading.

`model.safetensors` holds every trainable tensor in bfloat16 and the vocabulary (d2t as offsets, t2d), but not the embedding:
engines share the target's, and loading another one would overwrite it. `tensor_specs` are computed from tensors rather than
from the file, so an engine can prove what it holds (`updraft_artifacts.digests.tensors_digest`).
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from updraft.registry.v1 import registry_pb2
from updraft_artifacts import digests
from updraft_artifacts.model_folder import read_json
from updraft_chassis.errors import Corrupt, Exhausted, InvalidInput
from updraft_draft.config import DraftConfig
from updraft_draft.network import DraftNetwork

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
VOCABULARY = ("d2t", "t2d")

_DTYPE_NAMES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


def save(network: DraftNetwork, folder: Path) -> None:
    """Write model.safetensors and config.json into `folder`, which must not hold a checkpoint in use.

    Exhausted if they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(checkpoint_tensors(network)), folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(network.config.to_json())
    except (OSError, SafetensorError) as error:
        raise Exhausted(f"the draft cannot be written to {folder}: {error}") from error


def load(folder: Path) -> tuple[DraftConfig, dict[str, Tensor]]:
    """Read and check a folder; see `check`. InvalidInput if the layout does not fit, Corrupt if it is damaged."""
    config = DraftConfig.from_dict(read_json(folder / CONFIG))
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except FileNotFoundError:
        raise InvalidInput(f"{folder} holds no {WEIGHTS}") from None
    except SafetensorError as error:
        raise Corrupt(f"{folder / WEIGHTS} is no whole safetensors file: {error}") from None
    check(config, tensors)
    return config, tensors


def check(config: DraftConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise InvalidInput unless names, shapes and vocabulary match `config`, Corrupt if a value is not finite.

    dtypes must be those that `save` writes: converting them would serve other weights than were published.
    """
    expected = expected_shapes(config)
    if set(tensors) != set(expected):
        missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        raise InvalidInput(f"the draft lacks {missing} and has unknown {unknown}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise InvalidInput(f"{name} has shape {tuple(tensor.shape)}, the draft's config says {expected[name]}")
        if tensor.dtype != _stored_dtype(name):
            stored, actual = (_DTYPE_NAMES.get(dtype, dtype) for dtype in (_stored_dtype(name), tensor.dtype))
            raise InvalidInput(f"{name} is {actual}, a draft holds it as {stored}; convert it before publishing")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise Corrupt(f"{name} holds values that are not finite")
    token_ids = tensors["d2t"] + torch.arange(config.draft_vocab_size)
    is_inside = bool(((token_ids >= 0) & (token_ids < config.vocab_size)).all())
    if not is_inside or not bool((token_ids.diff() > 0).all()):
        raise InvalidInput("d2t does not map the draft's tokens to distinct tokens of the target")


def _stored_dtype(name: str) -> torch.dtype:
    return {"d2t": torch.int64, "t2d": torch.bool}.get(name, torch.bfloat16)


def expected_shapes(c: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Written down, because a network on the meta device makes torch import its compiler, which takes 130 MB."""
    layer, both = "midlayer", 2 * c.hidden_size
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return {
        "d2t": (c.draft_vocab_size,),
        "t2d": (c.vocab_size,),
        "fc.weight": (c.hidden_size, c.aux_size),
        f"{layer}.hidden_norm.weight": (c.hidden_size,),
        f"{layer}.input_layernorm.weight": (c.hidden_size,),
        f"{layer}.post_attention_layernorm.weight": (c.hidden_size,),
        f"{layer}.self_attn.q_proj.weight": (heads, both),
        f"{layer}.self_attn.k_proj.weight": (kv_heads, both),
        f"{layer}.self_attn.v_proj.weight": (kv_heads, both),
        f"{layer}.self_attn.o_proj.weight": (c.hidden_size, heads),
        f"{layer}.mlp.gate_proj.weight": (c.intermediate_size, c.hidden_size),
        f"{layer}.mlp.up_proj.weight": (c.intermediate_size, c.hidden_size),
        f"{layer}.mlp.down_proj.weight": (c.hidden_size, c.intermediate_size),
        "norm.weight": (c.hidden_size,),
        "lm_head.weight": (c.draft_vocab_size, c.hidden_size),
    }


def checkpoint_tensors(network: DraftNetwork) -> Iterable[tuple[str, Tensor]]:
    """The tensors as a checkpoint stores them: bfloat16 weights, int64 d2t, bool t2d; sorted by name."""
    for name, tensor in sorted(network.state_dict().items()):
        yield name, tensor.detach().cpu().to(_stored_dtype(name)).contiguous()


def build(
    config: DraftConfig, tensors: Mapping[str, Tensor], embedding: Tensor, *, num_positions: int | None = None
) -> DraftNetwork:
    """A network with these tensors in the embedding's dtype and device. `num_positions` defaults to the draft's maximum."""
    token_ids = tensors["d2t"] + torch.arange(config.draft_vocab_size)
    network = DraftNetwork(config, embedding, token_ids, num_positions=num_positions, dtype=embedding.dtype)
    network.to(embedding.device)
    network.load_state_dict(dict(tensors))
    return network.requires_grad_(requires_grad=False)


def tensor_specs(tensors: Iterable[tuple[str, Tensor]]) -> list[registry_pb2.TensorSpec]:
    """Name, shape, dtype and sha256 of each tensor, in the given order."""
    return [
        registry_pb2.TensorSpec(
            name=name,
            shape=tensor.shape,
            dtype=_DTYPE_NAMES[tensor.dtype],
            digest=f"sha256:{_sha256(tensor)}",
        )
        for name, tensor in tensors
    ]


def vocabulary_fingerprint(token_ids: Tensor) -> str:
    """ "sha256:..." over `token_ids`, int64 [V]: the target's tokens that a draft can propose."""
    return digests.vocabulary_fingerprint(token_ids.tolist())


def _sha256(tensor: Tensor) -> str:
    values: memoryview = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
    return hashlib.sha256(values).hexdigest()
