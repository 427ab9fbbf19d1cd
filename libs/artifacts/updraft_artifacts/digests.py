"""Digests that processes compare with each other."""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from updraft.registry.v1 import registry_pb2 as pb


def file_digest(path: Path) -> str:
    """ "sha256:<hex>" of a file's bytes."""
    with path.open("rb") as file:
        return digest_of(file)


def digest_of(file: BinaryIO) -> str:
    """ "sha256:<hex>" of an open file, from its position on."""
    return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"  # type: ignore[arg-type]  # typeshed asks for readinto


def tensors_digest(specs: Iterable[pb.TensorSpec]) -> str:
    """ "sha256:<hex>" over the specs sorted by name, one line `name NUL dtype NUL shape NUL hex` per tensor.

    It is computed from tensors, not from a file, so an engine can prove what it holds; checking it does not need torch.
    """
    digest = hashlib.sha256()
    for spec in sorted(specs, key=lambda spec: spec.name):
        shape = ",".join(map(str, spec.shape))
        digest.update(f"{spec.name}\0{spec.dtype}\0{shape}\0{spec.digest.removeprefix('sha256:')}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def vocabulary_fingerprint(token_ids: Sequence[int]) -> str:
    """ "sha256:<hex>" over the target's tokens that a draft can propose, as little-endian int64."""
    return f"sha256:{hashlib.sha256(struct.pack(f'<{len(token_ids)}q', *token_ids)).hexdigest()}"
