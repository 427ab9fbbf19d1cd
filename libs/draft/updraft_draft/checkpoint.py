"""Draft checkpoints: the folder that stock SGLang and vLLM load, its digests, and the strict way back.

`model.safetensors` holds every trainable tensor in bfloat16 and the vocabulary (d2t as offsets, t2d), never the embedding:
engines share the target's, and loading another would overwrite it. `tensor_specs` are computed from tensors rather than
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
    """Write model.safetensors and config.json into `folder`, which must not hold a checkpoint that someone reads.

    Exhausted if the disk does not take them.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(checkpoint_tensors(network)), folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(network.config.to_json())
    except (OSError, SafetensorError) as error:
        raise Exhausted(f"the draft cannot be written to {folder}: {error}") from error


def load(folder: Path) -> tuple[DraftConfig, dict[str, Tensor]]:
    """Read and check a folder: names, shapes, dtypes, finite values, a vocabulary within the target's.

    Raises InvalidInput (another layout or shape) or Corrupt (unreadable, not finite).
    """
    config = DraftConfig.from_dict(read_json(folder / CONFIG))
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dict)
    except FileNotFoundError:
        raise InvalidInput(f"{folder} holds no {WEIGHTS}") from None
    except SafetensorError as error:
        raise Corrupt(f"{folder / WEIGHTS} is no whole safetensors file: {error}") from None
    check(config, tensors)
    return config, tensors


def check(config: DraftConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise InvalidInput or Corrupt unless the tensors are exactly those of `config`, finite, with a sound vocabulary.

    Other dtypes than those that `save` writes are refused: what serves would not be what was published.
    """
    expected = expected_shapes(config)
    if set(tensors) != set(expected):
        missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        raise InvalidInput(f"the draft lacks {missing} and has unknown {unknown}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise InvalidInput(f"{name} has shape {tuple(tensor.shape)}, the draft's config says {expected[name]}")
        if tensor.dtype != _stored_dtype(name):
            stored, found = (_DTYPE_NAMES.get(dtype, dtype) for dtype in (_stored_dtype(name), tensor.dtype))
            raise InvalidInput(f"{name} is {found}, a draft holds it as {stored}; it is not converted unasked")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise Corrupt(f"{name} holds values that are not finite")
    token_ids = tensors["d2t"] + torch.arange(config.draft_vocab_size)
    inside = bool(((token_ids >= 0) & (token_ids < config.vocab_size)).all())
    if not inside or not bool((token_ids.diff() > 0).all()):
        raise InvalidInput("d2t does not map the draft's tokens to distinct tokens of the target")


def _stored_dtype(name: str) -> torch.dtype:
    return {"d2t": torch.int64, "t2d": torch.bool}.get(name, torch.bfloat16)


def expected_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor of a checkpoint."""
    with torch.device("meta"):
        network = DraftNetwork(config, torch.empty(0), torch.empty(config.draft_vocab_size, dtype=torch.long))
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def checkpoint_tensors(network: DraftNetwork) -> Iterable[tuple[str, Tensor]]:
    """The tensors as a checkpoint stores them: bfloat16 weights, int64 d2t, bool t2d; sorted by name."""
    for name, tensor in sorted(network.state_dict().items()):
        yield name, tensor.detach().cpu().to(_stored_dtype(name)).contiguous()


def build(
    config: DraftConfig, tensors: Mapping[str, Tensor], embedding: Tensor, *, num_positions: int | None = None
) -> DraftNetwork:
    """A network in the embedding's dtype and device with these tensors, for `num_positions`, or for all that it knows."""
    token_ids = tensors["d2t"] + torch.arange(config.draft_vocab_size)
    network = DraftNetwork(config, embedding, token_ids, num_positions=num_positions)
    network.to(device=embedding.device, dtype=embedding.dtype)
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
    """ "sha256:..." of the target's tokens that a draft proposes, int64 [V]."""
    return digests.vocabulary_fingerprint(token_ids.tolist())


def _sha256(tensor: Tensor) -> str:
    values: memoryview = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
    return hashlib.sha256(values).hexdigest()
